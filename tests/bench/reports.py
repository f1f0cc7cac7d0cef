# SPDX-License-Identifier: Apache-2.0
"""What a report on every packet costs the forwarding path, two CPUs writing at once. Nothing is sent: the datapath alone."""

import contextlib
import ipaddress
import random

from hostint_agent import bpf_calls, bpf_types, classifier, loader
from tests.bench import measure, rule_sets
from tests.bench.figure import Figure
from tests.bench.generator import NotTogether, Traffic, traffic
from tests.bench.measure import PLAIN, Samples, Say, Variant
from tests.bench.node import EVERY_PACKET, WATCHLIST, WAYS_OUT, Node, node

TAKES_S = (2, 20)
_FLOWS = 16
_ROUNDS = (2, 40)
_ATTEMPTS = 20
_REPORTED = "every packet"


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    # what a ring holds, so that nobody has to empty it meanwhile, on one of the CPUs that are measured
    packets = min(measure.PACKETS, loader.ring_records(bpf_calls.possible_cpus()))
    with node() as made:
        cpus = len(made.generators)
        say(
            f"a report on every packet, {cpus} CPUs at once and one alone: {_ROUNDS[not quick]} rounds"
        )
        together = _measure(made, _ROUNDS[not quick], packets, cpus)
        alone = _measure(made, _ROUNDS[not quick], packets, 1)
    return _figures(together, alone, cpus)


def _figures(together: Samples, alone: Samples, cpus: int) -> list[Figure]:
    where = f"{cpus} CPUs at once" if cpus > 1 else "1 CPU: there is no other"
    base = f"{together.ns(PLAIN).value:.0f} ns/packet, plain forwarding, {where}"
    one = f"{alone.ns(PLAIN).value:.0f} ns/packet, plain forwarding, 1 CPU"
    return [
        together.added_ratio(_REPORTED).figure(
            "report_every_packet",
            "a report on every packet, added / plain forwarding",
            "ratio",
            compare="<=",
            goal=0.40,
            baseline=base,
        ),
        together.added(_REPORTED).figure(
            "report_every_packet_ns", "a report on every packet, added", "ns/packet", baseline=base
        ),
        alone.added(_REPORTED).figure(
            "report_every_packet_one_cpu_ns",
            "a report on every packet, one CPU alone, added",
            "ns/packet",
            baseline=one,
        ),
    ]


def _image() -> classifier.Image:
    """Watch all pods to the services behind either way out."""
    rule = classifier.Rule(
        rule_id=1,
        watchlist=WATCHLIST,
        action=bpf_types.RuleAction.REPORT,
        sources=(ipaddress.ip_network("10.244.0.0/16"),),
        destinations=tuple(ipaddress.ip_network(network) for network in WAYS_OUT),
    )
    return classifier.compile_rules([rule])


def _traffic(number: int) -> Traffic:
    """What one generator sends: pods of its own, to the services behind its way out."""
    return traffic(rule_sets.unwatched(_FLOWS, seed=number, services=WAYS_OUT[number]))


def _measure(made: Node, rounds: int, packets: int, cpus: int) -> Samples:
    sent = [_traffic(number) for number in range(cpus)]
    for made_by, packets_of_it in zip(made.generators, sent, strict=False):
        made_by.send(packets_of_it)
    made.commit(_image(), **EVERY_PACKET)
    variants = [
        measure.plain(sent[0]),
        Variant(_REPORTED, sent[0], outcome="reported"),
    ]
    values: dict[str, list[float]] = {variant.name: [] for variant in variants}
    order = random.Random(cpus)
    for _ in range(rounds):
        order.shuffle(variants)
        for variant in variants:
            made.use(variant.programs, cpus)
            values[variant.name].append(_run(made, variant, packets, cpus))
    return Samples(values)


def _run(made: Node, variant: Variant, packets: int, cpus: int) -> float:
    """One run, and again when something else had one of the CPUs for all of the time."""
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(NotTogether):
            return _try_run(made, variant, packets, cpus)
    return _try_run(made, variant, packets, cpus)


def _try_run(made: Node, variant: Variant, packets: int, cpus: int) -> float:
    """A shorter run to warm up, then one of which the rings, empty before, hold all reports."""
    run = made.run_together if cpus > 1 else made.run
    run(packets * cpus // 2)
    made.empty_rings()
    return measure.checked_run(made, variant, packets * cpus, run)
