# SPDX-License-Identifier: Apache-2.0
"""What the host answers is another packet than what it was asked, though it may be like it in every byte that counts.

An ICMPv6 echo reply has the request's content, and often its memory: address and fingerprint are the same.
"""

from collections.abc import Iterator

import pytest

from hostint_agent import bpf_types, classifier
from hostint_report import inner, v05
from tests.lab import datapath as datapaths
from tests.lab import traffic
from tests.lab.topology import Lab

pytestmark = pytest.mark.lab
COUNT = 100
ECHO_REQUEST, ECHO_REPLY = 128, 129
REPORT = bpf_types.RuleAction.REPORT


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(nodes=1, pods=1, mode="routed") as built:
        yield built


def ping(lab: Lab, *, delivery: bool) -> list[v05.LocalReport]:
    """Reports of echo requests to the host and of its replies."""
    node = lab.nodes[0]
    with datapaths.loaded(node.namespace) as datapath:
        datapath.attach("pod0")
        datapath.attach_drop()
        if delivery:
            datapath.attach_delivery()
        datapath.config.set_port_is_ifindex(True)
        # with the addresses, so that neighbour discovery is not watched
        ends = [(classifier.host_network(a),) for a in (node.pods[0].address6, node.address6)]
        datapath.watch(
            [
                classifier.Rule(n, 1, REPORT, protocol=58, sources=a, destinations=b)
                for n, (a, b) in enumerate((ends, ends[::-1]), start=1)
            ]
        )
        datapath.enable()
        words = f"ping -6 -q -c {COUNT} -i 0.002 -s 64 {node.address6}"
        assert f"{COUNT} received" in node.pods[0].namespace.run(*words.split())
        identity = datapath.identity()
        assert identity.watched_difference == 0
        assert identity.counters["watched"] == 2 * COUNT
        return list(map(v05.decode, datapath.drain()))


def kind(report: v05.LocalReport) -> int:
    return inner.parse(report.packet).icmp_type


@pytest.mark.parametrize("delivery", [True, False], ids=["seen", "unseen"])
def test_echo_replies_of_the_host_are_packets_of_their_own(lab, delivery):
    """Whether or not it is seen that the request was taken (before Linux 6.4 it is not)."""
    port = lab.nodes[0].port("pod0")
    reports = ping(lab, delivery=delivery)
    replies = [report for report in reports if kind(report) == ECHO_REPLY]
    assert len(replies) == COUNT
    assert {(r.ingress_port, r.egress_port, r.hop_latency) for r in replies} == {(0, port, 0)}
    requests = [report for report in reports if kind(report) == ECHO_REQUEST]
    assert len(requests) == (COUNT if delivery else 0)
    assert {(r.ingress_port, r.egress_port) for r in requests} <= {(port, 0)}
    assert all(report.hop_latency > 0 for report in requests)


@pytest.mark.parametrize("version", [4, 6])
def test_packet_that_nat_makes_match_at_a_socket_is_watched(lab, version):
    """A port that the node redirects to one of its own: what is in the rule is what the socket gets."""
    node = lab.nodes[0]
    client = node.pods[0].namespace
    address = node.address if version == 4 else node.address6
    family = "ip" if version == 4 else "ip6"
    hook = "{ type nat hook prerouting priority dstnat; }"
    for words in (
        f"table {family} away",
        f"chain {family} away pre {hook}",
        f"rule {family} away pre udp dport 5000 redirect to :6000",
    ):
        node.namespace.run("nft", f"add {words}")
    with datapaths.loaded(node.namespace) as datapath:
        datapath.attach("pod0")
        datapath.attach_delivery()
        datapath.config.set_port_is_ifindex(True)
        port = ((6000, 6000),)
        datapath.watch([classifier.Rule(1, 1, REPORT, protocol=17, destination_ports=port)])
        datapath.enable()
        # what is redirected goes to the address of the interface that it came by
        with traffic.udp_sink(node.namespace, "0.0.0.0" if version == 4 else "::", 6000):
            traffic.send_udp(client, address, 5000, count=COUNT)
        identity = datapath.identity()
        reports = [v05.decode(data) for data in datapath.drain()]
    assert identity.watched_difference == 0
    assert identity.counters["watched"] == identity.counters["reported"] == COUNT
    assert {inner.parse(r.packet).destination_port for r in reports} == {6000}
    assert {(r.ingress_port, r.egress_port) for r in reports} == {(node.port("pod0"), 0)}
    assert all(r.hop_latency > 0 for r in reports)
