# SPDX-License-Identifier: Apache-2.0
"""What sending reports costs: a ring is filled on one CPU and emptied on another, and every datagram is counted where it arrives.

The rate is what goes through when the producer waits for room. Costs and losses are taken at the rates that are the goals,
where the exporter sleeps between rounds and a report that finds no room is lost. `python -m tests.bench.export` runs this alone.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from tests.bench.export_rig import Rig, Run, rig
from tests.bench.figure import Figure
from tests.bench.measure import Say, spread

TAKES_S = (8, 45)
# a flow report: 28 bytes and what it has of the packet, which is 128, a TCP segment without data, or one with options
_SAME, _MIXED = (156,), (156, 82, 94)
_SAME_GOAL, _MIXED_GOAL = 1_000_000, 700_000
_CPU_GOAL_NS = 300
_ROUNDS = (1, 5)
_CUT_REPORTS = 200_000
_IDLE_S = (1.0, 3.0)


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    rounds = _ROUNDS[not quick]
    with rig() as made:
        say("an idle exporter")
        idle = made.idle_cpu_percent(_IDLE_S[not quick])
        same = _runs(made, "one length", _SAME, _SAME_GOAL, rounds, say)
        mixed = _runs(made, "three lengths", _MIXED, _MIXED_GOAL, rounds, say)
    with rig(cut=True) as made:
        say(f"batches cut by this host: {rounds} rounds")
        cut = [made.run(_CUT_REPORTS, 0, _SAME) for _ in range(rounds)]
    cut_rate = f"{spread([one.per_s for one in cut]).value:,.0f} reports/s"
    return [
        *_figures("same_length", "one length", same, _SAME_GOAL, _CPU_GOAL_NS),
        *_figures("mixed_lengths", "three lengths at random", mixed, _MIXED_GOAL, None),
        spread([one.cpu_ns for one in cut]).figure(
            "export_cut_cpu_ns",
            "exporter's CPU time, batches cut by this host",
            "ns/report",
            baseline=cut_rate,
        ),
        Figure("export_idle_cpu", "CPU that an idle exporter takes", idle, "% of a core"),
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class _Runs:
    """Runs as fast as they go, and runs at the rate that is the goal."""

    fast: list[Run]
    paced: list[Run]


def _runs(made: Rig, name: str, lengths: Sequence[int], rate: int, rounds: int, say: Say) -> _Runs:
    say(f"reports of {name}: {rounds} rounds as fast as they go, and at {rate:,} a second")
    found = _Runs([], [])
    for _ in range(rounds):
        found.fast.append(made.run(rate, 0, lengths))
        found.paced.append(made.run(rate, rate, lengths))
    return found


def _figures(
    key: str, what: str, runs: _Runs, rate_goal: int, cpu_goal_ns: int | None
) -> list[Figure]:
    cpu_goal = {"compare": "<=", "goal": cpu_goal_ns} if cpu_goal_ns else {}
    pace = f"at {rate_goal:,} reports/s"
    return [
        spread([one.per_s for one in runs.fast]).figure(
            f"export_{key}_per_s", f"reports sent, {what}", "/s", compare=">=", goal=rate_goal
        ),
        spread([one.cpu_ns for one in runs.paced]).figure(
            f"export_{key}_cpu_ns",
            f"exporter's CPU time, {what}",
            "ns/report",
            baseline=pace,
            **cpu_goal,
        ),
        spread([one.lost for one in runs.paced]).figure(
            f"export_{key}_lost",
            f"found the ring full, {what}",
            "reports",
            compare="==",
            goal=0,
            baseline=pace,
        ),
    ]


if __name__ == "__main__":
    asked = argparse.ArgumentParser(prog="python -m tests.bench.export", description=__doc__)
    asked.add_argument("--quick", action="store_true", help="one round instead of five")
    for figure in run(asked.parse_args().quick, print):
        goal = f"   (goal: {figure.compare} {figure.goal:,})" if figure.compare else ""
        print(f"{figure.key:32} {figure.value:14,.2f} {figure.unit:12} {figure.baseline}{goal}")
