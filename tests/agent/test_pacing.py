# SPDX-License-Identifier: Apache-2.0
"""How often the agent tries and looks, with a clock that the test turns."""

import pytest

from hostint_agent import pacing


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_tries_come_at_once_then_once_in_five_seconds():
    """A program that takes the first place each time costs two links in five seconds."""
    clock = Clock()
    tries = pacing.TokenBucket(clock)
    granted = 0
    for _ in range(2400):
        granted += tries.spend()
        clock.now += 0.25
    assert granted == 20 + int(599.75 / 5)
    clock.now += 3600
    assert [tries.spend() for _ in range(21)] == [True] * 20 + [False]


@pytest.mark.parametrize("look_s", [0.002, 0.02, 0.1])
def test_looks_take_a_share_of_a_core_while_changes_do_not_end(look_s):
    """And each change is looked at within half a second and the look."""
    clock = Clock()
    pace = pacing.Pace(clock)
    spent_s = 0.0
    while clock.now < 600:
        assert (waited_s := pace.gather_s()) <= 0.5
        clock.now += waited_s + look_s
        spent_s += look_s
        pace.spend(look_s)
    assert spent_s / clock.now <= max(0.055, look_s / (0.5 + look_s) + 0.002)
    clock.now += 60
    assert pace.gather_s() == min(max(4 * look_s, 0.02), 0.2)
