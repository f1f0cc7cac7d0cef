# SPDX-License-Identifier: Apache-2.0
"""Where a device above the NIC has the node's address, each packet is counted once, at the NIC."""

import json
import time
from collections.abc import Callable, Iterator

import pytest

from tests.lab import scene as scenes
from tests.lab import traffic
from tests.lab.namespace import ip
from tests.lab.scene import Scene

pytestmark = pytest.mark.lab
COUNT = 100
PODS = scenes.watchlist(
    "protocol: UDP, source: {cidrs: [10.244.0.0/16]}\n"
    "protocol: UDP, destination: {cidrs: [10.244.0.0/16]}",
    "interval: 10ms, latencyChange: 1ns, events: [Flow, Drop]",
)


def above_eth0(scene: Scene, kind: str) -> None:
    """Move the node's address to a macvlan, or a bridge, above eth0."""
    node = scene.nodes[0]
    name = node.namespace.name
    lines = [f"-n {name} addr flush dev eth0 scope global"]
    if kind == "macvlan":
        lines += [f"-n {name} link add host0 link eth0 type macvlan mode bridge"]
    else:
        lines += [f"-n {name} link add host0 type bridge", f"-n {name} link set eth0 master host0"]
    lines += [
        f"-n {name} addr add {node.address}/24 dev host0",
        f"-n {name} link set host0 up",
        f"-n {name} route add default via {scene.lab.collector_address} dev host0",
    ]
    ip(*lines, f"-n {scene.lab.collector.name} neigh flush dev eth0")


@pytest.fixture(scope="module", params=["macvlan", "bridge"])
def scene(request) -> Iterator[Scene]:
    with scenes.scene("routed", 1) as built:
        above_eth0(built, request.param)
        built.watch(PODS)
        deadline = time.monotonic() + 10
        while attached(built) != {"eth0", "pod0", "pod1"}:
            assert time.monotonic() < deadline, attached(built)
            time.sleep(0.05)
        # neighbours are known before anything is counted
        to_pod(built)
        from_pod(built)
        yield built


def attached(scene: Scene) -> set[str]:
    links = json.loads(scene.agents[0].get("/api/v1/topology"))["links"]
    return {link["name"] for link in links if link["attached"]}


def to_pod(scene: Scene) -> int:
    pod = scene.nodes[0].pods[0]
    with traffic.udp_sink(pod.namespace, pod.address, 5000):
        return traffic.send_udp(scene.lab.collector, pod.address, 5000, count=COUNT, pause_s=0.001)


def from_pod(scene: Scene) -> int:
    pod, address = scene.nodes[0].pods[0], scene.lab.collector_address
    with traffic.udp_sink(scene.lab.collector, address, 5001):
        return traffic.send_udp(pod.namespace, address, 5001, count=COUNT, pause_s=0.001)


@pytest.mark.parametrize("send", [to_pod, from_pod], ids=lambda f: f.__name__)
def test_a_packet_that_passes_a_stack_is_counted_once(scene, send: Callable[[Scene], int]):
    node, agent = scene.nodes[0], scene.agents[0]
    before = agent.settled().counters
    port = send(scene)
    after = agent.settled().counters
    grown = {name: count - before[name] for name, count in after.items() if count != before[name]}
    assert grown["watched"] == COUNT
    assert "unresolved" not in grown, grown
    report = scene.wait_reports(node, sourcePort=port)[0]
    pod, uplink = node.port(node.pods[0].interface), node.port("eth0")
    ports = (uplink, pod) if send is to_pod else (pod, uplink)
    assert (report["ingressPort"], report["egressPort"]) == ports
