# SPDX-License-Identifier: Apache-2.0
"""Medians, pairs and counts: what turns runs into figures."""

import itertools
import random
import struct

import pytest

from tests.bench import generator, measure, results, rule_sets
from tests.bench.__main__ import Outcome, _arguments, _status
from tests.bench.figure import Figure
from tests.bench.generator import Tuple
from tests.bench.measure import Samples, Variant


def begins(*durations: int) -> list[int]:
    return list(itertools.accumulate(durations, initial=1000))


def test_a_batch_that_was_interrupted_is_no_part_of_the_cost():
    assert generator.ns_per_packet(begins(*[64 * 500] * 20, 10_000_000)) == 500


def test_of_two_generators_only_what_ran_at_the_same_time_counts():
    alone, together = [64 * 100] * 50, [64 * 300] * 50
    first = begins(*alone, *together)
    second = [first[50] + offset - 1000 for offset in begins(*together, *alone)]
    assert generator.ns_together([first, second]) == 300


def test_generators_that_did_not_meet_give_no_figure():
    with pytest.raises(generator.NotTogether, match="ran together for 0 batches"):
        generator.ns_together([begins(*[64] * 50), [t + 10**9 for t in begins(*[64] * 50)]])


def test_a_figure_is_the_median_of_paired_differences():
    samples = Samples({"plain": [100.0, 200.0, 1000.0], "ours": [110.0, 220.0, 1100.0]})
    assert samples.added("ours").value == 20
    assert samples.added_ratio("ours").value == pytest.approx(0.1)
    assert (samples.added("ours").low, samples.added("ours").high) == (15, 60)


def test_growth_is_the_difference_in_pairs_over_what_the_smaller_adds():
    samples = Samples({"plain": [100.0, 500.0], "few": [150.0, 550.0], "many": [175.0, 575.0]})
    assert samples.growth("many", "few").value == pytest.approx(1.5)
    assert samples.ratio("many", "few").value == pytest.approx((175 / 150 + 575 / 550) / 2)


COUNTERS = ("watched", "suppressed", "reported", "unverified", "unresolved")


def counted(**changed: int) -> dict[str, int]:
    return dict.fromkeys(COUNTERS, 0) | changed


def variant(outcome: str | None, watched: int | None = None, flows: int = 4) -> Variant:
    sent = generator.traffic(rule_sets.unwatched(flows))
    return Variant("tried", sent, outcome=outcome, watched=watched)


@pytest.mark.parametrize(
    ("tried", "found"),
    [
        (variant(None), counted(watched=1)),
        (variant("suppressed"), counted()),
        (variant("suppressed"), counted(watched=100, suppressed=99, unverified=1)),
        (variant("suppressed"), counted(watched=100, suppressed=94, unresolved=6)),
        (variant("suppressed"), counted(watched=100, reported=100)),
        (variant("suppressed", watched=1), counted(watched=100, suppressed=100)),
        (variant(measure.ANY), counted(watched=99)),
    ],
    ids=[
        "watched",
        "not watched",
        "lost",
        "unresolved",
        "reported",
        "all, not a quarter",
        "not all",
    ],
)
def test_packets_that_ended_elsewhere_give_no_figure(tried, found):
    with pytest.raises(measure.WrongCount, match="tried"):
        measure.check_counts(tried, 100, found)


@pytest.mark.parametrize(
    ("tried", "found"),
    [
        (variant(None), counted()),
        (variant("suppressed"), counted(watched=100, suppressed=100)),
        (variant("suppressed", watched=1), counted(watched=25, suppressed=25)),
        (variant(measure.ANY), counted(watched=100, reported=3, suppressed=97)),
    ],
    ids=["unwatched", "all", "a quarter", "any"],
)
def test_packets_that_ended_where_they_should_do(tried, found):
    measure.check_counts(tried, 100, found)


def test_one_packet_in_a_thousand_may_be_unresolved():
    tried = variant("suppressed")
    measure.check_counts(tried, 3000, counted(watched=3000, suppressed=2997, unresolved=3))
    with pytest.raises(measure.WrongCount, match="tried"):
        measure.check_counts(tried, 3000, counted(watched=3000, suppressed=2996, unresolved=4))


def test_the_checksum_of_every_packet_is_right():
    pick = random.Random(1)
    for _ in range(1000):
        packet = Tuple(pick.getrandbits(32), pick.getrandbits(32), 1, 2, pick.choice((6, 17)))
        total = sum(struct.unpack("!10H", generator.frame_of(packet)[14:34]))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        assert total == 0xFFFF


@pytest.mark.parametrize("make", [rule_sets.pods_and_services, rule_sets.mixed])
@pytest.mark.parametrize("size", [1, 16, 64, 1000])
def test_rule_sets_have_the_size_they_were_asked_for_and_are_the_same_again(make, size):
    assert len(make(size)) == size
    assert make(size) == make(size)


def test_interleaved_packets_are_evenly_mixed():
    some, others = rule_sets.unwatched(4, seed=1), rule_sets.unwatched(12, seed=2)
    mixed = rule_sets.interleaved(some, others)
    assert [packet in some for packet in mixed] == [False, False, False, True] * 4
    assert sorted(map(str, mixed)) == sorted(map(str, some + others))


def figure(value: float, **more) -> Figure:
    return Figure("a_key", "what it is", value, "ns", **more)


@pytest.mark.parametrize(
    ("check", "value", "failed", "status"),
    [
        (False, 9.0, {}, 0),
        (True, 9.0, {}, 1),
        (True, 1.0, {}, 0),
        (False, 1.0, {"rules": "OSError: no"}, 1),
    ],
    ids=["missed", "missed, checked", "reached, checked", "could not run"],
)
def test_the_exit_status_tells_what_could_not_run_and_if_asked_what_was_missed(
    check, value, failed, status
):
    found = Outcome([figure(value, compare="<=", goal=2.0)], failed)
    assert _status(found, check) == status


def test_a_bench_that_does_not_exist_is_named_with_those_that_do(capsys):
    with pytest.raises(SystemExit) as ended:
        _arguments(["--only", "forwarding,typo"])
    assert ended.value.code == 2
    assert "no bench 'typo'; there are forwarding, delivery, rules" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (1234.5, "1,234"),
        (3.0, "3"),
        (1e6, "1,000,000"),
    ],
)
def test_numbers_have_as_many_digits_as_say_something(value, text):
    assert results.number(value) == text
