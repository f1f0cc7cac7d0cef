# SPDX-License-Identifier: Apache-2.0
"""What a datapath had counted is counted on by the one that replaces it, whichever of the two has more counters."""

import ctypes
import struct
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, bpf_types, counters, handover
from tests.agent.rings import make_map
from tests.pins import pin_directory

pytestmark = pytest.mark.bpf
FIELDS = counters.WATCHLIST_FIELDS
NUMBERS = bpf_types.NR_DATAPATH_COUNTERS
USERS = bpf_types.NR_COUNTER_USERS * bpf_types.MAX_WATCHLISTS
_ARRAY, _PERCPU_HASH, _PERCPU_ARRAY = 2, 5, 6


@pytest.fixture
def pins():
    with pin_directory("succession") as directory:
        yield directory


def make(pins: Path, name: str, fields: int = len(FIELDS), numbers: int = NUMBERS) -> Path:
    """The maps of a datapath whose watchlists have so many counters, and that has so many of its own."""
    maps = pins / name / "maps"
    maps.mkdir(parents=True)
    shapes = {
        "watchlist_counters": (_PERCPU_ARRAY, 8 * fields, USERS),
        "datapath_counters": (_PERCPU_ARRAY, 8, numbers),
        "drop_counters": (_PERCPU_ARRAY, 8, bpf_types.DROP_REASONS),
        "carried_watchlist_counters": (_ARRAY, 8 * fields, bpf_types.MAX_WATCHLISTS),
        "carried_datapath_counters": (_ARRAY, 8, numbers),
        "carried_drop_counters": (_ARRAY, 8, bpf_types.DROP_REASONS),
        "slots": (_ARRAY, 64, 16),
    }
    for map_name, shape in shapes.items():
        make_map(maps / map_name, *shape)
    kind, value_bytes = _PERCPU_HASH, ctypes.sizeof(bpf_types.DropFunction)
    key_bytes = ctypes.sizeof(bpf_types.DropSite)
    make_map(maps / "drop_functions", kind, value_bytes, 16, key_bytes=key_bytes)
    return maps


def put(maps: Path, name: str, index: int, *per_cpu: tuple[int, ...]) -> None:
    """Words of one element, for each CPU; what is not given is 0."""
    opened = bpf_calls.Map.open(maps / name)
    value = b"".join(
        struct.pack(f"={len(words)}q", *words).ljust(opened.stride, b"\0") for words in per_cpu
    )
    opened.update(struct.pack("=I", index), value.ljust(opened.stride * opened.cpus, b"\0"))


def take_over(old: Path, new: Path, without: tuple[int, ...] = ()) -> None:
    handover.hand_over(old.parent, new.parent, counters.with_those_of(old, new, without))


def words(**fields: int) -> tuple[int, ...]:
    return tuple(fields.get(name, 0) for name in FIELDS)


def test_counters_of_all_cpus_and_programs_go_over_and_what_waited_is_unresolved(pins):
    old, new = make(pins, "old"), make(pins, "new")
    put(
        old,
        "watchlist_counters",
        3,
        words(watched=100, reported=7),
        words(watched=-1, suppressed=80),
    )
    put(old, "watchlist_counters", 256 + 3, words(watched=2, dropped=5, drops_reported=5))
    put(old, "datapath_counters", 4, (6,), (1,))
    put(old, "drop_counters", 80, (5,))
    put(new, "watchlist_counters", 3, words(watched=10, suppressed=9))
    put(new, "datapath_counters", 4, (1,))
    take_over(old, new)
    found = counters.Counters(new)
    after = found.identity(3)
    assert after.counters["watched"] == 111
    assert after.counters["unresolved"] == 101 - 7 - 80 - 5
    assert (after.counters["suppressed"], after.counters["dropped"]) == (89, 5)
    # what the new programs have not decided yet is as it was
    assert after.watched_difference == 1
    assert found.datapath()["slot_busy"] == 8
    assert found.drops({80: "NETFILTER_DROP"}) == {"NETFILTER_DROP": 5}
    assert found.watchlist(4)["watched"] == 0


def test_a_second_upgrade_takes_over_what_the_first_had_taken_over(pins):
    first, second, third = (make(pins, name) for name in ("first", "second", "third"))
    put(first, "watchlist_counters", 1, words(watched=10, suppressed=10))
    put(first, "drop_counters", 2, (3,))
    take_over(first, second)
    put(second, "watchlist_counters", 1, words(watched=5, suppressed=5))
    take_over(second, third)
    assert counters.Counters(third).watchlist(1)["watched"] == 15
    assert counters.Counters(third).drops({2: "NO_SOCKET"}) == {"NO_SOCKET": 3}
    assert [path.name for path in pins.iterdir()] == ["third"]


def test_what_a_place_counted_for_another_watchlist_is_not_taken_over(pins):
    old, new = make(pins, "old"), make(pins, "new")
    for index in (1, 2):
        put(old, "watchlist_counters", index, words(watched=10, suppressed=10))
    take_over(old, new, without=(2,))
    found = counters.Counters(new)
    assert [found.watchlist(index)["watched"] for index in (1, 2)] == [10, 0]


@pytest.mark.parametrize(("fields", "numbers"), [(15, 7), (20, 12)], ids=["fewer", "more"])
def test_a_version_with_other_numbers_of_counters_gives_those_that_both_have(pins, fields, numbers):
    old, new = make(pins, "old", fields, numbers), make(pins, "new")
    given = (*words(watched=50, suppressed=50), 1, 2, 3)[:fields]
    put(old, "watchlist_counters", 1, given)
    put(old, "datapath_counters", 6, (4,))
    put(old, "datapath_counters", numbers - 1, (4,))
    take_over(old, new)
    after = counters.Counters(new).watchlist(1)
    assert (after["watched"], after["suppressed"], after["unresolved"]) == (50, 50, 0)
    assert counters.Counters(new).datapath()["drop_evicted"] == 4


def test_a_watchlist_that_is_another_one_now_begins_at_zero(pins):
    old, new = make(pins, "old"), make(pins, "new")
    put(old, "watchlist_counters", 1, words(watched=50, suppressed=50))
    take_over(old, new)
    opened = counters.Counters(new)
    assert opened.watchlist(1)["watched"] == 50
    opened.reset([1])
    assert not any(opened.watchlist(1).values())


def test_packet_in_a_slot_is_pending_for_its_watchlist(pins):
    maps = make(pins, "only")
    put(maps, "watchlist_counters", 3, words(watched=6, reported=3))
    slots, states = bpf_calls.Map.open(maps / "slots"), bpf_types.SlotState
    owners = [(states.PENDING, 3)] * 2 + [(states.PENDING, 4), (states.EGRESSED, 3)]
    for index, (state, watchlist) in enumerate(owners):
        owner = 0x1000 | state | watchlist << bpf_types.OWNER_WATCHLIST_SHIFT
        slots.update(struct.pack("=I", index), struct.pack("=Q56x", owner))
    found = counters.Counters(maps)
    assert found.slots().pending == {3: 2, 4: 1}
    assert found.identity(3).pending == 2
    assert found.identity(3).watched_difference == 1


def test_drops_behind_the_egress_hook_are_drops_of_the_identity(pins):
    maps = make(pins, "only")
    counted = words(dropped=2, dropped_late=3, drops_reported=4)
    put(maps, "watchlist_counters", 3, counted)
    assert counters.Counters(maps).identity(3).drops_difference == 1


def test_a_sum_of_which_one_cpu_counted_down_is_below_zero(pins):
    """As it can be read while packets are on their way; 2^64 - 1 it never is."""
    maps = make(pins, "only")
    put(maps, "watchlist_counters", 3, words(watched=-2), words(watched=1))
    assert counters.Counters(maps).watchlist(3)["watched"] == -1


def test_an_older_version_without_carried_counters_can_be_taken_over(pins):
    old, new = make(pins, "old"), make(pins, "new")
    for pin in list(old.iterdir()):
        if pin.name.startswith("carried"):
            pin.unlink()
    put(old, "watchlist_counters", 1, words(watched=50, suppressed=50))
    take_over(old, new)
    assert counters.Counters(new).watchlist(1)["watched"] == 50
