# SPDX-License-Identifier: Apache-2.0
"""What becomes of an older datapath when another takes its place: nothing that it had counted or had to report is lost.

Where both have the same maps there is nothing to do but to unpin the older programs. Otherwise the newer ones hold their reports
back until the older ones run no more. Then they go on with their sequence numbers, so that no collector sees a gap or a number
twice, and with what they had counted. Packets that were on their way through the host meanwhile are `unresolved`. What had been
reported of a flow is forgotten: every flow is reported anew.
"""

import ctypes
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from hostint_agent import bpf_calls, counters, exporter, kernel, loader, node_rules

log = structlog.get_logger()


def predecessors(pin_dir: Path, directory: Path) -> list[Path]:
    """Builds that are pinned beside that in `directory`; one of them may still be attached."""
    return [build for build in loader.builds(pin_dir) if build != directory]


def begin(config: kernel.DatapathConfig, directory: Path, older: Sequence[Path]) -> None:
    """Before the programs in `directory` are attached: no reports yet, if there are others that report to other maps."""
    config.set_hold(any(not loader.have_same_maps(build, directory) for build in older))


def complete(
    config: kernel.DatapathConfig,
    directory: Path,
    older: Sequence[Path],
    sending: exporter.Exporter,
    destinations: Mapping[int, node_rules.Destination],
) -> None:
    """Once the programs in `directory` are attached everywhere: take over what is left of others, and unpin them. Raises OSError."""
    strangers = [build for build in older if not loader.have_same_maps(build, directory)]
    if strangers:
        bpf_calls.wait_for_programs()
    for build in older:
        if build in strangers:
            _take_over(build / "maps", directory / "maps", sending, destinations)
        loader.remove(build)
        log.info("older datapath removed", build=build.name)
    config.set_hold(False)


def _take_over(
    old_maps: Path,
    maps: Path,
    sending: exporter.Exporter,
    destinations: Mapping[int, node_rules.Destination],
) -> None:
    build = old_maps.parent.name
    try:
        left = exporter.Exporter(old_maps)
        left.set_destinations(destinations)
        left.stop()
        if any(left.fill()):
            log.warning("reports of the older datapath lost", build=build, reports=sum(left.fill()))
        sending.add(left.counters())
        counters.take_over(old_maps, maps)
        # last: what is kept in another way begins anew, and nothing else does
        _continue_sequences(old_maps, maps)
    except (OSError, ValueError) as error:
        log.warning("older datapath not taken over", build=build, error=str(error))


def _continue_sequences(old_maps: Path, maps: Path) -> None:
    """Number on from the older programs' reports. Raises OSError, or ValueError where the numbers are kept in another way."""
    old, new = (bpf_calls.Map.open(at / "sequences") for at in (old_maps, maps))
    if (old.max_entries, old.value_bytes) != (new.max_entries, new.value_bytes):
        raise ValueError("sequence numbers are kept in another way, and begin anew")
    memory = new.memory()
    numbers = (ctypes.c_uint64 * new.max_entries).from_buffer(memory)
    for index, taken in enumerate(struct.unpack(f"={old.max_entries}Q", old.values())):
        numbers[index] = max(numbers[index], taken)
