# SPDX-License-Identifier: Apache-2.0
"""How the cost of a packet grows with the number of rules: watched and unwatched packets, two kinds of rule sets."""

from collections.abc import Callable, Sequence

from hostint_agent import classifier
from tests.bench import measure, rule_sets
from tests.bench.figure import Figure
from tests.bench.generator import Traffic, traffic
from tests.bench.measure import PLAIN, Samples, Say, Variant
from tests.bench.node import NO_NEWS, node

TAKES_S = (5, 100)
SIZES = (0, 16, 64, 256, 1024, 4096, 10_000)
FEW, MANY = 64, 10_000
# a busy node's working set; the wide one is what no node has: each flow in a rule of its own
FLOWS, WIDE_FLOWS = 64, 1024
SETS: dict[str, Callable[[int], list[classifier.Rule]]] = {
    "mixed": rule_sets.mixed,
    "pods": rule_sets.pods_and_services,
}
SET_WORDS = {"mixed": "mixed rules", "pods": "pods x services"}
# the first is the one that the goal is named for: a fifth of the rules are broad, and packets match them
COMPARED = (
    ("", "watched", "mixed", "watched, mixed rules"),
    ("_watched_pods", "watched", "pods", "watched, pods x services"),
    ("_unwatched_mixed", "unwatched", "mixed", "unwatched, mixed rules"),
    ("_unwatched_pods", "unwatched", "pods", "unwatched, pods x services"),
    ("_wide", "watched", "wide", f"watched, mixed rules, {WIDE_FLOWS:,} flows"),
)
_ROUNDS = (1, 25)
_RUN_TIME_ROUNDS = (1, 5)


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    with node() as made:
        say(f"compiling sets of up to {MANY:,} rules")
        groups = _groups()
        variants = [variant for group in groups for variant in group]
        say(f"{len(variants)} combinations of rules and packets: {_ROUNDS[not quick]} rounds")
        packets = measure.QUICK_PACKETS if quick else measure.PACKETS
        samples = measure.measure(made, groups, _ROUNDS[not quick], packets)
        say("run times")
        times = {
            v.name: measure.run_times_of(made, v, _RUN_TIME_ROUNDS[not quick], packets)
            for v in variants
            if v.name.endswith((f"_{FEW}", f"_{MANY}"))
        }
    return [*_figures(samples, times), *_points(samples)]


def _groups() -> list[list[Variant]]:
    """Those of one kind of packets and rules, with a baseline of their own."""
    unwatched = traffic(rule_sets.unwatched(FLOWS))
    found: dict[tuple[str, str], list[Variant]] = {
        (kind, name): [measure.plain(unwatched, _plain(kind, name))]
        for _, kind, name, _ in COMPARED
    }
    for name, make in SETS.items():
        for size in SIZES:
            rules = make(size)
            image = classifier.compile_rules(rules)
            plain = Variant(key("unwatched", name, size), unwatched, image=image)
            found["unwatched", name].append(plain)
            if size:
                sent = traffic(rule_sets.watched(rules, FLOWS))
                found["watched", name].append(_watched(key("watched", name, size), sent, image))
            if name == "mixed" and size in (FEW, MANY):
                wide = traffic(rule_sets.watched(rules, WIDE_FLOWS))
                found["watched", "wide"].append(_watched(key("watched", "wide", size), wide, image))
    return list(found.values())


def _plain(kind: str, name: str) -> str:
    return f"{PLAIN}_{kind}_{name}"


def plain_key(kind: str, name: str) -> str:
    """Key of the figure that is the baseline of one kind of packets and rules."""
    return f"rules_{kind}_{name}_plain_ns"


def _watched(name: str, sent: Traffic, image: classifier.Image) -> Variant:
    return Variant(name, sent, image=image, policy=NO_NEWS, outcome="suppressed")


def key(kind: str, set_name: str, size: int) -> str:
    """Name of one combination."""
    return f"rules_{kind}_{set_name}_{size}"


def _figures(samples: Samples, times: dict[str, list[float]]) -> list[Figure]:
    found = []
    for suffix, kind, name, words in COMPARED:
        few, many = key(kind, name, FEW), key(kind, name, MANY)
        plain, goal = _plain(kind, name), {} if name == "wide" else {"compare": "<=", "goal": 1.10}
        found += [
            samples.growth(many, few, plain).figure(
                f"rules_10000_vs_64{suffix}",
                f"10,000 rules / 64, added: {words}",
                "ratio",
                baseline=f"{samples.added(few, plain).value:.0f} ns/packet added with {FEW} rules",
                **goal,
            ),
            samples.ratio(many, few).figure(
                f"rules_10000_vs_64{suffix}_total",
                f"  whole forwarding: {words}",
                "ratio",
                baseline=f"{samples.ns(few).value:.0f} ns/packet with {FEW} rules",
            ),
            _run_time_ratio(f"rules_10000_vs_64{suffix}_run_time", words, times[many], times[few]),
        ]
    return found


def _run_time_ratio(name: str, words: str, many: Sequence[float], few: Sequence[float]) -> Figure:
    base = measure.spread(few).value
    return (
        measure.spread(many)
        .scaled(1 / base)
        .figure(
            name,
            f"  run time of both programs: {words}",
            "ratio",
            baseline=f"{base:.0f} ns/packet with {FEW} rules",
        )
    )


def _points(samples: Samples) -> list[Figure]:
    found = []
    for _, kind, name, words in COMPARED:
        plain = _plain(kind, name)
        forwarding = samples.ns(plain)
        base = f"{forwarding.value:.0f} ns/packet, plain forwarding"
        found.append(
            forwarding.figure(
                plain_key(kind, name), f"plain forwarding: {words}", "ns/packet", shown=False
            )
        )
        found += [
            samples.added(key(kind, name, size), plain).figure(
                f"{key(kind, name, size)}_ns",
                f"{size} rules, added: {words}",
                "ns/packet",
                baseline=base,
                shown=False,
            )
            for size in SIZES
            if key(kind, name, size) in samples.values
        ]
    return found
