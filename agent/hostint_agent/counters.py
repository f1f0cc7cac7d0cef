# SPDX-License-Identifier: Apache-2.0
"""Read the programs' counters, summed over CPUs, and check that they add up."""

import collections
import ctypes
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
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
_CARRIED = (
    "carried_watchlist_counters",
    "carried_datapath_counters",
    "carried_drop_counters",
)
# What the kernel prints for an address that has no symbol begins like this, and must not be shown.
_NO_SYMBOL = "0x"
_UNKNOWN_FUNCTION = "unknown"
_MASK64 = (1 << 64) - 1
_SLOT_WORDS = ctypes.sizeof(bpf_types.Slot) // 8
# of a slot's owner, all but the address of the packet
_STATE_AND_WATCHLIST = _MASK64 & ~bpf_types.OWNER_ADDRESS


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


@dataclass(frozen=True, slots=True)
class Slots:
    """How many slots there are by state, and how many watched packets wait in one, by watchlist index."""

    states: Mapping[str, int]
    pending: Mapping[int, int]


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
        self._functions = bpf_calls.Map.open(maps / "drop_functions")
        self._slots = bpf_calls.Map.open(maps / "slots")
        self._carried, self._carried_datapath, self._carried_drops = (
            bpf_calls.Map.open(maps / name) for name in _CARRIED
        )

    def watchlist(self, index: int) -> dict[str, int]:
        """All counters of one watchlist, summed over CPUs and kinds of programs, those of replaced datapaths included."""
        size = self._watchlists.stride
        words = [
            struct.unpack_from(f"={len(WATCHLIST_FIELDS)}Q", raw, cpu * size)
            for raw in map(self._watchlists.lookup, _places(index))
            for cpu in range(self._watchlists.cpus)
        ]
        carried = self._carried.lookup(struct.pack("=I", index))
        words.append(struct.unpack(f"={len(WATCHLIST_FIELDS)}Q", carried))
        return {
            name: _signed(sum(cpu[position] for cpu in words))
            for position, name in enumerate(WATCHLIST_FIELDS)
        }

    def reset(self, indexes: Iterable[int]) -> None:
        """Begin at zero: the place belongs to another watchlist now."""
        zeros = bytes(self._watchlists.stride * self._watchlists.cpus)
        for index in indexes:
            for key in _places(index):
                self._watchlists.update(key, zeros)
            self._carried.update(struct.pack("=I", index), bytes(self._carried.stride))

    def datapath(self) -> dict[str, int]:
        """Counters of the programs as a whole, by name in lower case."""
        totals = _sums(self._datapath, self._carried_datapath)
        return {counter.name.lower(): totals[counter] for counter in bpf_types.DatapathCounter}

    def drops(self, names: Mapping[int, str]) -> dict[str, int]:
        """Watched packets that died, by the kernel's name of the reason."""
        totals = _sums(self._drops, self._carried_drops)
        return {_reason_name(names, i): count for i, count in enumerate(totals) if count}

    def drop_functions(self, names: Mapping[int, str]) -> dict[str, dict[str, int]]:
        """Return drops by kernel function, by the kernel's name of the reason.

        Only of reasons that do not say why, and since this datapath was loaded.
        Raises bpf_calls.BpfError.
        """
        found: dict[str, dict[str, int]] = {}
        for key in list(self._functions.keys()):
            index = bpf_types.DropSite.from_buffer_copy(key).reason
            function, count = _drop_function(self._functions, self._functions.lookup(key))
            if count:  # else its first drop is about to be counted
                functions = found.setdefault(_reason_name(names, index), {})
                functions[function] = functions.get(function, 0) + count
        return found

    def slots(self) -> Slots:
        """All slots as they are now, one after the other. Raises bpf_calls.BpfError."""
        words = memoryview(self._slots.values(4096)).cast("Q")
        owners = words[::_SLOT_WORDS].tolist()
        kinds = collections.Counter(owner & _STATE_AND_WATCHLIST for owner in owners)
        states = {state.name.lower(): 0 for state in bpf_types.SlotState}
        pending = {}
        for kind, count in kinds.items():
            state = bpf_types.SlotState(kind & bpf_types.OWNER_STATE)
            watchlist = kind >> bpf_types.OWNER_WATCHLIST_SHIFT
            states[state.name.lower()] += count
            if watchlist and state == bpf_types.SlotState.PENDING:
                pending[watchlist] = count
        return Slots(states, pending)

    def identity(self, index: int) -> Identity:
        """The accounting identity of one watchlist."""
        return Identity(self.watchlist(index), self.slots().pending.get(index, 0))


def _reason_name(names: Mapping[int, str], index: int) -> str:
    return names.get(index, f"reason {index}")


def _drop_function(opened: bpf_calls.Map, raw: bytes) -> tuple[str, int]:
    """Return (function, drops on all CPUs) of one element of drop_functions."""
    places = range(0, opened.cpus * opened.stride, opened.stride)
    by_cpu = [bpf_types.DropFunction.from_buffer_copy(raw, place) for place in places]
    symbol = max(each.name for each in by_cpu).decode()
    return function_name(symbol), sum(each.count for each in by_cpu)


def function_name(symbol: str) -> str:
    """Return the function of a symbol, or "unknown".

    `symbol` is what the kernel formats: "ip_rcv_core.isra.0+0x1d/0x2c0", with " [module]" behind it
    if it is a module's. An address that has no symbol is not shown: it would help attackers.
    """
    if not symbol or symbol.startswith(_NO_SYMBOL):
        return _UNKNOWN_FUNCTION
    # The compiler appends .isra.0, .constprop.0, .part.0 and .cold to names of functions.
    return symbol.partition("+")[0].partition(".")[0]


def _sums(*opened: bpf_calls.Map) -> list[int]:
    """Sums over CPUs and maps of what is counted in maps of single words, by index."""
    totals = [0] * max(each.max_entries for each in opened)
    for each in opened:
        words = struct.unpack(f"={each.max_entries * each.cpus}Q", each.values())
        for index in range(each.max_entries):
            totals[index] += sum(words[index * each.cpus : (index + 1) * each.cpus])
    return totals


def with_those_of(
    old_maps: Path, maps: Path, without: Collection[int] = ()
) -> dict[str, list[bytes]]:
    """Elements of this build's carried maps once they hold as well what the programs of another build have counted, by map.

    For when these run no more: packets that were waiting for their outcome then will not get one from anybody, and are unresolved.
    `without`: places of watchlists that are others in that build. Raises bpf_calls.BpfError.
    """
    more = {}
    for index, counts in _totals(old_maps).items():
        counts["unresolved"] += counts["watched"] - sum(counts[name] for name in _OUTCOMES)
        if index not in without:
            more[index] = [counts[name] for name in WATCHLIST_FIELDS]
    wanted = {_CARRIED[0]: _added(maps / _CARRIED[0], more)}
    for name, carried in zip(("datapath_counters", "drop_counters"), _CARRIED[1:], strict=True):
        sums = enumerate(_sums(*_of(old_maps, name)))
        wanted[carried] = _added(maps / carried, {index: [count] for index, count in sums})
    return wanted


def _added(pin: Path, more: Mapping[int, Sequence[int]]) -> list[bytes]:
    """Elements of a map with numbers added to the words of some; of those that it does not have, none."""
    elements = list(bpf_calls.Map.open(pin).elements())
    for index, numbers in more.items():
        if index < len(elements):
            words = struct.unpack(f"={len(numbers)}Q", elements[index])
            sums = [(word + number) & _MASK64 for word, number in zip(words, numbers, strict=True)]
            elements[index] = struct.pack(f"={len(sums)}Q", *sums)
    return elements


def _of(maps: Path, name: str) -> list[bpf_calls.Map]:
    """The map and that of what it had taken over itself; an older version may lack the second."""
    pins = [maps / name, maps / f"carried_{name}"]
    return [bpf_calls.Map.open(pin) for pin in pins if pin.exists()]


def _totals(maps: Path) -> dict[int, dict[str, int]]:
    """Counters of each watchlist that has any; versions differ in how many of the fields they have."""
    totals: dict[int, dict[str, int]] = {}
    for opened in _of(maps, "watchlist_counters"):
        fields = WATCHLIST_FIELDS[: opened.value_bytes // 8]
        for place, raw in enumerate(opened.elements()):
            if not any(raw):
                continue
            empty = dict.fromkeys(WATCHLIST_FIELDS, 0)
            counts = totals.setdefault(place % bpf_types.MAX_WATCHLISTS, empty)
            for cpu in range(opened.cpus):
                words = struct.unpack_from(f"={len(fields)}Q", raw, cpu * opened.stride)
                for name, count in zip(fields, words, strict=True):
                    counts[name] += _signed(count)
    return totals
