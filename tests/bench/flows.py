# SPDX-License-Identifier: Apache-2.0
"""How the cost of a packet grows with the number of flows that are under way at the same time."""

from hostint_agent import classifier
from tests.bench import measure, rule_sets
from tests.bench.figure import Figure
from tests.bench.generator import traffic
from tests.bench.measure import ANY, Samples, Say, Variant
from tests.bench.node import NO_NEWS, node

TAKES_S = (3, 45)
COUNTS = (16, 256, 4096, 60_000)
FEW, MANY = 16, 60_000
KINDS = ("unwatched", "watched")
_RULES = 64
_ROUNDS = (1, 25)


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    with node() as made:
        groups = [_variants(count) for count in COUNTS]
        say(
            f"plain, unwatched, watched; {', '.join(map(str, COUNTS))} flows: {_ROUNDS[not quick]} rounds"
        )
        # flows come one after the other, so that with 60,000 of them each is far out of the caches
        samples = measure.measure(made, groups, _ROUNDS[not quick])
    return [_goal(samples), _total(samples), *_points(samples)]


def _variants(count: int) -> list[Variant]:
    """Each number of flows has its own baseline: forwarding itself gets slower, too."""
    rules = rule_sets.pods_and_services(_RULES)
    image = classifier.compile_rules(rules)
    # a watched and an unwatched packet are equal to plain forwarding: it has no state per flow
    unwatched = traffic(rule_sets.unwatched(count))
    return [
        measure.plain(unwatched, f"plain_{count}"),
        Variant(f"unwatched_{count}", unwatched, image=image),
        Variant(
            f"watched_{count}",
            traffic(rule_sets.watched(rules, count)),
            image=image,
            policy=NO_NEWS,
            # of 60,000 flows in a table for 65,536, some push each other out and are reported again
            outcome="suppressed" if count < 10_000 else ANY,
        ),
    ]


def _added(samples: Samples, kind: str, count: int) -> measure.Spread:
    return samples.added(f"{kind}_{count}", f"plain_{count}")


def _goal(samples: Samples) -> Figure:
    few = _added(samples, "unwatched", FEW)
    many = _added(samples, "unwatched", MANY)
    return many.scaled(1 / few.value).figure(
        "flows_60000_vs_16",
        "unwatched packet: 60,000 flows / 16, added cost",
        "ratio",
        compare="<=",
        goal=1.6,
        baseline=f"{few.value:.0f} ns/packet added with 16 flows",
    )


def _total(samples: Samples) -> Figure:
    few, many = f"unwatched_{FEW}", f"unwatched_{MANY}"
    return samples.ratio(many, few).figure(
        "flows_60000_vs_16_total",
        "unwatched packet: 60,000 flows / 16, whole forwarding",
        "ratio",
        baseline=f"{samples.ns(few).value:.0f} ns/packet with 16 flows",
    )


def _points(samples: Samples) -> list[Figure]:
    found = []
    for count in COUNTS:
        plain = samples.ns(f"plain_{count}")
        found.append(
            plain.figure(f"flows_plain_{count}_ns", "plain forwarding", "ns/packet", shown=False)
        )
        found += [
            _added(samples, kind, count).figure(
                f"flows_{kind}_{count}_ns",
                f"{kind} packet, {count} flows, added",
                "ns/packet",
                baseline=f"{plain.value:.0f} ns/packet, plain forwarding",
                shown=False,
            )
            for kind in KINDS
        ]
    return found
