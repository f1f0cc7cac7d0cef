# SPDX-License-Identifier: Apache-2.0
"""Read the programs' counters, summed over CPUs, and check that they add up."""

import ctypes
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hostint_agent import bpf_calls, bpf_types

WATCHLIST_FIELDS = tuple(name for name, *_ in bpf_types.WatchlistCounters._fields_)
_OUTCOMES = (
    "reported",
    "suppressed",
    "sampled_out",
    "rate_limited",
    "ring_full",
    "unverified",
    "unresolved",
    "dropped",
    "not_asked",
)
_DROP_OUTCOMES = (
    "drops_reported",
    "drops_suppressed",
    "drops_sampled_out",
    "drops_rate_limited",
    "drops_ring_full",
    "drops_not_asked",
)
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Identity:
    """The accounting identity of one watchlist; both differences are 0 when traffic has stopped."""

    counters: Mapping[str, int]
    pending: int

    @property
    def watched_difference(self) -> int:
        """Watched packets without an outcome."""
        c = self.counters
        return c["watched"] - sum(c[name] for name in _OUTCOMES) - self.pending

    @property
    def drops_difference(self) -> int:
        """Dropped packets without a decision."""
        c = self.counters
        dead = c["dropped"] + c["dropped_late"]
        return dead - sum(c[name] for name in _DROP_OUTCOMES)


def _signed(value: int) -> int:
    """A sum of per-CPU values of which one CPU counted up and another down."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _places(watchlist: int) -> list[bytes]:
    """Keys of one watchlist's counters: each kind of program has its own."""
    users = bpf_types.CounterUser
    return [struct.pack("=I", user * bpf_types.MAX_WATCHLISTS + watchlist) for user in users]


class Counters:
    """The counters of a loaded datapath."""

    def __init__(self, maps: Path) -> None:
        """Open the pinned maps below `maps`. Raises bpf_calls.BpfError."""
        self._watchlists = bpf_calls.Map.open(maps / "watchlist_counters")
        self._datapath = bpf_calls.Map.open(maps / "datapath_counters")
        self._drops = bpf_calls.Map.open(maps / "drop_counters")
        self._slots = bpf_calls.Map.open(maps / "slots")

    def watchlist(self, index: int) -> dict[str, int]:
        """All counters of one watchlist, summed over CPUs and kinds of programs."""
        size = self._watchlists.stride
        words = [
            struct.unpack_from(f"={len(WATCHLIST_FIELDS)}Q", raw, cpu * size)
            for raw in map(self._watchlists.lookup, _places(index))
            for cpu in range(self._watchlists.cpus)
        ]
        return {
            name: _signed(sum(cpu[position] for cpu in words))
            for position, name in enumerate(WATCHLIST_FIELDS)
        }

    def reset(self, indexes: Iterable[int]) -> None:
        """Begin at zero: the place belongs to another watchlist now."""
        zeros = bytes(self._watchlists.stride * self._watchlists.cpus)
        for key in (key for index in indexes for key in _places(index)):
            self._watchlists.update(key, zeros)

    def datapath(self) -> dict[str, int]:
        """Counters of the programs as a whole, by name in lower case."""
        totals = self._sums(self._datapath)
        return {counter.name.lower(): totals[counter] for counter in bpf_types.DatapathCounter}

    def drops(self, names: Mapping[int, str]) -> dict[str, int]:
        """Watched packets that died, by the kernel's name of the reason."""
        totals = self._sums(self._drops)
        return {names.get(i, f"reason {i}"): count for i, count in enumerate(totals) if count}

    def _sums(self, opened: bpf_calls.Map) -> list[int]:
        words = struct.unpack(f"={opened.max_entries * opened.cpus}Q", opened.values())
        return [
            sum(words[i * opened.cpus : (i + 1) * opened.cpus]) for i in range(opened.max_entries)
        ]

    def pending(self) -> dict[int, int]:
        """Watched packets that wait in a slot, by watchlist index."""
        size = ctypes.sizeof(bpf_types.Slot)
        data = self._slots.values(4096)
        waiting: dict[int, int] = {}
        for offset in range(0, len(data), size):
            if not data[offset : offset + 8].strip(b"\0"):
                continue
            owner = struct.unpack_from("=Q", data, offset)[0]
            watchlist = owner >> bpf_types.OWNER_WATCHLIST_SHIFT
            if watchlist and owner & bpf_types.OWNER_STATE == bpf_types.SlotState.PENDING:
                waiting[watchlist] = waiting.get(watchlist, 0) + 1
        return waiting

    def identity(self, index: int) -> Identity:
        """The accounting identity of one watchlist."""
        return Identity(self.watchlist(index), self.pending().get(index, 0))
