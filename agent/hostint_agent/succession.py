# SPDX-License-Identifier: Apache-2.0
"""What becomes of an older datapath when another takes its place: nothing that it had counted or had to report is lost.

Where both have the same maps there is nothing to do but to unpin the older programs. Otherwise the newer ones hold their reports
back until the older ones run no more. Then they go on with their sequence numbers, so that no collector sees a gap or a number
twice, and with what they had counted. Packets that were on their way through the host meanwhile are `unresolved`. What had been
reported of a flow is forgotten: every flow is reported anew.
"""

import contextlib
import ctypes
import struct
from collections.abc import Iterator, Mapping, Sequence
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
)

log = structlog.get_logger()


def predecessors(pin_dir: Path, directory: Path) -> list[Path]:
    """Builds that are pinned beside that in `directory`; one of them may still be attached."""
    return [build for build in loader.builds(pin_dir) if build != directory]


def begin(config: kernel.DatapathConfig, directory: Path, older: Sequence[Path]) -> None:
    """Before the programs in `directory` are attached: no reports yet, if there are others that report to other maps.

    And before anybody asks for counters: what a process that was killed had begun to take over is theirs. Raises OSError.
    """
    for build in (*older, directory):
        handover.finish(build)
    config.set_hold(any(not _share_maps(build, directory) for build in older))


def complete(
    config: kernel.DatapathConfig,
    directory: Path,
    older: Sequence[Path],
    sending: exporter.Exporter,
    destinations: Mapping[int, node_rules.Destination],
) -> None:
    """Once the programs in `directory` are attached everywhere: take over what is left of others, and unpin them. Raises OSError."""
    strangers = [build for build in older if not _share_maps(build, directory)]
    if strangers:
        bpf_calls.wait_for_programs()
    for build in older:
        strangers = [stranger for stranger in strangers if stranger != build]
        others = [directory, *strangers]
        # two that share their maps have counted everything once, and the last of them is asked
        if any(_share_maps(build, other) for other in others):
            loader.remove(build)
        else:
            _take_over(build, directory, sending, destinations)
        log.info("older datapath removed", build=build.name)
    config.set_hold(False)


def _share_maps(one: Path, other: Path) -> bool:
    """True if two builds pin the same maps: such that are only alike are others. Raises OSError."""
    pairs = [(pin, other / "maps" / pin.name) for pin in (one / "maps").glob("*")]
    return loader.have_same_maps(one, other) and any(
        bpf_calls.Map.open(pin).id == bpf_calls.Map.open(same).id
        for pin, same in pairs
        if same.exists()
    )


def _take_over(
    old: Path,
    directory: Path,
    sending: exporter.Exporter,
    destinations: Mapping[int, node_rules.Destination],
) -> None:
    """Have nothing be left of another build but what this one goes on with. Raises OSError."""
    old_maps, maps = old / "maps", directory / "maps"
    sent: Mapping[int, tuple[int, int]] = {}
    wanted: dict[str, list[bytes]] = {}
    with _telling(old, "reports"):
        sent = _empty(old_maps, destinations)
    with _telling(old, "sequence numbers"):
        _continue_sequences(old_maps, maps)
    with _telling(old, "counters"):
        wanted = counters.with_those_of(old_maps, maps)
    with sending.paused():
        wanted["export_counters"] = _added(sending.counters(), sent)
        handover.hand_over(old, directory, wanted)


@contextlib.contextmanager
def _telling(old: Path, what: str) -> Iterator[None]:
    """What an older version keeps in another way is lost, and nothing else is."""
    try:
        yield
    except (OSError, ValueError, struct.error) as error:
        log.warning("older datapath not taken over", build=old.name, what=what, error=str(error))


def _empty(
    old_maps: Path, destinations: Mapping[int, node_rules.Destination]
) -> Mapping[int, tuple[int, int]]:
    """Send what waits in another build's rings; what was sent of these in all. Raises OSError or ValueError."""
    left = exporter.Exporter(old_maps)
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
