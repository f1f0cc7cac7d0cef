# SPDX-License-Identifier: Apache-2.0
"""How figures are taken: variants in random order within each round, every round with its own baseline, medians over rounds.

A run also has to prove that it did what it is named for: all packets came through, and all of them ended where they
should in the counters. Otherwise it raises, and there is no figure.
"""

import contextlib
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hostint_agent import classifier
from tests.bench.figure import Figure
from tests.bench.generator import Traffic
from tests.bench.node import WATCHLIST, Node, WrongCount, program_times, run_times

Say = Callable[[str], None]
PLAIN = "plain"
# a multiple of the numbers of flows, so that shares of watched packets come out even
PACKETS = 51_200
QUICK_PACKETS = 20_480
_WARM_UP = 4096


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to forward. `outcome`: the counter in which every packet must end; None: no packet may be watched."""

    name: str
    traffic: Traffic
    programs: str = "ours"  # or "none", "empty"
    image: classifier.Image | None = None
    policy: dict[str, int] = field(default_factory=dict)
    outcome: str | None = None
    watched_share: float = 1.0


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
        return spread(self._differences(name, baseline))

    def added_ratio(self, name: str, baseline: str = PLAIN) -> Spread:
        """What is added, as a part of the baseline of the same round."""
        pairs = zip(self.values[name], self.values[baseline], strict=True)
        return spread([(value - base) / base for value, base in pairs])

    def _differences(self, name: str, baseline: str) -> list[float]:
        return [a - b for a, b in zip(self.values[name], self.values[baseline], strict=True)]

    def growth(self, name: str, other: str, baseline: str = PLAIN) -> Spread:
        """What `name` adds to the baseline, divided by what `other` adds to the same baseline.

        From the differences between the two in each round, so that the baseline's noise is in the divisor only.
        """
        divisor = self.added(other, baseline).value
        return spread(self._differences(name, other)).scaled(1 / divisor, 1.0)


def measure(
    node: Node, variants: Sequence[Variant], rounds: int, packets: int = PACKETS, seed: int = 1
) -> Samples:
    """Run every variant once a round. Raises WrongCount."""
    order, shuffled = list(variants), random.Random(seed)
    values: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        shuffled.shuffle(order)
        for variant in order:
            with ready(node, variant):
                values[variant.name].append(_checked_run(node, variant, packets))
    return Samples(values)


@contextlib.contextmanager
def ready(node: Node, variant: Variant):
    """Rules live, programs attached, every flow seen once."""
    if variant.image:
        node.commit(variant.image, **variant.policy)
    node.generators[0].send(variant.traffic)
    node.datapath.drain()  # room for the first report of each flow
    attach = {"none": contextlib.nullcontext, "empty": node.attached_empty, "ours": node.attached}
    with attach[variant.programs]():
        node.run(max(_WARM_UP, variant.traffic.count))
        yield


def _checked_run(node: Node, variant: Variant, packets: int) -> float:
    before = node.datapath.counters.watchlist(WATCHLIST)
    found = node.run(packets)
    after = node.datapath.counters.watchlist(WATCHLIST)
    check_counts(variant, packets, {name: after[name] - before[name] for name in after})
    return found


def check_counts(variant: Variant, packets: int, counted: dict[str, int]) -> None:
    """Whether the packets of a run ended where the variant says. Raises WrongCount."""
    wanted = dict.fromkeys(counted, 0)
    if variant.outcome:
        flows = variant.traffic.count
        watched = round(variant.watched_share * flows) * packets // flows
        wanted["watched"] = wanted[variant.outcome] = watched
    if counted != wanted:
        differing = {k: (counted[k], wanted[k]) for k in counted if counted[k] != wanted[k]}
        raise WrongCount(f"{variant.name}: counted and expected differ: {differing}")


def run_time(node: Node, variant: Variant, packets: int = PACKETS) -> float:
    """ns that our two programs run for a packet, as the kernel counts it (its own 2 x 20..60 ns included).

    Raises WrongCount if they did not both see every packet.
    """
    with run_times(), ready(node, variant):
        programs = [node.datapath.program(name) for name in ("ingress", "egress")]
        before = [program_times(program) for program in programs]
        _checked_run(node, variant, packets)
        total = 0.0
        for program, (ns, runs) in zip(programs, before, strict=True):
            now_ns, now_runs = program_times(program)
            if now_runs - runs != packets:
                raise WrongCount(f"{variant.name}: {now_runs - runs} runs for {packets} packets")
            total += (now_ns - ns) / packets
        return total
