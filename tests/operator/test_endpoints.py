# SPDX-License-Identifier: Apache-2.0
"""Where the reports of a collector go."""

import collections
import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostint_operator import desired_state, endpoints
from tests.operator import build

SERVICE: dict[str, Any] = {"service": {"namespace": "ns", "name": "svc", "port": 4000}}


def addresses(*texts: str) -> tuple[desired_state.Address, ...]:
    return tuple(ipaddress.ip_address(t) for t in texts)


def test_an_ip_address_is_its_own_endpoint_with_the_default_port() -> None:
    found = endpoints.resolve(build.collector(address="2001:db8::1"), desired_state.State())
    assert [str(e) for e in found.usable] == ["[2001:db8::1]:32766"]
    assert (found.accepted, found.reason) == (True, "Resolved")


@pytest.mark.parametrize("address", ["10.96.0.7", "fd00::7", "collector.ns.svc"])
def test_the_cluster_ip_of_a_service_is_refused_with_advice(address: str) -> None:
    state = desired_state.State(
        services={"ns/svc": build.service(4000, cluster=["10.96.0.7", "fd00::7"])},
        dns={"collector.ns.svc": desired_state.DnsAnswer(addresses("10.96.0.7"), 0, "")},
    )
    found = endpoints.resolve(build.collector(address=address, port=4000), state)
    assert (found.accepted, found.reason, found.usable) == (False, "ClusterIPAddress", ())
    assert "service: {namespace: ns, name: svc, port: 4000}" in found.message


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        (desired_state.State(), "ServiceNotFound", "ns/svc does not exist"),
        (
            desired_state.State(services={"ns/svc": build.service(1, 2)}),
            "PortNotFound",
            "no UDP port 4000; its UDP ports: 1, 2",
        ),
        (
            desired_state.State(services={"ns/svc": build.service(4000)}),
            "NoEndpoints",
            "no ready endpoint",
        ),
        (
            desired_state.State(
                services={"ns/svc": build.service(4000)},
                slices={"ns/s": build.endpoint_slice("ns/svc", 4000, 5, [], ["10.0.0.5"])},
            ),
            "NoEndpoints",
            "no ready endpoint",
        ),
    ],
)
def test_a_service_that_leads_nowhere_is_told_apart(
    state: desired_state.State, reason: str, words: str
) -> None:
    found = endpoints.resolve(build.collector(**SERVICE), state)
    assert (found.accepted, found.reachable, found.reason) == (True, False, reason)
    assert words in found.message


def test_ready_endpoints_are_used_at_their_own_port_and_the_others_are_still_known() -> None:
    state = desired_state.State(
        services={"ns/svc": build.service(4000, 4001)},
        slices={
            "ns/a": build.endpoint_slice("ns/svc", 4000, 5000, ["10.0.0.5"], ["10.0.0.6"]),
            "ns/b": build.endpoint_slice("ns/svc", 4001, 6000, ["10.0.0.7"]),
            "ns/c": build.endpoint_slice("ns/other", 4000, 7000, ["10.0.0.8"]),
        },
    )
    found = endpoints.resolve(build.collector(**SERVICE), state)
    assert [str(e) for e in found.usable] == ["10.0.0.5:5000"]
    assert [str(e) for e in found.known] == ["10.0.0.5:5000", "10.0.0.6:5000"]


@pytest.mark.parametrize(
    ("answer", "reason", "usable"),
    [
        (None, "Resolving", 0),
        (desired_state.DnsAnswer((), 1, "no such name"), "DNSFailure", 0),
        (desired_state.DnsAnswer(addresses("192.0.2.1", "192.0.2.2"), 0, ""), "Resolved", 2),
        (desired_state.DnsAnswer(addresses("192.0.2.1"), 2, "no such name"), "Resolved", 1),
        (desired_state.DnsAnswer(addresses("192.0.2.1"), 3, "no such name"), "LastKnownAddress", 1),
    ],
)
def test_a_name_is_used_as_last_resolved(
    answer: desired_state.DnsAnswer | None, reason: str, usable: int
) -> None:
    state = desired_state.State(dns={} if answer is None else {"c.example": answer})
    found = endpoints.resolve(build.collector(address="c.example"), state)
    assert (found.accepted, found.reason, len(found.usable)) == (True, reason, usable)
    assert ("no such name" in found.message) == (reason in ("DNSFailure", "LastKnownAddress"))


all_endpoints = st.sets(
    st.builds(
        endpoints.Endpoint,
        st.integers(1, 250).map(lambda i: ipaddress.IPv4Address((10 << 24) + i)),
        st.just(4000),
    ),
    min_size=2,
    max_size=6,
)


@given(all_endpoints)
def test_when_an_endpoint_goes_only_the_nodes_that_had_it_move(
    found: set[endpoints.Endpoint],
) -> None:
    nodes = [f"node-{i}" for i in range(40)]
    before = {node: endpoints.choose(node, found) for node in nodes}
    gone = sorted(found, key=str)[0]
    after = {node: endpoints.choose(node, found - {gone}) for node in nodes}
    assert {node for node in nodes if before[node] != after[node]} == {
        node for node in nodes if before[node] == gone
    }


def test_nodes_spread_over_the_endpoints() -> None:
    found = [endpoints.Endpoint(ipaddress.IPv4Address((10 << 24) + i), 1) for i in range(3)]
    count = collections.Counter(endpoints.choose(f"node-{i}", found) for i in range(600))
    assert min(count[e] for e in found) > 120
