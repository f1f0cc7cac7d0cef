# SPDX-License-Identifier: Apache-2.0
"""Gaps count as lost, late arrivals take their loss back, a new beginning is no loss."""

from hypothesis import given
from hypothesis import strategies as st

from hostint_collector import sequence


def tracker(*numbers: int) -> sequence.SequenceTracker:
    seen = sequence.SequenceTracker()
    for number in numbers:
        seen.see(number)
    return seen


def test_a_run_without_gaps_loses_nothing():
    assert tracker(1, 2, 3, 4).lost == 0


def test_a_gap_is_lost():
    assert tracker(1, 2, 5).lost == 2


def test_a_late_report_takes_its_loss_back():
    late = tracker(1, 2, 4, 3)
    assert (late.lost, late.reordered) == (0, 1)


def test_a_report_that_comes_twice_is_a_duplicate():
    twice = tracker(1, 2, 2, 3)
    assert (twice.lost, twice.duplicates) == (0, 1)


def test_the_number_wraps():
    assert tracker((1 << 32) - 1, 0, 1).lost == 0


def test_a_sender_that_begins_anew_is_not_lost():
    anew = tracker(500_000, 500_001, 1, 2)
    assert (anew.lost, anew.restarts) == (0, 1)


@given(st.permutations(range(40)), st.sets(st.integers(1, 38)))
def test_lost_is_what_never_came_in_whatever_order(order, dropped):
    seen = tracker(1_000_000, *(1_000_001 + n for n in order if n not in dropped), 1_000_041)
    assert seen.lost == len(dropped)
