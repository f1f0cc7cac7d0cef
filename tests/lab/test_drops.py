# SPDX-License-Identifier: Apache-2.0
"""What dies is reported once, with the kernel's reason; what is delivered is never called dropped."""

import time

import pytest

from hostint_agent import counters, kernel
from tests.lab import scene as scenes
from tests.lab import traffic

pytestmark = pytest.mark.lab
EVERYTHING = scenes.watchlist(
    "source: {cidrs: [10.244.0.0/16, 'fd44::/16']}\ndestination: {cidrs: [10.244.0.0/16, 'fd44::/16']}",
    "interval: 10s",
)


@pytest.fixture(scope="module")
def scene():
    with scenes.scene("bridged") as built:
        yield built


@pytest.fixture
def firewall(scene):
    """Drop what nft rules say in the forward chain of the first node."""
    node = scene.nodes[0].namespace

    def drop(rule: str) -> None:
        node.run("nft", "add", "table", "inet", "test")
        node.run("nft", "add chain inet test forward { type filter hook forward priority 0; }")
        node.run("nft", f"add rule inet test forward {rule} drop")

    yield drop
    node.run("nft", "delete", "table", "inet", "test", check=False)


def kernel_drops(scene) -> dict[str, int]:
    return counters.Counters(scene.agents[0].maps).drops(kernel.drop_reason_names())


def one_drop(scene, name: str, code: int, kernel_reason: str, before: dict[str, int], **inner):
    """Exactly one drop report, with this code, and the kernel's own name of the reason in the counters."""
    node = scene.nodes[0]
    scene.wait_reports(node, kind="drop", **inner)
    scene.quiet()
    reports = scene.reports(node, kind="drop", **inner)
    assert len(reports) == 1, reports
    assert (reports[0]["dropReason"], reports[0]["dropReasonName"]) == (code, name)
    assert kernel_drops(scene)[kernel_reason] == before.get(kernel_reason, 0) + 1
    assert reports[0]["ingressPort"] == node.port(node.pods[0].interface)
    return reports[0]


@pytest.mark.parametrize("version", [4, 6])
def test_a_packet_dropped_by_the_firewall(scene, firewall, version):
    scene.watch(EVERYTHING)
    client, server = scene.pods()
    firewall("udp dport 4007")
    before = kernel_drops(scene)
    port = traffic.send_udp(client.namespace, server.ip(version), 4007)
    tuple_ = {"sourcePort": port, "destinationAddress": server.ip(version)}
    one_drop(scene, "denied by policy", 80, "NETFILTER_DROP", before, **tuple_)
    assert not scene.reports(scene.nodes[0], **tuple_)


def test_a_packet_without_a_route(scene):
    scene.watch(EVERYTHING)
    client, _ = scene.pods()
    before = kernel_drops(scene)
    port = traffic.send_udp(client.namespace, "10.200.0.1", 4007)
    one_drop(scene, "no route", 29, "IP_INNOROUTES", before, sourcePort=port)


def test_a_packet_whose_ttl_is_used_up(scene):
    scene.watch(EVERYTHING)
    client, server = scene.pods()
    before = kernel_drops(scene)
    port = traffic.send_udp(client.namespace, server.address, 4007, ttl=1)
    one_drop(scene, "TTL expired", 26, "IP_INHDR", before, sourcePort=port)


def test_a_packet_for_a_host_port_that_nobody_listens_on(scene):
    scene.watch(EVERYTHING)
    client, _ = scene.pods()
    before = kernel_drops(scene)
    port = traffic.send_udp(client.namespace, scene.nodes[0].address, 4007)
    one_drop(scene, "host: no socket", 192, "NO_SOCKET", before, sourcePort=port)


def test_a_packet_that_the_egress_queue_has_no_room_for(scene):
    """After our egress hook: forwarded as far as we can see, then dropped by the device's queue."""
    scene.watch(EVERYTHING)
    node = scene.nodes[0]
    client, server = node.pods
    shaper = f"tc qdisc replace dev {server.interface} root tbf rate 64kbit burst 2000 limit 3000"
    node.namespace.run(*shaper.split())
    try:
        port = traffic.send_udp(client.namespace, server.address, 4007, count=200)
        report = scene.wait_reports(node, kind="drop", sourcePort=port)[0]
    finally:
        node.namespace.run(*f"tc qdisc del dev {server.interface} root".split())
    assert (report["dropReason"], report["flags"]["q"]) == (71, True)
    assert report["egressPort"] == node.port(server.interface)


def test_drops_of_one_flow_and_reason_are_one_report_an_interval_and_all_counted(scene, firewall):
    scene.watch(EVERYTHING)
    client, server = scene.pods()
    firewall("udp dport 4007")
    before = scene.agents[0].settled().counters
    port = traffic.send_udp(client.namespace, server.address, 4007, count=50)
    scene.wait_reports(scene.nodes[0], kind="drop", sourcePort=port)
    after = scene.agents[0].settled()
    assert after.watched_difference == after.drops_difference == 0
    assert after.counters["dropped"] - before["dropped"] == 50
    assert after.counters["drops_reported"] - before["drops_reported"] == 1
    assert after.counters["drops_suppressed"] - before["drops_suppressed"] == 49


def test_delivered_traffic_has_no_drop_report(scene):
    scene.watch(EVERYTHING)
    client, server = scene.pods()
    with (
        traffic.tcp_echo(server.namespace, server.address, 8080),
        traffic.udp_sink(server.namespace, server.address, 4000),
        traffic.tapped(scene.nodes[0].namespace, "eth0"),
    ):
        for _ in range(5):
            traffic.tcp_exchange(client.namespace, server.address, 8080, b"x" * 300_000)
        traffic.send_udp(client.namespace, server.address, 4000, count=2000, pause_s=0.0002)
        assert traffic.ping(client.namespace, scene.nodes[0].address, count=20)
        scene.quiet()
    assert scene.collector.records("drop") == []


def test_a_drop_is_reported_for_what_nat_made_of_a_packet(scene, firewall):
    """Not watched as it was sent; watched once its destination is translated; then it dies."""
    client, server = scene.pods()
    node = scene.nodes[0].namespace
    scene.watch(
        scenes.watchlist(
            f"destination: {{cidrs: [{server.address}/32]}}, source: {{cidrs: [{client.address}/32]}}"
        )
    )
    node.run("nft", "add", "table", "ip", "testnat")
    node.run("nft", "add chain ip testnat pre { type nat hook prerouting priority -100; }")
    node.run("nft", f"add rule ip testnat pre ip daddr 10.96.0.7 dnat to {server.address}")
    firewall("udp dport 4007")
    try:
        port = traffic.send_udp(client.namespace, "10.96.0.7", 4007)
        report = scene.wait_reports(scene.nodes[0], kind="drop", sourcePort=port)[0]
    finally:
        node.run("nft", "delete", "table", "ip", "testnat")
    assert report["inner"]["destinationAddress"] == server.address


def test_hop_latency_grows_with_a_queue_inside_the_node(scene):
    """A shaped bridge holds packets for some milliseconds; only there is a queue between our two hooks."""
    scene.watch(
        scenes.watchlist(
            "protocol: UDP, source: {cidrs: [10.244.0.0/16]}",
            "interval: 10ms, congestionLatency: 3ms, events: [Flow, Queue]",
        )
    )
    client, server = scene.pods()
    node = scene.nodes[1]
    shaper = ["tc", "qdisc", "replace", "dev", "cni0", "root", "tbf", "rate", "1mbit"]
    node.namespace.run(*shaper, "burst", "2000", "limit", "100000")
    try:
        with traffic.udp_sink(server.namespace, server.address, 4000):
            traffic.send_udp(client.namespace, server.address, 4000, count=60)
            slow = max(
                scene.wait_reports(node, 3, destinationPort=4000), key=lambda r: r["hopLatency"]
            )
            deadline = time.monotonic() + 5
            while slow["hopLatency"] < 3_000_000 and time.monotonic() < deadline:
                time.sleep(0.05)
                slow = max(scene.reports(node, destinationPort=4000), key=lambda r: r["hopLatency"])
    finally:
        node.namespace.run("tc", "qdisc", "del", "dev", "cni0", "root")
    assert slow["hopLatency"] >= 3_000_000
    assert slow["flags"]["q"]


def test_segments_made_inside_the_node_are_not_taken_for_other_packets(scene):
    """A shaper cuts large TCP packets into new ones that inherit interface and tag: their addresses lead to strangers' slots."""
    scene.watch(scenes.watchlist("source: {cidrs: [10.244.0.0/16]}", "interval: 10ms"))
    client, server = scene.pods()
    node = scene.nodes[1]
    # at most 400 kB wait, at 20 Mbit/s: 160 ms
    shaper = "tc qdisc replace dev cni0 root tbf rate 20mbit burst 4000 limit 400000"
    node.namespace.run(*shaper.split())
    try:
        with traffic.tcp_echo(server.namespace, server.address, 8080):
            for _ in range(6):
                traffic.tcp_exchange(client.namespace, server.address, 8080, b"x" * 400_000)
                time.sleep(0.3)
    finally:
        node.namespace.run(*"tc qdisc del dev cni0 root".split())
    scene.quiet()
    slow = [r for r in scene.reports(node) if r["hopLatency"] > 250_000_000]
    assert slow == []
    assert len(scene.reports(node)) > 10


def test_what_a_pod_itself_refuses_is_no_drop_of_the_node(scene):
    """Forwarded, then refused by the pod's own stack: the same kernel, another network namespace."""
    scene.watch(EVERYTHING)
    client, server = scene.pods()
    port = traffic.send_udp(client.namespace, server.address, 4999, count=5)
    assert scene.wait_reports(scene.nodes[1], sourcePort=port)
    scene.quiet()
    assert scene.collector.records("drop") == []
