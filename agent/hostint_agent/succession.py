# SPDX-License-Identifier: Apache-2.0
"""What becomes of an older datapath when another takes its place: nothing that it had counted or had to report is lost.

Where both have the same maps there is nothing to do but to unpin the older programs: one that could not be exchanged counts where
its successor would. Otherwise the newer ones hold their reports back until the older ones run no more; those that could not be
exchanged are detached, since nobody would read what they count. Then the newer ones go on with their sequence numbers, so that no
collector sees a gap or a number twice, and with what they had counted. Packets that were on their way through the host meanwhile
are `unresolved`. What had been reported of a flow is forgotten: every flow is reported anew. What fails is tried again.
"""

import contextlib
import ctypes
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import structlog

from hostint_agent import (
    bpf_calls,
    bpf_types,
    counters,
    exporter,
    handover,
    kernel,
    loader,
    node_rules,
    senders,
)

log = structlog.get_logger()


class Succession:
    """The way from older builds to the one in `directory`; not complete before no program that reports to other maps runs."""

    def __init__(self, pin_dir: Path, directory: Path, sending: exporter.Exporter) -> None:
        """Begin: before any of the new programs is attached, and before anybody asks for counters. Raises OSError."""
        self._directory = directory
        self._config = kernel.DatapathConfig(directory / "maps")
        self._sending = sending
        self._older = [build for build in loader.builds(pin_dir) if build != directory]
        for build in (*self._older, directory):
            handover.finish(build)
        self._strangers = [b for b in self._older if not _share_maps(b, directory)]
        self._others_now: set[int] = set()
        # no reports yet, if there are others that report to other maps
        self._config.set_hold(bool(self._strangers))
        self.complete = not self._older
        self.error: str | None = None

    @property
    def hold(self) -> bool:
        """Whether the new programs hold their reports back."""
        return not self.complete and bool(self._strangers)

    def watchlists_changed(self, places: Iterable[int]) -> None:
        """These places belong to others now than with the older programs."""
        self._others_now.update(places)

    def go_on(
        self,
        detach_others: Callable[[], None],
        destinations: Mapping[int, node_rules.Destination],
    ) -> bool:
        """Complete it, once the new programs are attached wherever they can be. False: something failed, and is to be tried again."""
        try:
            self._go_on(detach_others, destinations)
        except OSError as error:
            if str(error) != self.error:
                self.error = str(error)
                log.warning("upgrade not completed, retrying", error=self.error)
            return False
        self.complete, self.error = True, None
        return True

    def _go_on(
        self,
        detach_others: Callable[[], None],
        destinations: Mapping[int, node_rules.Destination],
    ) -> None:
        handover.finish(self._directory)
        if self._strangers:
            detach_others()
            bpf_calls.wait_for_programs()
        for build in [build for build in self._older if build.exists()]:
            # two that share their maps have counted everything once, and the last of them is asked
            others = [s for s in self._strangers if s != build and s.exists()]
            if any(_share_maps(build, other) for other in (self._directory, *others)):
                loader.remove(build)
            else:
                self._take_over(build, destinations)
            log.info("older datapath removed", build=build.name)
        self._config.set_hold(False)

    def _take_over(self, old: Path, destinations: Mapping[int, node_rules.Destination]) -> None:
        """Have nothing be left of another build but what this one goes on with. Raises OSError."""
        old_maps, maps = old / "maps", self._directory / "maps"
        sent: Mapping[int, tuple[int, int]] = {}
        wanted: dict[str, list[bytes]] = {}
        with _telling(old, "reports"):
            sent = _empty(old_maps, destinations, self._sending.sockets)
        with _telling(old, "sequence numbers"):
            _continue_sequences(old_maps, maps)
        with _telling(old, "counters"):
            wanted = counters.with_those_of(old_maps, maps, self._others_now)
        with self._sending.paused():
            wanted["export_counters"] = _added(self._sending.counters(), sent)
            handover.hand_over(old, self._directory, wanted)


def _share_maps(one: Path, other: Path) -> bool:
    """True if two builds pin the same maps: such that are only alike are others. Raises OSError."""
    pairs = [(pin, other / "maps" / pin.name) for pin in (one / "maps").glob("*")]
    return loader.have_same_maps(one, other) and any(
        bpf_calls.Map.open(pin).id == bpf_calls.Map.open(same).id
        for pin, same in pairs
        if same.exists()
    )


@contextlib.contextmanager
def _telling(old: Path, what: str) -> Iterator[None]:
    """What an older version keeps in another way is lost, and nothing else is."""
    try:
        yield
    except (OSError, ValueError, struct.error) as error:
        log.warning("older datapath not taken over", build=old.name, what=what, error=str(error))


def _empty(
    old_maps: Path,
    destinations: Mapping[int, node_rules.Destination],
    sockets: senders.SendingSockets,
) -> Mapping[int, tuple[int, int]]:
    """Send what waits in another build's rings; what was sent of these in all. Raises OSError or ValueError."""
    left = exporter.Exporter(old_maps, sockets=sockets)
    left.set_destinations(destinations)
    left.empty()
    left.stop()
    return left.counters()


def _added(one: Mapping[int, tuple[int, int]], other: Mapping[int, tuple[int, int]]) -> list[bytes]:
    """Elements of export_counters: the sums of two."""
    none = (0, 0)
    return [
        bytes(
            bpf_types.ExportCounter(
                *map(sum, zip(one.get(i, none), other.get(i, none), strict=True))
            )
        )
        for i in range(bpf_types.MAX_COLLECTORS)
    ]


def _continue_sequences(old_maps: Path, maps: Path) -> None:
    """Number on from the older programs' reports. Raises OSError, or ValueError where the numbers are kept in another way."""
    old, new = (bpf_calls.Map.open(at / "sequences") for at in (old_maps, maps))
    if (old.max_entries, old.value_bytes) != (new.max_entries, new.value_bytes):
        raise ValueError("sequence numbers are kept in another way, and begin anew")
    memory = new.memory()
    numbers = (ctypes.c_uint64 * new.max_entries).from_buffer(memory)
    for index, taken in enumerate(struct.unpack(f"={old.max_entries}Q", old.values())):
        numbers[index] = max(numbers[index], taken)
