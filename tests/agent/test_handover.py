# SPDX-License-Identifier: Apache-2.0
"""Whoever is killed at whatever step of an upgrade, and whichever build is started next: everything is counted exactly once."""

import ctypes
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, bpf_types, counters, exporter, kernel, loader, succession
from tests.agent import rings
from tests.agent.rings import make_map
from tests.agent.test_succession import make, put, words
from tests.lab.test_crash import copy_pins
from tests.pins import pin_directory

pytestmark = pytest.mark.bpf
OLD, NEW, THIRD = "0" * 16, "1" * 16, "2" * 16
COLLECTOR = 3
_ARRAY, _MMAPABLE = 2, 1024
_STEPS = ("rename", "mkdir", "rmdir", "unlink")


class Killed(BaseException):
    """No handler of errors takes it for one."""


@pytest.fixture
def pins() -> Iterator[Path]:
    with pin_directory("handover") as directory:
        yield directory


def build(pins: Path, name: str) -> rings.Rings:
    """A build with all the maps that an agent has to do with in an upgrade."""
    maps = make(pins, name)
    (pins / name / "programs").mkdir()
    make_map(maps / "config", _ARRAY, ctypes.sizeof(bpf_types.Config), 1, _MMAPABLE)
    return rings.Rings(maps, 2)


def counted(made: rings.Rings, watched: int, reported: int) -> None:
    """Have it counted so much, and written and sent so many reports."""
    put(made.maps, "watchlist_counters", 1, words(watched=watched, reported=reported))
    put(made.maps, "carried_watchlist_counters", 1, words(watched=10, suppressed=10))
    put(made.maps, "datapath_counters", 4, (watched,))
    put(made.maps, "drop_counters", 80, (watched,))
    put(made.maps, "export_counters", COLLECTOR, (reported, 1))
    put(made.maps, "sequences", COLLECTOR, (reported,))


@dataclass(frozen=True)
class Counts:
    """What is counted in all."""

    watched: int
    reported: int
    slot_busy: int
    drops: int
    sent: int
    failed: int
    sequence: int


def counts(maps: Path) -> Counts:
    opened, sending = counters.Counters(maps), exporter.Exporter(maps)
    watchlist = opened.watchlist(1)
    key = struct.pack("=I", COLLECTOR)
    return Counts(
        watchlist["watched"],
        watchlist["reported"],
        opened.datapath()["slot_busy"],
        opened.drops({}).get("reason 80", 0),
        *sending.counters().get(COLLECTOR, (0, 0)),
        struct.unpack("=Q", bpf_calls.Map.open(maps / "sequences").lookup(key))[0],
    )


EXPECTED = Counts(
    watched=1000 + 100 + 2 * 10,
    reported=7 + 5,
    slot_busy=1100,
    drops=1100,
    sent=7 + 5 + 2,
    failed=2,
    sequence=9,
)


def start(pins: Path, name: str, to: rings.Receiver) -> None:
    """What an agent does that starts with this build: its programs are attached everywhere at once."""
    directory = pins / name
    loader.remove_remains(pins)
    if not directory.exists():
        build(pins, name)
    sending = exporter.Exporter(directory / "maps")
    sending.set_destinations({COLLECTOR: to.destination})
    following = succession.Succession(pins, directory, sending)
    assert following.go_on(lambda: None, {COLLECTOR: to.destination})
    sending.stop()


def hold(maps: Path) -> int:
    return bpf_types.Config.from_buffer_copy(
        bpf_calls.Map.open(maps / "config").lookup(bytes(4))
    ).hold


def killed_at(step: int, deed: Callable[[], None]) -> bool:
    """Do it, and be killed before a step: a bpf(2) command, or a change below the pin directory. False if it has fewer."""
    left = step

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def before(*arguments: object, **more: object) -> object:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            return function(*arguments, **more)

        return before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpf_calls, "bpf", dying(bpf_calls.bpf))
        for name in _STEPS:
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            deed()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("after", [NEW, OLD, THIRD], ids=["again", "back", "another"])
def test_an_upgrade_that_was_killed_at_any_step_counts_everything_once(pins, after):
    step, killed = 0, True
    # reports of several rounds go there, and nobody reads them
    with rings.Receiver() as receiver:
        while killed:
            first, second = build(pins, OLD), build(pins, NEW)
            counted(first, watched=1000, reported=7)
            counted(second, watched=100, reported=5)
            first.write(0, COLLECTOR)
            first.write(0, COLLECTOR)
            killed = killed_at(step, lambda: start(pins, NEW, receiver))
            start(pins, after, receiver)
            maps = pins / after / "maps"
            assert counts(maps) == EXPECTED, step
            assert hold(maps) == 0
            assert [path.name for path in pins.iterdir()] == [after], step
            assert sorted(path.name for path in (pins / after).iterdir()) == ["maps", "programs"]
            shutil.rmtree(pins / after)
            step += 1
    assert step > 50


def test_a_report_without_a_destination_is_counted_as_failed(pins):
    first, second = build(pins, OLD), build(pins, NEW)
    first.write(0, COLLECTOR)
    sending = exporter.Exporter(second.maps)
    assert succession.Succession(pins, pins / NEW, sending).go_on(lambda: None, {})
    assert sending.counters() == {COLLECTOR: (0, 1)}


def test_what_a_place_counted_for_another_watchlist_stays_behind(pins):
    """As where a node has lost its last good configuration."""
    first, second = build(pins, OLD), build(pins, NEW)
    counted(first, watched=1000, reported=7)
    counted(second, watched=100, reported=7)
    following = succession.Succession(pins, pins / NEW, exporter.Exporter(second.maps))
    following.watchlists_changed([1])
    assert following.go_on(lambda: None, {})
    assert counts(second.maps).watched == 100 + 10
    assert counts(second.maps).drops == 1000 + 100


def test_builds_that_share_their_maps_are_taken_over_as_one(pins):
    """An upgrade that only exchanges programs, killed, and then one to other maps."""
    first, second = build(pins, OLD), build(pins, NEW)
    counted(first, watched=1000, reported=7)
    counted(second, watched=100, reported=7)
    twin = pins / f"{OLD[:8]}{THIRD[8:]}"
    copy_pins(pins / OLD, twin)
    with rings.Receiver() as receiver:
        start(pins, NEW, receiver)
    assert counts(second.maps).watched == 1000 + 100 + 20
    assert counts(second.maps).sent == 14
    assert [path.name for path in pins.iterdir()] == [NEW]


def test_maps_that_are_only_alike_are_taken_over_as_others_are(pins):
    """As where a map of the older build had been removed by hand, so that the next one has its own."""
    alike = f"{OLD[:8]}{THIRD[8:]}"
    first, second = build(pins, OLD), build(pins, alike)
    counted(first, watched=1000, reported=7)
    counted(second, watched=100, reported=7)
    with rings.Receiver() as receiver:
        start(pins, alike, receiver)
    assert counts(second.maps).watched == 1000 + 100 + 20


def test_where_maps_are_shared_an_older_build_is_only_unpinned(pins):
    first = build(pins, OLD)
    counted(first, watched=1000, reported=7)
    twin = pins / f"{OLD[:8]}{THIRD[8:]}"
    copy_pins(pins / OLD, twin)
    before = counts(first.maps)
    with rings.Receiver() as receiver:
        start(pins, twin.name, receiver)
    assert counts(twin / "maps") == before
    assert [path.name for path in pins.iterdir()] == [twin.name]


def test_reports_that_a_killed_agent_held_back_are_not_held_back_by_the_next(pins):
    """Killed when the older build was gone and reports were still held back: nothing is left to wait for."""
    made = build(pins, NEW)
    kernel.DatapathConfig(made.maps).set_hold(True)
    assert hold(made.maps) == 1
    with rings.Receiver() as receiver:
        start(pins, NEW, receiver)
    assert hold(made.maps) == 0
