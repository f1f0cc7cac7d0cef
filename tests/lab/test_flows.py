# SPDX-License-Identifier: Apache-2.0
"""Watched flows are reported by every node they cross, as they are; others are not."""

import statistics

import pytest

from tests.lab import scene as scenes
from tests.lab import traffic

pytestmark = pytest.mark.lab
PODS = "source: {cidrs: [10.244.0.0/16, 'fd44::/16']}, destination: {cidrs: [10.244.0.0/16, 'fd44::/16']}"


@pytest.fixture(scope="module", params=["routed", "bridged"])
def scene(request):
    with scenes.scene(request.param) as built:
        yield built


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_is_reported_by_both_nodes_and_the_reply_on_its_own(scene, version):
    scene.watch(scenes.watchlist(f"protocol: TCP, {PODS}"))
    client, server = scene.pods()
    here, there = client.ip(version), server.ip(version)
    with traffic.tcp_echo(server.namespace, there, 8080):
        port = traffic.tcp_exchange(client.namespace, there, 8080)
    for node in scene.nodes:
        forth = {"sourceAddress": here, "sourcePort": port, "destinationAddress": there}
        back = {"sourceAddress": there, "destinationAddress": here, "destinationPort": port}
        assert scene.wait_reports(node, protocol="TCP", destinationPort=8080, **forth)
        assert scene.wait_reports(node, protocol="TCP", sourcePort=8080, **back)


@pytest.mark.parametrize("version", [4, 6])
def test_udp_is_reported_with_the_ports_it_went_through(scene, version):
    scene.watch(scenes.watchlist(f"protocol: UDP, {PODS}"))
    client, server = scene.pods()
    with traffic.udp_sink(server.namespace, server.ip(version), 5353):
        source_port = traffic.send_udp(client.namespace, server.ip(version), 5353)
        first, last = scene.nodes
        ways = ((first, client.interface, "eth0"), (last, "eth0", server.interface))
        for node, ingress, egress in ways:
            report = scene.wait_reports(node, sourcePort=source_port, destinationPort=5353)[0]
            assert report["ingressPort"] == node.port(ingress)
            assert report["egressPort"] == node.port(egress)
            assert report["inner"]["protocol"] == "UDP"
            assert report["flags"] == {"d": False, "q": False, "f": True}


@pytest.mark.parametrize(("version", "protocol"), [(4, "ICMP"), (6, "ICMPv6")])
def test_ping_is_reported_with_its_answer(scene, version, protocol):
    scene.watch(scenes.watchlist(f"protocol: {protocol}, {PODS}"))
    client, server = scene.pods()
    assert traffic.ping(client.namespace, server.ip(version))
    request, answer = (8, 0) if version == 4 else (128, 129)
    for node in scene.nodes:
        assert scene.wait_reports(node, protocol=protocol, icmpType=request)
        assert scene.wait_reports(node, protocol=protocol, icmpType=answer)


def test_unwatched_flows_on_the_same_nodes_are_not_reported(scene):
    scene.watch(
        scenes.watchlist(
            "protocol: UDP, destination: {cidrs: [10.244.2.10/32], ports: [{port: 4000}]}"
        )
    )
    client, server = scene.pods()
    with traffic.udp_sink(server.namespace, server.address, 4000):
        traffic.send_udp(client.namespace, server.address, 4001, count=20)
        traffic.send_udp(client.namespace, server.address6, 4000, count=20)
        assert traffic.ping(client.namespace, server.address)
        traffic.send_udp(client.namespace, server.address, 4000)
        for node in scene.nodes:
            scene.wait_reports(node, destinationPort=4000)
    scene.quiet()
    tuples = {
        (r["inner"]["destinationAddress"], r["inner"]["destinationPort"])
        for r in scene.collector.records()
    }
    assert tuples == {(server.address, 4000)}


def test_a_flow_between_pods_of_one_node_is_reported_by_that_node_alone(scene):
    scene.watch(scenes.watchlist(f"protocol: UDP, {PODS}"))
    node = scene.nodes[0]
    client, server = node.pods
    with traffic.udp_sink(server.namespace, server.address, 4000):
        traffic.send_udp(client.namespace, server.address, 4000)
        report = scene.wait_reports(node, destinationPort=4000)[0]
    assert report["ingressPort"] == node.port(client.interface)
    assert report["egressPort"] == node.port(server.interface)
    assert not scene.reports(scene.nodes[1], destinationPort=4000)


def test_hop_latency_lies_within_what_packet_timestamps_say(scene):
    """Captures take their stamps outside of our hooks, and their own work lies between, which may be most of it.

    How exact it is, test_paths measures with recorders next to the programs.
    """
    scene.watch(scenes.watchlist(f"protocol: UDP, {PODS}", "interval: 10ms, latencyChange: 1ns"))
    client, server = scene.pods()
    node = scene.nodes[0]
    before = traffic.Capture(node.namespace, client.interface)
    after = traffic.Capture(node.namespace, "eth0")
    with traffic.udp_sink(server.namespace, server.address, 4000):
        traffic.send_udp(client.namespace, server.address, 4000, count=100, pause_s=0.012)
        reports = scene.wait_reports(node, 90, destinationPort=4000)
    came, left = before.seen(), after.seen()
    before.close()
    after.close()
    measured = [left[n] - came[n] for n in came if n in left]
    assert len(measured) >= 90
    reported = statistics.median(r["hopLatency"] for r in reports)
    truth = statistics.median(measured)
    assert 0.1 * truth <= reported <= truth, (reported, truth)


def test_what_the_host_sends_and_takes_has_port_0_on_its_side(scene):
    scene.watch(
        scenes.watchlist(
            "source: {cidrs: [10.99.0.11/32]}, destination: {cidrs: [10.244.0.0/16]}, bidirectional: true"
        )
    )
    node, server = scene.nodes[0], scene.pods()[1]
    with traffic.tcp_echo(server.namespace, server.address, 8080):
        port = traffic.tcp_exchange(node.namespace, server.address, 8080)
    sent = scene.wait_reports(node, sourcePort=port, destinationPort=8080)[0]
    assert (sent["ingressPort"], sent["egressPort"]) == (0, node.port("eth0"))
    taken = scene.wait_reports(node, sourcePort=8080, destinationPort=port)[0]
    assert (taken["ingressPort"], taken["egressPort"]) == (node.port("eth0"), 0)
    assert sent["hopLatency"] == 0
    assert 0 < taken["hopLatency"] < 10**9


def test_every_packet_is_accounted_for(scene):
    scene.watch(scenes.watchlist(f"protocol: UDP, {PODS}", "interval: 100ms"))
    client, server = scene.pods()
    before = [agent.settled().counters["watched"] for agent in scene.agents]
    with traffic.udp_sink(server.namespace, server.address, 4000):
        traffic.send_udp(client.namespace, server.address, 4000, count=2000)
        scene.quiet()
        for agent, watched in zip(scene.agents, before, strict=True):
            found = agent.settled()
            assert found.watched_difference == 0, found
            assert found.drops_difference == 0, found
            assert found.counters["watched"] - watched == 2000
    assert scene.collector.lost == 0
    assert scene.collector.malformed == 0


BOTH_ADDRESSES = "ip saddr set 10.244.1.99 ip daddr set 10.244.2.99"


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        pytest.param("ip id set 4242", True, id="identification"),
        pytest.param(f"{BOTH_ADDRESSES} ip id set 4242", True, id="identification-and-addresses"),
        pytest.param(BOTH_ADDRESSES, False, id="addresses"),
    ],
)
def test_an_address_alone_does_not_make_two_packets_one(scene, change, is_another):
    """The packet that leaves has the same address, but what no hop changes is not the same.

    That NAT has changed both addresses makes it no other packet.
    """
    scene.watch(scenes.watchlist(f"protocol: UDP, {PODS}", "interval: 10ms"))
    client, server = scene.pods()
    node, agent = scene.nodes[0], scene.agents[0]
    before = agent.settled().counters
    node.namespace.run("nft", "add table ip other")
    try:
        hook = "{ type filter hook forward priority 0; }"
        node.namespace.run("nft", f"add chain ip other forward {hook}")
        node.namespace.run("nft", f"add rule ip other forward udp dport 4010 {change}")
        with traffic.udp_sink(server.namespace, server.address, 4010):
            traffic.send_udp(client.namespace, server.address, 4010, count=100)
    finally:
        node.namespace.run("nft", "delete table ip other")
    scene.quiet()
    after = agent.settled()
    assert after.watched_difference == 0
    changed = {name: after.counters[name] - before[name] for name in before}
    assert changed["watched"] == 100
    assert changed["unverified"] == (100 if is_another else 0)
    assert changed["unverified"] + changed["reported"] + changed["suppressed"] == 100
