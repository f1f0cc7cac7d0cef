# SPDX-License-Identifier: Apache-2.0
"""What the datapath adds to forwarding a packet: unwatched, and watched without anything to report. 16 flows, one CPU."""

from hostint_agent import classifier
from tests.bench import measure, rule_sets
from tests.bench.figure import Figure
from tests.bench.generator import XDP_DROP, traffic
from tests.bench.measure import PLAIN, Say, Variant
from tests.bench.node import HOUR_NS, NO_NEWS, Node, node

TAKES_S = (8, 70)
FLOWS = 16
RULES = 64
_ROUNDS = (4, 80)


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    with node() as made:
        variants = _variants()
        say(f"{', '.join(v.name for v in variants)}: {_ROUNDS[not quick]} rounds")
        packets = measure.QUICK_PACKETS if quick else measure.PACKETS
        samples = measure.measure(made, [variants], _ROUNDS[not quick], packets)
        say("run times, and the generator alone")
        return [*_figures(samples), *_absolute(samples, made, variants, packets)]


def _variants() -> list[Variant]:
    rules = rule_sets.pods_and_services(RULES)
    sent = traffic(rule_sets.watched(rules, FLOWS))
    image = classifier.compile_rules(rules)
    others = classifier.compile_rules(rule_sets.pods_and_services(RULES, seed=2))
    return [
        measure.plain(sent),
        Variant("empty", sent, programs="empty"),
        Variant("clock", sent, programs="clock"),
        Variant("floor", sent, programs="floor", image=image),
        Variant("unwatched", sent, image=others),
        Variant("watched", sent, image=image, policy=NO_NEWS, outcome="suppressed"),
        Variant(
            "period only",
            sent,
            image=image,
            policy={"interval_ns": HOUR_NS},
            outcome="suppressed",
        ),
    ]


def _figures(samples: measure.Samples) -> list[Figure]:
    base = f"{samples.ns(PLAIN).value:.0f} ns/packet, plain forwarding"
    ratio = samples.added_ratio
    return [
        ratio("unwatched").figure(
            "forward_unwatched",
            "unwatched packet, added / plain forwarding",
            "ratio",
            compare="<=",
            goal=0.15,
            baseline=base,
        ),
        ratio("watched").figure(
            "forward_watched",
            "watched packet with no news, added / plain forwarding",
            "ratio",
            compare="<=",
            goal=0.20,
            baseline=base,
        ),
        ratio("floor").figure(
            "forward_floor",
            "the least it can cost: two clock readings, parsing and judging, added / plain forwarding",
            "ratio",
            baseline=base,
        ),
        measure.spread(
            [
                a / b
                for a, b in zip(
                    *(samples.differences(n) for n in ("watched", "floor")), strict=True
                )
            ]
        ).figure(
            "forward_watched_to_floor",
            "watched packet with no news, added / the least it can cost",
            "ratio",
            compare="<=",
            goal=1.25,
            baseline=f"{samples.added('floor').value:.0f} ns/packet, the least it can cost",
        ),
        ratio("period only").figure(
            "forward_watched_period_only",
            "the same without latencyChange, added / plain forwarding",
            "ratio",
            baseline=base,
        ),
        ratio("empty").figure(
            "forward_empty",
            "TCX programs that do nothing, added / plain forwarding",
            "ratio",
            baseline=base,
        ),
        ratio("clock").figure(
            "forward_clock",
            "TCX programs that read the clock, added / plain forwarding",
            "ratio",
            baseline=base,
        ),
    ]


def _absolute(
    samples: measure.Samples, made: Node, variants: list[Variant], packets: int
) -> list[Figure]:
    base = "plain forwarding"
    found = [
        samples.ns(PLAIN).figure("forward_plain_ns", "forwarding without programs", "ns/packet"),
        samples.added("unwatched").figure(
            "forward_unwatched_ns", "unwatched packet, added", "ns/packet", baseline=base
        ),
        samples.added("watched").figure(
            "forward_watched_ns", "watched packet with no news, added", "ns/packet", baseline=base
        ),
        samples.added("empty").figure(
            "forward_empty_ns", "TCX programs that do nothing, added", "ns/packet", baseline=base
        ),
    ]
    made.generators[0].send(variants[0].traffic)
    alone = [made.generators[0].run(packets, action=XDP_DROP) for _ in range(5)]
    found.append(
        measure.spread(alone).figure(
            "forward_generator_ns", "of which the generator itself", "ns/packet"
        )
    )
    for name in ("unwatched", "watched"):
        variant = next(v for v in variants if v.name == name)
        times = measure.spread(measure.run_times_of(made, variant, 5, packets))
        what = f"{name} packet, run time of both programs"
        found.append(times.figure(f"forward_{name}_run_time_ns", what, "ns/packet"))
    return found
