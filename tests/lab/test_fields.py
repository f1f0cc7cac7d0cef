# SPDX-License-Identifier: Apache-2.0
"""Every field of a watchlist, and of a collector, does what it says."""

import struct

import pytest

from hostint_agent import bpf_calls, bpf_types
from tests.lab import scene as scenes
from tests.lab import traffic

pytestmark = pytest.mark.lab
TO_PODS = "protocol: UDP, destination: {cidrs: [10.244.0.0/16]"


@pytest.fixture(scope="module")
def scene():
    with scenes.scene("routed") as built:
        yield built


def send(scene, port: int, **more) -> int:
    """Datagrams from the first pod to a sink on the last; the source port."""
    client, server = scene.pods()
    with traffic.udp_sink(server.namespace, server.address, port):
        return traffic.send_udp(client.namespace, server.address, port, **more)


def ports_reported(scene) -> set[int]:
    scene.quiet()
    node = scene.nodes[0]
    return {r["inner"]["destinationPort"] for r in scene.reports(node)}


def test_ignore_takes_packets_out_of_what_later_rules_report(scene):
    scene.watch(
        scenes.watchlist(f"action: Ignore, {TO_PODS}, ports: [{{port: 5001}}]}}\n{TO_PODS}}}")
    )
    for port in (5000, 5001, 5002):
        send(scene, port)
    assert ports_reported(scene) == {5000, 5002}


def test_a_higher_priority_decides_first(scene):
    ignore = scenes.watchlist(
        f"action: Ignore, {TO_PODS}, ports: [{{port: 5001}}]}}", name="z-last"
    )
    high = ignore.replace("spec:\n", "spec:\n  priority: 10\n")
    report = scenes.watchlist(f"{TO_PODS}}}", name="a-first")
    scene.watch(report, ignore)
    send(scene, 5001)
    assert ports_reported(scene) == {5001}
    scene.watch(report, high)
    send(scene, 5001)
    assert ports_reported(scene) == set()


def test_port_ranges_include_both_ends(scene):
    scene.watch(
        scenes.watchlist(f"{TO_PODS}, ports: [{{port: 5001, endPort: 5003}}, {{port: 5010}}]}}")
    )
    for port in (5000, 5001, 5003, 5004, 5010):
        send(scene, port)
    assert ports_reported(scene) == {5001, 5003, 5010}


def test_bidirectional_matches_the_reply_and_its_absence_does_not(scene):
    client, server = scene.pods()
    one_way = f"protocol: TCP, source: {{cidrs: [{client.address}/32]}}, destination: {{cidrs: [{server.address}/32]}}"
    for more, directions in (("", 1), (", bidirectional: true", 2)):
        scene.watch(scenes.watchlist(one_way + more))
        with traffic.tcp_echo(server.namespace, server.address, 8080):
            traffic.tcp_exchange(client.namespace, server.address, 8080)
        scene.quiet()
        sources = {r["inner"]["sourceAddress"] for r in scene.reports(scene.nodes[0])}
        assert len(sources) == directions


def test_interval_is_the_time_between_reports_of_a_flow(scene):
    scene.watch(scenes.watchlist(f"{TO_PODS}}}", "interval: 200ms, latencyChange: 0s"))
    send(scene, 5000, count=100, pause_s=0.01)
    scene.quiet()
    # a second of traffic: one at its begin, then one every 200 ms
    assert 4 <= len(scene.reports(scene.nodes[0])) <= 8


def test_latency_change_reports_a_flow_again_before_its_interval(scene):
    scene.watch(scenes.watchlist(f"{TO_PODS}}}", "interval: 1h, latencyChange: 1ns"))
    send(scene, 5000, count=50)
    scene.quiet()
    assert len(scene.reports(scene.nodes[0])) > 10
    scene.watch(scenes.watchlist(f"{TO_PODS}}}", "interval: 1h, latencyChange: 0s"))
    send(scene, 5001, count=50)
    scene.quiet()
    assert len(scene.reports(scene.nodes[0], destinationPort=5001)) == 1


def test_sample_reports_one_in_n_flows_and_the_same_on_every_node(scene):
    scene.watch(scenes.watchlist(f"{TO_PODS}}}", "interval: 1h, latencyChange: 0s, sample: 4"))
    client, server = scene.pods()
    for port in range(6000, 6200):
        traffic.send_udp(client.namespace, server.address, port, source_port=4000)
    scene.quiet()
    sampled = [
        {r["inner"]["destinationPort"] for r in scene.reports(node, sourcePort=4000)}
        for node in scene.nodes
    ]
    assert sampled[0] == sampled[1]
    assert 25 <= len(sampled[0]) <= 80
    found = scene.agents[0].settled()
    assert found.watched_difference == 0
    assert found.counters["sampled_out"] >= 100


@pytest.mark.parametrize(
    ("events", "flows", "drops"), [("Flow", 1, 0), ("Drop", 0, 1), ("Flow, Drop", 1, 1)]
)
def test_events_are_what_is_asked_for(scene, events, flows, drops):
    scene.watch(
        scenes.watchlist(
            "source: {cidrs: [10.244.1.10/32]}",
            f"interval: 1h, latencyChange: 0s, events: [{events}]",
        )
    )
    client, _ = scene.pods()
    send(scene, 5000)
    traffic.send_udp(client.namespace, "10.200.0.1", 5000)
    scene.quiet()
    node = scene.nodes[0]
    assert len(scene.reports(node, "flow", destinationPort=5000)) == flows
    assert len(scene.reports(node, "drop", destinationPort=5000)) == drops
    assert scene.agents[0].settled().watched_difference == 0


def test_the_rate_limit_holds_and_what_it_costs_is_counted(scene):
    limited = scene.objects(scenes.watchlist(f"{TO_PODS}}}", "interval: 10ms")).replace(
        "spec: {address", "spec: {rateLimit: {reportsPerSecond: 100}, address"
    )
    scene.agents[0].change(limited)
    before = scene.agents[0].settled().counters
    scene.collector.clear()
    client, server = scene.pods()
    with traffic.udp_sink(server.namespace, server.address, 5000):
        for port in range(6000, 6500):
            traffic.send_udp(client.namespace, server.address, port)
    scene.quiet()
    after = scene.agents[0].settled()
    assert after.watched_difference == 0
    reported = after.counters["reported"] - before["reported"]
    assert after.counters["rate_limited"] - before["rate_limited"] >= 1
    assert reported + after.counters["rate_limited"] - before["rate_limited"] >= 500
    assert len(scene.reports(scene.nodes[0])) == reported


def test_snap_length_and_dscp(scene):
    short = scene.objects(scenes.watchlist(f"{TO_PODS}}}")).replace(
        "spec: {address", "spec: {snapLength: 42, dscp: 46, address"
    )
    scene.agents[0].change(short)
    scene.collector.clear()
    client, server = scene.nodes[0].pods
    capture = traffic.Capture(scene.lab.collector, "eth0", tag=b"\x02\x20\x00")
    with traffic.udp_sink(server.namespace, server.address, 5000):
        traffic.send_udp(client.namespace, server.address, 5000)
        report = scene.wait_reports(scene.nodes[0], destinationPort=5000)[0]
    frame = capture.frame()
    capture.close()
    assert report["inner"]["truncated"]
    assert frame[15] >> 2 == 46
    assert int.from_bytes(frame[38:40], "big") == 8 + 28 + 42


def test_a_report_carries_the_port_id_that_an_interface_was_given(scene):
    """Interfaces whose index has no room in 16 bits are given another number; nothing is looked up where none is like that."""
    maps, node = scene.agents[0].maps, scene.nodes[0]
    index = node.port(scene.pods()[0].interface)
    config = bpf_types.Config.from_buffer(bpf_calls.Map.open(maps / "config").memory())
    ports = bpf_calls.Map.open(maps / "ports")
    scene.watch(scenes.watchlist(f"{TO_PODS}}}"))
    assert config.port_is_ifindex == 1
    ports.update(struct.pack("=I", index), struct.pack("=Q", 65535))
    try:
        for is_index, expected in ((0, 65535), (1, index)):
            config.port_is_ifindex = is_index
            source_port = send(scene, 5000)
            report = scene.wait_reports(node, sourcePort=source_port)[0]
            assert report["ingressPort"] == expected
            assert report["egressPort"] == node.port("eth0")
    finally:
        ports.update(struct.pack("=I", index), struct.pack("=Q", index))
        config.port_is_ifindex = 1
