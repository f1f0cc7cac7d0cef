# SPDX-License-Identifier: Apache-2.0
"""How figures are taken: variants in random order within each round, every round with its own baseline, medians over rounds.

A run also has to prove that it did what it is named for: all packets came through, and all of them ended where they
should in the counters. Otherwise it raises, and there is no figure.
"""

import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hostint_agent import classifier
from tests.bench.figure import Figure
from tests.bench.generator import Traffic
from tests.bench.node import WATCHLIST, Node, Programs, WrongCount, program_times, run_times

Say = Callable[[str], None]
PLAIN = "plain"
ANY = "any"
# a multiple of the numbers of flows, so that shares of watched packets come out even
PACKETS = 20_480
QUICK_PACKETS = 10_240
_WARM_UP = 4096
FLOW_WAYS = 4
_MOST_UNRESOLVED = 0.001


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to forward packets.

    `outcome` is the counter in which every watched packet of a run must end, ANY if it may be any one; `watched` is how
    many of the traffic's packets are watched, all or none by default.
    """

    name: str
    traffic: Traffic
    programs: Programs = "ours"
    image: classifier.Image | None = None
    policy: dict[str, int] = field(default_factory=dict)
    outcome: str | None = None
    watched: int | None = None

    @property
    def watched_tuples(self) -> int:
        """How many of the traffic's packets are watched."""
        if self.watched is not None:
            return self.watched
        return self.traffic.count if self.outcome else 0


def plain(traffic: Traffic, name: str = PLAIN) -> Variant:
    """The baseline: nothing attached."""
    return Variant(name, traffic, programs="none")


@dataclass(frozen=True, slots=True)
class Spread:
    """A median over rounds and the quartiles around it."""

    value: float
    low: float
    high: float
    rounds: int

    def scaled(self, factor: float, offset: float = 0.0) -> "Spread":
        """In other units."""
        return Spread(
            offset + self.value * factor,
            offset + self.low * factor,
            offset + self.high * factor,
            self.rounds,
        )

    def figure(self, key: str, what: str, unit: str, **more: object) -> Figure:
        """As a figure."""
        return Figure(
            key,
            what,
            self.value,
            unit,
            low=self.low,
            high=self.high,
            rounds=self.rounds,
            **more,  # type: ignore[arg-type]
        )


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0], len(values))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


class Samples:
    """ns a packet, by variant and round."""

    def __init__(self, values: dict[str, list[float]]) -> None:
        self.values = values

    def ns(self, name: str) -> Spread:
        """Total cost of a packet."""
        return spread(self.values[name])

    def added(self, name: str, baseline: str = PLAIN) -> Spread:
        """ns on top of the baseline of the same round."""
        return spread(self.differences(name, baseline))

    def added_ratio(self, name: str, baseline: str = PLAIN) -> Spread:
        """What is added, as a part of the baseline of the same round."""
        pairs = zip(self.values[name], self.values[baseline], strict=True)
        return spread([(value - base) / base for value, base in pairs])

    def ratio(self, name: str, other: str) -> Spread:
        """Total cost against total cost of the same round."""
        pairs = zip(self.values[name], self.values[other], strict=True)
        return spread([value / base for value, base in pairs])

    def differences(self, name: str, baseline: str = PLAIN) -> list[float]:
        """ns on top of the baseline, round by round."""
        return [a - b for a, b in zip(self.values[name], self.values[baseline], strict=True)]

    def growth(self, name: str, other: str, baseline: str = PLAIN) -> Spread:
        """What `name` adds to the baseline, divided by what `other` adds to the same baseline.

        From the differences between the two in each round, so that the baseline's noise is in the divisor only.
        """
        divisor = self.added(other, baseline).value
        return spread(self.differences(name, other)).scaled(1 / divisor, 1.0)


def measure(
    node: Node,
    groups: Sequence[Sequence[Variant]],
    rounds: int,
    packets: int = PACKETS,
    seed: int = 1,
) -> Samples:
    """Run every variant once a round, those of a group close together: they are compared with each other.

    Raises WrongCount.
    """
    shuffled = random.Random(seed)
    order = [list(group) for group in groups]
    values: dict[str, list[float]] = {variant.name: [] for group in groups for variant in group}
    for _ in range(rounds):
        shuffled.shuffle(order)
        for group in order:
            shuffled.shuffle(group)
            for variant in group:
                make_ready(node, variant)
                values[variant.name].append(checked_run(node, variant, packets))
    return Samples(values)


def make_ready(node: Node, variant: Variant) -> None:
    """Rules live, programs attached, and every flow seen, so that its first report is behind."""
    if variant.programs == "floor" and variant.image:
        node.commit_floor(variant.image)
    elif variant.image:
        node.commit(variant.image, **variant.policy)
    node.use(variant.programs)
    node.generators[0].send(variant.traffic)
    # a flow that finds its set full of others' may push out one of its own kind, that one the next, and so on
    rounds = 1 + FLOW_WAYS if variant.outcome and variant.outcome != ANY else 1
    for _ in range(-(-rounds * variant.traffic.count // _WARM_UP)):
        node.run(_WARM_UP)
        if variant.outcome:
            node.empty_rings()


def checked_run(
    node: Node, variant: Variant, packets: int, run: Callable[[int], float] | None = None
) -> float:
    """ns a packet of a run of `packets` in all, by the first generator if `run` does not say otherwise.

    Raises WrongCount if packets did not end where they should.
    """
    before = node.datapath.counters.watchlist(WATCHLIST)
    found = (run or node.run)(packets)
    after = node.datapath.counters.watchlist(WATCHLIST)
    check_counts(variant, packets, {name: after[name] - before[name] for name in after})
    return found


def check_counts(variant: Variant, packets: int, counted: dict[str, int]) -> None:
    """Whether the packets of a run ended where the variant says. Raises WrongCount.

    A few may be unresolved: of the 64 packets of a batch, two can have addresses that share a slot.
    """
    watched = variant.watched_tuples * packets // variant.traffic.count
    wanted = dict.fromkeys(counted, 0) | {"watched": watched}
    if variant.outcome == ANY:
        wanted = counted | {"watched": watched}
    elif variant.outcome:
        wanted["unresolved"] = min(counted["unresolved"], int(watched * _MOST_UNRESOLVED))
        wanted[variant.outcome] = watched - wanted["unresolved"]
    if counted != wanted:
        differing = {k: (counted[k], wanted[k]) for k in counted if counted[k] != wanted[k]}
        raise WrongCount(f"{variant.name}: counted and expected differ: {differing}")


def run_times_of(node: Node, variant: Variant, rounds: int, packets: int = PACKETS) -> list[float]:
    """ns that our two programs run for a packet, round after round, as the kernel counts it: reading the clock included.

    Raises WrongCount if they did not both see every packet.
    """
    make_ready(node, variant)
    with run_times():
        return [_run_time(node, variant, packets) for _ in range(rounds)]


def _run_time(node: Node, variant: Variant, packets: int) -> float:
    programs = [node.datapath.program(name) for name in ("ingress", "egress")]
    try:
        before = [program_times(program) for program in programs]
        checked_run(node, variant, packets)
        after = [program_times(program) for program in programs]
    finally:
        for program in programs:
            os.close(program)
    for (_, runs), (_, runs_after) in zip(before, after, strict=True):
        if runs_after - runs != packets:
            raise WrongCount(f"{variant.name}: {runs_after - runs} runs for {packets} packets")
    return sum(now - then for (now, _), (then, _) in zip(after, before, strict=True)) / packets
