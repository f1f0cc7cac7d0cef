# SPDX-License-Identifier: Apache-2.0
"""Rule sets as clusters have them, and packets that they watch or do not. The same on every run."""

import ipaddress
import random
from collections.abc import Sequence

from hostint_agent import bpf_types, classifier
from tests.bench.generator import TCP, UDP, Tuple
from tests.bench.node import WATCHLIST

PODS = int(ipaddress.IPv4Address("10.244.0.0"))
SERVICES = int(ipaddress.IPv4Address("10.96.0.0"))
NODES = int(ipaddress.IPv4Address("10.0.0.0"))
_SERVICE_PORTS = (80, 443, 5432, 6379, 8080, 9090)
_DNS = SERVICES + 10
# rules name even addresses, unwatched packets have odd ones: neighbours, so that telling them apart takes the whole way
_EVEN = range(2, 1 << 16, 2)
_NAMESPACES = 64
# odd addresses outside the networks of the namespaces that `mixed` names
_ODD = range((_NAMESPACES << 8) + 1, 1 << 16, 2)


def _host(address: int) -> classifier.Network:
    return ipaddress.IPv4Network((address, 32))


def _slash24(base: int, number: int) -> classifier.Network:
    return ipaddress.IPv4Network((base + (number << 8), 24))


def _rule(
    number: int,
    source: classifier.Network | None,
    destination: classifier.Network | None,
    protocol: int,
    port: int | None,
) -> classifier.Rule:
    return classifier.Rule(
        rule_id=number + 1,
        watchlist=WATCHLIST,
        action=bpf_types.RuleAction.REPORT,
        protocol=protocol,
        sources=(source,) if source else (),
        destinations=(destination,) if destination else (),
        destination_ports=((port, port),) if port else (),
    )


def pods_and_services(count: int, seed: int = 1) -> list[classifier.Rule]:
    """Every one of some pods to every one of some services: addresses and a port, nothing broad."""
    pick = random.Random(seed)
    side = max(1, int(count**0.5))
    pods = pick.sample(_EVEN, side)
    services = pick.sample(_EVEN, -(-count // side) if count else 0)
    ports = [pick.choice(_SERVICE_PORTS) for _ in services]
    return [
        _rule(
            n,
            _host(PODS + pods[n % side]),
            _host(SERVICES + services[n // side]),
            TCP,
            ports[n // side],
        )
        for n in range(count)
    ]


def mixed(count: int, seed: int = 1) -> list[classifier.Rule]:
    """What the selectors of a cluster come to: pods, services, a fifth of broader rules, and one that has no source."""
    pick = random.Random(seed)
    pods = [_host(PODS + n) for n in pick.sample(_EVEN, max(4, count // 8))]
    services = [_host(SERVICES + n) for n in pick.sample(_EVEN, max(4, count // 20))]
    spaces = [_slash24(PODS, n) for n in range(_NAMESPACES)]
    nodes = [_slash24(NODES, n) for n in range(_NAMESPACES)]
    kinds = ((pods, services), (pods, pods), (pods, spaces), (spaces, services), (spaces, nodes))
    rules = [_rule(0, None, _host(_DNS), UDP, 53)][:count]
    while len(rules) < count:
        sources, destinations = pick.choices(kinds, weights=(50, 28, 8, 8, 6))[0]
        protocol = pick.choice((TCP, TCP, UDP))
        port = pick.choice((*_SERVICE_PORTS, None))
        rules.append(
            _rule(len(rules), pick.choice(sources), pick.choice(destinations), protocol, port)
        )
    return rules


def _inside(pick: random.Random, networks: Sequence[classifier.Network], other: int) -> int:
    if not networks:
        return other + pick.choice(_EVEN)
    network = pick.choice(networks)
    return int(network.network_address) + pick.randrange(network.num_addresses)


def watched(rules: Sequence[classifier.Rule], count: int, seed: int = 1) -> list[Tuple]:
    """Packets that match, each another flow, from as many different rules as there are."""
    pick = random.Random(seed)
    order = pick.sample(rules, len(rules))
    chosen = [order[n % len(order)] for n in range(count)]
    found = []
    for number, rule in enumerate(chosen):
        found.append(
            Tuple(
                source=_inside(pick, rule.sources, PODS),
                destination=_inside(pick, rule.destinations, SERVICES),
                source_port=1024 + number,
                destination_port=rule.destination_ports[0][0] if rule.destination_ports else 7000,
                protocol=rule.protocol or TCP,
            )
        )
    return found


def unwatched(
    count: int, seed: int = 1, pods: int = 250, services: str = "10.96.0.0/16"
) -> list[Tuple]:
    """Packets of pods and services that no rule names: a node's pods, each with an equal part of the flows."""
    pick = random.Random(seed)
    base = int(ipaddress.IPv4Network(services).network_address)
    hosts = [PODS + n for n in pick.sample(_ODD, min(count, pods))]
    targets = [base + n for n in pick.sample(_ODD, min(count, pods))]
    packets = [
        Tuple(
            source=hosts[n % len(hosts)],
            destination=pick.choice(targets),
            source_port=1024 + n // len(hosts),
            destination_port=pick.choice(_SERVICE_PORTS),
            protocol=TCP,
        )
        for n in range(count)
    ]
    pick.shuffle(packets)
    return packets


def interleaved(some: Sequence[Tuple], others: Sequence[Tuple]) -> list[Tuple]:
    """Both kinds of packets, evenly mixed."""
    total, found, taken = len(some) + len(others), [], 0
    for number in range(total):
        if (number + 1) * len(some) // total > taken:
            found.append(some[taken])
            taken += 1
        else:
            found.append(others[number - taken])
    return found
