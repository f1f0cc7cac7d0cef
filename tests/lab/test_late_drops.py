# SPDX-License-Identifier: Apache-2.0
"""A queue drops what has left by our hook with neither address that it came with: NAT changed both, or it is in a tunnel."""

import contextlib
import json
import struct
from collections.abc import Iterator

import pytest

from hostint_report import inner
from tests.lab import deaths, raw_packets, traffic
from tests.lab.deaths import PORT, Stage
from tests.lab.namespace import ip

pytestmark = pytest.mark.lab
COUNT = 60
SERVICE = "10.96.0.10"
# room for a few packets, and one that leaves every second
QUEUE = "tbf rate 8kbit burst 1600 limit 3000"


@pytest.fixture
def stage() -> Iterator[Stage]:
    with deaths.stage("routed") as built:
        yield built


@contextlib.contextmanager
def translated(stage: Stage) -> Iterator[str]:
    """A Service, and the node's own address as source."""
    lines = (
        "table ip both {",
        "chain pre { type nat hook prerouting priority dstnat;",
        f"ip daddr {SERVICE} dnat to {stage.far.address}; }}",
        "chain post { type nat hook postrouting priority srcnat;",
        f"ip daddr {stage.far.address} masquerade; }}",
        "}",
    )
    stage.host.run("nft", "\n".join(lines))
    yield SERVICE


@contextlib.contextmanager
def tunnelled(stage: Stage) -> Iterator[str]:
    """The way to the other node's pods is through VXLAN."""
    for node, other in (stage.lab.nodes, stage.lab.nodes[::-1]):
        name = node.namespace.name
        ip(
            f"-n {name} link add vx0 type vxlan id 7 dstport 4789 local {node.address} remote {other.address} dev eth0",
            f"-n {name} link set vx0 up",
            f"-n {name} addr add 10.245.0.{node.number}/24 dev vx0",
            f"-n {name} route replace 10.244.{other.number}.0/24 via 10.245.0.{other.number} dev vx0",
        )
    # neighbours of the tunnel are known before its queue is full
    assert traffic.ping(stage.client.namespace, stage.far.address)
    yield stage.far.address


def _offered(stage: Stage) -> int:
    """Packets that came to the queue of eth0: sent, waiting and dropped."""
    shown = stage.host.run("tc", "-s", "-j", "qdisc", "show", "dev", "eth0", "root")
    (queue,) = json.loads(shown)
    return queue["packets"] + queue["qlen"] + queue["drops"]


def segments(stage: Stage, address: str, count: int) -> None:
    """TCP to PORT, of no connection."""
    source = stage.client.address
    head = struct.pack("!HHIIBBHHH", stage.fresh_port(), PORT, 1, 0, 0x50, 0x10, 100, 0, 0)
    packet = raw_packets.packet(source, address, raw_packets.TCP, head + bytes(64))
    for number in range(count):
        # Of one identification they would be one packet to us.
        numbered = packet[:4] + number.to_bytes(2, "big") + packet[6:10] + bytes(2) + packet[12:]
        whole = raw_packets.checksum(numbered[:20]).to_bytes(2, "big")
        stage.send_frames([numbered[:10] + whole + numbered[12:]])


def test_late_drop_of_tcp_in_a_tunnel_shows_what_is_inside(stage):
    """The packet that is dropped has another protocol than the one that matched."""
    with tunnelled(stage) as address, stage.queue("eth0", QUEUE) as dropped:
        outcome = stage.outcome(lambda: segments(stage, address, COUNT), lambda: dropped())
        assert outcome.counters["dropped_late"] > COUNT / 6
    (report,) = outcome.reports
    packet = inner.parse(report.packet)
    assert (packet.source_address, packet.destination_address) == (
        stage.client.address,
        stage.far.address,
    )
    assert (packet.protocol, packet.destination_port) == (raw_packets.TCP, PORT)
    assert report.egress_port == stage.node.port("eth0")


@pytest.mark.parametrize("way", [translated, tunnelled])
def test_late_drop_of_a_rewritten_packet_is_reported(stage, way):
    with way(stage) as address, stage.queue("eth0", QUEUE) as dropped:
        outcome = stage.outcome(
            lambda: stage.send(stage.client.namespace, address, COUNT), lambda: dropped()
        )
        # what the kernel sends of its own accord (MLD, ARP) may be among the dropped: no more than came besides ours
        offered, refused = _offered(stage), dropped()
        assert offered >= COUNT
        assert refused - (offered - COUNT) <= outcome.counters["dropped_late"] <= refused
        assert outcome.counters["dropped_late"] > COUNT / 6
    (report,) = outcome.reports
    packet = inner.parse(report.packet)
    # what is in the rule: the packet as it left, and not the tunnel that it was in by then
    source = stage.node.address if way is translated else stage.client.address
    assert (packet.source_address, packet.destination_address) == (source, stage.far.address)
    assert packet.destination_port == PORT
    assert report.ingress_port == stage.node.port(stage.client.interface)
    assert report.egress_port == stage.node.port("eth0")
    assert report.drop_reason == 71
