# SPDX-License-Identifier: Apache-2.0
"""Reports are never watched: not where they are sent, not where they are forwarded, not where they arrive.

Every UDP packet is watched, and reported again after 10 ms. Where a report were watched, it would be reported, and that
report again: so some time after the last packet of others no report comes any more.
"""

import contextlib
import socket
import time
from collections.abc import Iterator, Set

import pytest

from hostint_agent import own_sockets, senders
from hostint_collector.embedded import CollectorThread
from hostint_report import inner, v05
from tests.lab import datapath as datapaths
from tests.lab import scene as scenes
from tests.lab import traffic
from tests.lab.namespace import ip
from tests.lab.scene import Scene
from tests.lab.topology import Lab, Node

pytestmark = pytest.mark.lab
EVERYTHING = scenes.watchlist("protocol: UDP", "interval: 10ms, events: [Flow, Drop]")
SERVICE, SERVICE6, PORT = "10.96.0.77", "fd96::77", 32766
QUIET_S, SILENCE_S = 1.0, 1.0


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with scenes.scene("routed", 2) as built:
        yield built


@contextlib.contextmanager
def collecting(scene: Scene, where: str, version: int) -> Iterator[tuple[CollectorThread, str]]:
    """A collector in some place; and its address there."""
    if where == "outside":
        namespace = scene.lab.collector
        address = scene.lab.collector_address if version == 4 else scene.lab.collector_address6
    else:
        pod = scene.nodes[-1].pods[1]
        namespace, address = pod.namespace, pod.ip(version)
    with namespace.inside(lambda: CollectorThread(address, PORT)) as collector:
        yield collector, address


@contextlib.contextmanager
def translated(node: Node, address: str, to: str, *, source: bool) -> Iterator[None]:
    """The node itself translates what it sends to the address (and what it forwards), as kube-proxy does."""
    version = "ip6" if ":" in to else "ip"
    target = f"[{to}]" if ":" in to else to
    rule = f"{version} daddr {address} udp dport {PORT} dnat to {target}:{PORT}"
    lines = [f"table {version} own {{"]
    for hook, priority in (("output", -100), ("prerouting", -100)):
        lines.append(f"chain {hook} {{ type nat hook {hook} priority {priority}; {rule}; }}")
    if source:
        lines.append(
            f"chain post {{ type nat hook postrouting priority 100; udp dport {PORT} masquerade; }}"
        )
    node.namespace.run("nft", "\n".join([*lines, "}"]))
    try:
        yield
    finally:
        node.namespace.run("nft", f"delete table {version} own")


@contextlib.contextmanager
def overlay(scene: Scene) -> Iterator[None]:
    """What goes from one node's pods (and from the node) to the other's goes through VXLAN."""
    pairs = (scene.nodes, scene.nodes[::-1])
    for node, other in pairs:
        name = node.namespace.name
        ip(
            f"-n {name} link add vx0 type vxlan id 7 dstport 4789 local {node.address} remote {other.address} dev eth0",
            f"-n {name} link set vx0 up",
            f"-n {name} addr add 10.245.0.{node.number}/24 dev vx0",
            f"-n {name} route replace 10.244.{other.number}.0/24 via 10.245.0.{other.number} dev vx0",
        )
    try:
        yield
    finally:
        for node, other in pairs:
            name = node.namespace.name
            ip(
                f"-n {name} route replace 10.244.{other.number}.0/24 via {other.address}",
                f"-n {name} link del vx0",
            )


def assert_only_others_are_reported(
    scene: Scene, collector: CollectorThread, address: str, ports: Set[int] = frozenset({4000})
) -> None:
    """With this collector address, traffic is reported, to these ports, and no report is."""
    shown = f'"{address}"'
    objects = scenes.COLLECTOR.format(address=address, port=PORT).replace(f'"{shown}"', shown)
    for agent in scene.agents:
        agent.change(objects + EVERYTHING)
    client, server = scene.pods()
    with traffic.udp_sink(server.namespace, server.address, 4000):
        traffic.send_udp(client.namespace, server.address, 4000, count=100, pause_s=0.002)
    deadline = time.monotonic() + 10
    while collector.total < 5:
        assert time.monotonic() < deadline, "no reports come"
        time.sleep(0.05)
    time.sleep(QUIET_S)
    before = collector.total
    time.sleep(SILENCE_S)
    assert collector.total == before
    assert {r["inner"]["destinationPort"] for r in collector.records("flow")} == ports
    for agent in scene.agents:
        agent.change(scene.objects(scenes.NOTHING))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("where", ["outside", "pod"])
def test_reports_to_an_address_are_not_watched(scene, where, version):
    with collecting(scene, where, version) as (collector, address):
        assert_only_others_are_reported(scene, collector, address)


@pytest.mark.parametrize("source", [False, True], ids=["destination", "both"])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("where", ["outside", "pod"])
def test_reports_that_nat_translates_are_not_watched(scene, where, version, source):
    """A LoadBalancer's or a Service's address, which the sending node translates."""
    service = SERVICE if version == 4 else SERVICE6
    with collecting(scene, where, version) as (collector, address), contextlib.ExitStack() as stack:
        for node in scene.nodes:
            stack.enter_context(translated(node, service, address, source=source))
            route = (
                "via",
                scene.lab.collector_address if version == 4 else scene.lab.collector_address6,
            )
            node.namespace.run("ip", f"-{version}", "route", "replace", service, *route)
        assert_only_others_are_reported(scene, collector, service)


def test_reports_to_a_node_port_are_not_watched(scene):
    """Another node's address, which that node translates to a pod of its own."""
    node = scene.nodes[-1]
    with collecting(scene, "pod", 4) as (collector, address):
        with translated(node, node.address, address, source=False):
            assert_only_others_are_reported(scene, collector, node.address)


def test_reports_through_a_tunnel_are_not_watched(scene):
    with collecting(scene, "pod", 4) as (collector, address), overlay(scene):
        # the tunnel carries the traffic as well
        assert_only_others_are_reported(scene, collector, address, frozenset({4000, 4789}))


def test_reports_to_a_mapped_address_are_not_watched(scene):
    with collecting(scene, "outside", 4) as (collector, address):
        assert_only_others_are_reported(scene, collector, f"::ffff:{address}")


@pytest.mark.parametrize("known", [False, True])
def test_socket_of_the_agent_is_not_watched(known):
    """Whatever it sends: what it sends into an encrypted tunnel has nothing of a report."""
    with Lab(nodes=1, pods=1) as lab, datapaths.loaded(lab.nodes[0].namespace) as datapath:
        node = lab.nodes[0]
        datapath.attach("eth0")
        datapath.watch([datapaths.everything()])
        datapath.enable()
        with node.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            senders.SendingSockets(own_sockets.OwnSockets(datapath.maps).replace).add(sender)
            if not known:
                own_sockets.OwnSockets(datapath.maps).replace(frozenset())
            for _ in range(100):
                sender.sendto(b"x" * 100, (lab.collector_address, PORT))
        reports = [v05.decode(data) for data in datapath.drain()]
        sent = [r for r in reports if inner.parse(r.packet).destination_port == PORT]
        assert len(sent) == (0 if known else 100)
