# SPDX-License-Identifier: Apache-2.0
"""The bytes in a drop report are those of the packet that died, whatever state the kernel had it in."""

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator

import pytest

from hostint_agent import bpf_types, classifier
from tests.lab import datapath as datapaths
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


SERVICE = {4: "10.96.0.7", 6: "fd96::7"}


@contextlib.contextmanager
def service(stage: Stage, version: int) -> Iterator[None]:
    """An address that the node translates to that of a pod on the other node, whose packets the firewall then drops."""
    table, target = "ip" if version == 4 else "ip6", stage.far.ip(version)
    rule = f"{table} testnat pre {table} daddr {SERVICE[version]}"
    stage.host.run("nft", f"add table {table} testnat")
    try:
        chain = "{ type nat hook prerouting priority -100; }"
        stage.host.run("nft", f"add chain {table} testnat pre {chain}")
        stage.host.run("nft", f"add rule {rule} udp dport {PORT} dnat to {_at(target)}:{PORT + 1}")
        with stage.nft("hook forward priority 0", f"udp dport {PORT + 1} drop"):
            yield
    finally:
        stage.host.run("nft", f"delete table {table} testnat")


def _at(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def rules(stage: Stage, version: int, **actions: str) -> list[classifier.Rule]:
    """Rules for the address of the service, and for that of the pod behind it."""
    addresses = {"service": SERVICE[version], "pod": stage.far.ip(version)}
    return [
        classifier.Rule(
            number,
            1,
            bpf_types.RuleAction[actions[which]],
            destinations=(ipaddress.ip_network(addresses[which]),),
        )
        for number, which in enumerate(actions, start=1)
    ]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("watched", ["service", "pod", "both"])
def test_a_translated_packet_that_dies_is_reported_by_the_tuple_that_matched(
    stage, version, watched
):
    """As a flow report would have it: the one that it has now, if any rule is for that, else the one that it came with."""
    names = ("service", "pod") if watched == "both" else (watched,)
    watch = rules(stage, version, **dict.fromkeys(names, "REPORT"))
    stage.datapath.watch(watch, {1: datapaths.policy(interval_ns=10**12)})
    with service(stage, version):
        send = lambda: stage.send(stage.client.namespace, SERVICE[version])  # noqa: E731
        outcome = stage.outcome(send, 1)
    assert outcome.counters["watched"] == outcome.counters["dropped"] == 1
    (report,) = outcome.reports
    packet = deaths.inner_of(report)
    expected = (
        (SERVICE[version], PORT) if watched == "service" else (stage.far.ip(version), PORT + 1)
    )
    assert (packet.destination_address, packet.destination_port) == expected
    assert packet.source_address == stage.client.ip(version)
    assert report.packet.endswith(traffic.payload(0))
    if version == 4:
        assert raw_packets.checksum(report.packet[ETHERNET_BYTES : ETHERNET_BYTES + 20]) == 0


@pytest.mark.parametrize("version", [4, 6])
def test_a_translated_packet_that_is_ignored_now_was_never_watched(stage, version):
    """It was counted as it came in; what a rule says of it now decides, and takes that back."""
    stage.datapath.watch(rules(stage, version, service="REPORT", pod="IGNORE"))
    with service(stage, version):
        send = lambda: stage.send(stage.client.namespace, SERVICE[version])  # noqa: E731
        outcome = stage.outcome(send, 1, timeout_s=1)
    assert (outcome.reports, outcome.dead) == ([], 0)
    assert outcome.counters["watched"] == 0
    identity = stage.datapath.counters.identity(1)
    assert (identity.watched_difference, identity.drops_difference) == (0, 0)


@pytest.mark.parametrize("snap_length", [14, 20, 33, 34, 40, 54, 58, 128])
@pytest.mark.parametrize("version", [4, 6])
def test_a_short_snapshot_of_a_translated_packet_is_as_long_as_of_any(stage, snap_length, version):
    collector = bpf_types.Collector(snap_length=snap_length)
    policy = datapaths.policy(interval_ns=10**12)
    stage.datapath.watch(rules(stage, version, service="REPORT"), {1: policy}, {0: collector})
    with service(stage, version):
        send = lambda: stage.send(stage.client.namespace, SERVICE[version])  # noqa: E731
        (report,) = stage.outcome(send, 1).reports
    assert len(report.packet) == min(snap_length, 14 + (20 if version == 4 else 40) + 8 + 64)
