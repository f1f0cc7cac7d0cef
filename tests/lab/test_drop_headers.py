# SPDX-License-Identifier: Apache-2.0
"""The bytes in a drop report are those of the packet that died, whatever state the kernel had it in."""

import socket
import struct
from collections.abc import Iterator

import pytest

from tests.lab import deaths, raw_packets, traffic
from tests.lab.deaths import PORT, Stage

pytestmark = pytest.mark.lab
ETHERNET_BYTES = 14
# the ends of the Ethernet header, the IP headers and the UDP header, one less and one more; the limits of snapLength
SNAP_LENGTHS = (34, 35, 41, 42, 43, 53, 54, 55, 61, 62, 63, 127, 128)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with deaths.stage("routed") as built:
        yield built
        built.watch()


def datagram(stage: Stage, version: int, data: bytes) -> bytes:
    here, there = stage.client.ip(version), stage.far.ip(version)
    content = raw_packets.udp(here, there, (stage.fresh_port(), PORT), data)
    return raw_packets.packet(here, there, raw_packets.UDP, content)


def on_the_wire(stage: Stage, packet: bytes) -> bytes:
    own = raw_packets.mac(stage.client.namespace, "eth0")
    return raw_packets.frame(own, raw_packets.mac(stage.host, stage.gateway), packet)


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("snap_length", SNAP_LENGTHS)
def test_the_snapshot_is_the_frame_as_far_as_snap_length_goes(stage, snap_length, version):
    """Longer and shorter packets than the snapshot; nothing of the one before is left behind the shorter."""
    stage.watch(snap_length)
    packets = [datagram(stage, version, bytes(range(n))) for n in (200, 0, 30)]
    with stage.nft("hook prerouting priority -300", f"udp dport {PORT} drop"):
        outcome = stage.outcome(lambda: stage.send_frames(packets), len(packets))
    frames = [on_the_wire(stage, packet)[:snap_length] for packet in packets]
    assert [report.packet for report in outcome.reports] == frames


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("snap_length", [34, 60, 128])
def test_a_packet_without_an_ethernet_header_gets_one_of_zeros(stage, snap_length, version):
    """A tun device has none: there the kernel's packet begins with IP."""
    stage.watch(snap_length)
    target = "10.203.0.1" if version == 4 else "fd23::1"
    with (
        stage.unread_device(),
        stage.commands((f"ip -{version} route add {target} dev t0", "")),
    ):
        traffic.send_udp(stage.client.namespace, target, PORT + 1, count=4)
        send = lambda: stage.send(stage.client.namespace, target)  # noqa: E731
        outcome = stage.outcome(send, 1)
    assert outcome.reasons == {"FULL_RING": 1}
    (report,) = outcome.reports
    kind = b"\x08\x00" if version == 4 else b"\x86\xdd"
    assert report.drop_reason == 71
    assert report.packet[:ETHERNET_BYTES] == bytes(12) + kind
    length = ETHERNET_BYTES + (20 if version == 4 else 40) + 8 + len(traffic.payload(0))
    assert len(report.packet) == min(snap_length, length)
    if snap_length == 128:
        assert deaths.inner_of(report).destination_address == target
        assert report.packet.endswith(traffic.payload(0))


@pytest.mark.parametrize("version", [4, 6])
def test_a_large_tcp_packet_shows_its_headers(stage, version):
    """Its payload lies outside of the linear part: the report ends before it, and says that more was there."""
    stage.watch()
    family = traffic.family_of(stage.far.ip(version))
    server = stage.far.namespace.socket(family, socket.SOCK_STREAM)
    with server, stage.client.namespace.socket(family, socket.SOCK_STREAM) as client:
        server.bind((stage.far.ip(version), PORT))
        server.listen()
        client.connect((stage.far.ip(version), PORT))
        rule = f"tcp dport {PORT} meta length > 3000 counter drop"
        with stage.nft("hook forward priority 0", rule) as died:
            outcome = stage.outcome(lambda: client.send(b"x" * 20_000), died)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        port = client.getsockname()[1]
    (report,) = outcome.reports
    packet = deaths.inner_of(report)
    assert (packet.source_port, packet.destination_port) == (port, PORT)
    assert (packet.source_address, packet.destination_address) == (
        stage.client.ip(version),
        stage.far.ip(version),
    )
    assert (packet.protocol_name, packet.truncated) == ("TCP", True)
    assert packet.length is not None
    assert packet.length > 3000
    assert ETHERNET_BYTES + (40 if version == 4 else 60) <= len(report.packet) <= 128


@pytest.mark.parametrize("version", [4, 6])
def test_a_translated_packet_that_is_watched_either_way_is_reported_as_it_died(stage, version):
    """With the address that it was given, as a flow report would have it."""
    stage.watch()
    table = "ip" if version == 4 else "ip6"
    service = "10.96.0.7" if version == 4 else "fd96::7"
    target = stage.far.ip(version)
    stage.host.run("nft", f"add table {table} testnat")
    try:
        chain = "{ type nat hook prerouting priority -100; }"
        stage.host.run("nft", f"add chain {table} testnat pre {chain}")
        stage.host.run(
            "nft", f"add rule {table} testnat pre {table} daddr {service} dnat to {target}"
        )
        with stage.nft("hook forward priority 0", f"udp dport {PORT} drop"):
            send = lambda: stage.send(stage.client.namespace, service)  # noqa: E731
            outcome = stage.outcome(send, 1)
    finally:
        stage.host.run("nft", f"delete table {table} testnat")
    (report,) = outcome.reports
    packet = deaths.inner_of(report)
    assert (packet.destination_address, packet.destination_port) == (target, PORT)
    assert report.packet.endswith(traffic.payload(0))
