# SPDX-License-Identifier: Apache-2.0
"""What a packet costs on average when a part of all packets is watched. 256 flows, evenly mixed. For the plot."""

from hostint_agent import classifier
from tests.bench import measure, rule_sets
from tests.bench.figure import Figure
from tests.bench.generator import traffic
from tests.bench.measure import PLAIN, Say, Variant
from tests.bench.node import NO_NEWS, node

TAKES_S = (2, 25)
PERCENT = (0, 12.5, 25, 50, 75, 100)
_FLOWS = 256
_RULES = 64
_ROUNDS = (1, 25)


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    with node() as made:
        variants = _variants()
        shares = ", ".join(f"{percent:g}" for percent in PERCENT)
        say(f"{shares} % watched: {_ROUNDS[not quick]} rounds")
        packets = measure.QUICK_PACKETS if quick else measure.PACKETS
        samples = measure.measure(made, [variants], _ROUNDS[not quick], packets)
    base = f"{samples.ns(PLAIN).value:.0f} ns/packet, plain forwarding"
    points = [
        samples.added(_name(percent)).figure(
            f"{_name(percent)}_ns",
            f"{percent:g} % of packets watched, added",
            "ns/packet",
            baseline=base,
            shown=False,
        )
        for percent in PERCENT
    ]
    plain = samples.ns(PLAIN).figure("share_plain_ns", "plain forwarding", "ns/packet", shown=False)
    return [plain, *points]


def _name(percent: float) -> str:
    return f"share_{percent:g}".replace(".", "_")


def key(percent: float) -> str:
    """Key of the figure of one share."""
    return f"{_name(percent)}_ns"


def _variants() -> list[Variant]:
    rules = rule_sets.pods_and_services(_RULES)
    image = classifier.compile_rules(rules)
    found = [measure.plain(traffic(rule_sets.unwatched(_FLOWS)))]
    for percent in PERCENT:
        watched = int(_FLOWS * percent / 100)
        packets = rule_sets.interleaved(
            rule_sets.watched(rules, watched), rule_sets.unwatched(_FLOWS - watched)
        )
        found.append(
            Variant(
                _name(percent),
                traffic(packets),
                image=image,
                policy=NO_NEWS,
                outcome="suppressed",
                watched=watched,
            )
        )
    return found
