# SPDX-License-Identifier: Apache-2.0
"""What the programs say of single packets, in test runs: a packet comes in, and leaves as what a test makes of it."""

import dataclasses
import ipaddress

import pytest

from hostint_agent import bpf_types, classifier
from hostint_report import inner, v05
from tests.datapath import frames
from tests.datapath.programs import DESTINATION, ROUNDS, SOURCE, Programs, udp, vxlan
from tests.lab import datapath as datapaths

pytestmark = pytest.mark.bpf
REPORT = bpf_types.RuleAction.REPORT


def test_rules_that_change_meanwhile_judge_a_packet_that_leaves(programs):
    """Its tuple is the same, so the verdict that it got on arrival would do, were it not for the rules."""
    frame = udp(80, bytes(16))
    rules = [[classifier.Rule(1, watchlist, REPORT, protocol=frames.UDP)] for watchlist in (1, 2)]
    policies = {watchlist: datapaths.policy() for watchlist in (1, 2)}

    def pass_by() -> None:
        programs.datapath.watch(rules[0], policies)
        programs.come(frame)
        programs.datapath.watch(rules[1], policies)
        programs.leave(frame)

    programs.repeat(pass_by, ROUNDS)
    first, second = (programs.datapath.identity(watchlist) for watchlist in (1, 2))
    assert first.watched_difference == second.watched_difference == 0
    assert first.counters["reported"] == 0
    assert second.counters["reported"] == ROUNDS


def test_reply_like_its_request_in_all_but_direction_is_another_packet(programs):
    """It often gets the memory of the request, of which it may not be seen that it was taken."""
    content = bytes(range(16))
    head = frames.transport(frames.UDP, 7, 7, 0)[:4] + (24).to_bytes(2, "big") + b"\0\0"
    request, reply = (
        frames.ethernet(frames.ipv4(a, b, frames.UDP, head + content))
        for a, b in ((SOURCE, DESTINATION), (DESTINATION, SOURCE))
    )

    def send() -> list[bytes]:
        programs.datapath.watch([datapaths.everything()])
        for _ in range(ROUNDS):
            programs.come(request)
            programs.leave(reply, sent=True)
        return programs.datapath.drain()

    reports = [v05.decode(data) for data in programs.inside(send)]
    assert {(report.ingress_port, report.hop_latency) for report in reports} == {(0, 0)}
    assert len(reports) == ROUNDS
    assert programs.datapath.identity().counters["unverified"] > ROUNDS / 2


INNER_SOURCE, INNER_DESTINATION = b"\x0a\1\0\1", b"\x0a\1\0\2"
INSIDE = udp(80, b"what is inside  ", source=INNER_SOURCE, destination=INNER_DESTINATION)
INSIDE_TCP = frames.ethernet(
    frames.ipv4(INNER_SOURCE, INNER_DESTINATION, frames.TCP, frames.transport(frames.TCP, 9, 80))
)
INNER_SOURCE6, INNER_DESTINATION6 = (b"\xfd" + bytes(14) + n for n in (b"\1", b"\2"))
INSIDE_IPV6 = frames.ethernet(
    frames.ipv6(INNER_SOURCE6, INNER_DESTINATION6, frames.TCP, frames.transport(frames.TCP, 9, 80))
)


def is_whole_tunnel(packet: bytes, length: int = 14 + 20 + 8) -> bool:
    """Return True if this says no more than the tuple of the tunnel, in headers that are right."""
    found = inner.parse(packet)
    return (
        (found.protocol, found.destination_port) == (frames.UDP, frames.VXLAN_PORT)
        and found.source_address == str(ipaddress.ip_address(SOURCE))
        and frames.checksum(packet[14:34]) == 0
        and len(packet) == length
    )


INNER = {"UDP": INSIDE, "TCP": INSIDE_TCP, "IPv6": INSIDE_IPV6}
TUNNEL_PORTS = ((frames.VXLAN_PORT, frames.VXLAN_PORT),)
FOR_TUNNEL = classifier.Rule(1, 1, REPORT, protocol=frames.UDP, destination_ports=TUNNEL_PORTS)
FOR_INNER = [
    classifier.Rule(n, 1, REPORT, protocol=protocol, destination_ports=((80, 80),))
    for n, protocol in enumerate((frames.UDP, frames.TCP), start=1)
]


@pytest.mark.parametrize("inside", INNER.values(), ids=INNER)
def test_report_of_a_tunnel_that_ended_shows_the_tunnel(programs, inside):
    def pass_by() -> None:
        programs.come(vxlan(inside))
        programs.leave(inside)

    programs.datapath.watch([FOR_TUNNEL])
    for report in programs.repeat(pass_by, ROUNDS):
        assert is_whole_tunnel(report.packet)


@pytest.mark.parametrize("inside", INNER.values(), ids=INNER)
def test_report_of_what_went_into_a_tunnel_shows_what_is_inside(programs, inside):
    def pass_by() -> None:
        programs.come(inside)
        programs.leave(vxlan(inside))

    programs.datapath.watch(FOR_INNER)
    for report in programs.repeat(pass_by, ROUNDS):
        # the bytes of the Ethernet header inside are not kept
        assert report.packet[14:] == inside[14 : bpf_types.SNAP_BYTES]


def test_report_of_a_tunnel_that_is_passed_on_shows_all_of_it(programs):
    def pass_by() -> None:
        programs.come(vxlan(INSIDE))
        programs.leave(vxlan(INSIDE))

    programs.datapath.watch([FOR_TUNNEL])
    for report in programs.repeat(pass_by, ROUNDS):
        assert report.packet[14:] == vxlan(INSIDE)[14 : bpf_types.SNAP_BYTES]


@pytest.mark.parametrize("inside", INNER.values(), ids=INNER)
def test_what_a_tunnel_delivers_is_reported_for_the_tunnel(programs, inside):
    """The rule is about the tunnel, and a socket of the host takes what was inside."""

    def pass_by() -> None:
        programs.come(vxlan(inside))
        programs.taken(inside)

    programs.datapath.config.set_port_is_ifindex(True)
    programs.datapath.watch([FOR_TUNNEL])
    for report in programs.repeat(pass_by, ROUNDS):
        assert is_whole_tunnel(report.packet)
        assert report.ingress_port > 0
        assert report.egress_port == 0
        assert report.hop_latency > 0


@pytest.mark.parametrize("inside", INNER.values(), ids=INNER)
def test_what_a_tunnel_delivers_is_asked_for_what_was_inside(programs, inside):
    def pass_by() -> None:
        programs.come(vxlan(inside))
        programs.taken(inside)

    # the tunnel itself is in a class only
    source = (ipaddress.ip_network("10.0.0.1/32"),)
    nowhere = (ipaddress.ip_network("192.0.2.1/32"),)
    possible = classifier.Rule(9, 2, REPORT, sources=source, destinations=nowhere)
    programs.datapath.watch([*FOR_INNER, possible])
    for report in programs.repeat(pass_by, ROUNDS):
        assert report.packet[14:] == inside[14 : bpf_types.SNAP_BYTES]


@pytest.mark.parametrize("length", [34, 40, 128])
def test_headers_made_of_a_tuple_are_no_longer_than_a_snapshot(programs, length):
    def pass_by() -> None:
        programs.come(vxlan(INSIDE))
        programs.leave(INSIDE)

    collectors = {0: bpf_types.Collector(snap_length=length)}
    programs.datapath.watch([FOR_TUNNEL], collectors=collectors)
    for report in programs.repeat(pass_by, 1):
        assert len(report.packet) == min(length, 14 + 20 + 8)


def ipv6_udp(destination: bytes) -> bytes:
    """A datagram behind destination options."""
    options = frames.extensions([frames.OPTIONS], frames.UDP, words=1)
    datagram = options + frames.transport(frames.UDP, 7000, 80, 16)
    return frames.ethernet(frames.ipv6(INNER_SOURCE6, destination, frames.OPTIONS, datagram))


def test_ports_are_restored_behind_extension_headers(programs):
    """NAT has changed the destination; the report shows the packet as it came, and all of it."""
    came = ipv6_udp(INNER_DESTINATION6)

    def pass_by() -> None:
        programs.come(came)
        programs.taken(ipv6_udp(b"\xfd" + bytes(14) + b"\x77"))

    network = ipaddress.ip_network(f"{ipaddress.ip_address(INNER_DESTINATION6)}/128")
    programs.datapath.watch([classifier.Rule(1, 1, REPORT, destinations=(network,))])
    for report in programs.repeat(pass_by, ROUNDS):
        assert report.packet[14:] == came[14 : bpf_types.SNAP_BYTES]


LOCAL = v05.LocalReport(5, 77, 123_456, 0x0A630001, 3, 4, 234_567, packet=INSIDE)
DROP = v05.DropReport(37, 78, 123_456, 0x0A630001, 3, 0, 80, packet=INSIDE)
REPORTS = {
    "flow": LOCAL,
    "queue": dataclasses.replace(LOCAL, flow=False, queue=True),
    "both": dataclasses.replace(LOCAL, queue=True),
    "drop": DROP,
    "drop in a queue": dataclasses.replace(DROP, queue=True),
}
# bits of the first word that may be either: D, Q and F are told apart below, hw id
_FREE_BITS = {*range(26, 32)}


def watched(programs: Programs, payloads: list[bytes]) -> int:
    """How many of these UDP payloads are watched."""

    def send() -> None:
        programs.datapath.watch([datapaths.everything()])
        for payload in payloads:
            programs.come(udp(32766, payload))

    programs.inside(send)
    return programs.datapath.identity().counters["watched"]


@pytest.mark.parametrize("name", REPORTS)
def test_report_on_its_way_is_not_watched(programs, name):
    data = v05.encode(REPORTS[name])
    assert watched(programs, [data]) == 0
    frame = vxlan(udp(32766, data))
    programs.inside(lambda: programs.come(frame))
    assert programs.datapath.identity().counters["watched"] == 0


@pytest.mark.parametrize("name", REPORTS)
def test_report_without_a_snapshot_is_not_watched(programs, name):
    """The packet could not be read, or nothing of it is left."""
    data = v05.encode(dataclasses.replace(REPORTS[name], packet=b""))
    assert len(data) in (v05.LOCAL_BYTES, v05.DROP_BYTES)
    assert watched(programs, [data, data[:-1]]) == 1


@pytest.mark.parametrize("name", REPORTS)
def test_what_differs_from_a_report_in_one_bit_is_watched(programs, name):
    data = v05.encode(REPORTS[name])
    # of the first word, of what follows the ports, and of the type of the packet in it
    header = v05.LOCAL_BYTES if isinstance(REPORTS[name], v05.LocalReport) else v05.DROP_BYTES
    fixed = [bit for bit in range(32) if bit not in _FREE_BITS and not 8 <= bit <= 10]
    queue = range(160, 192) if header == v05.LOCAL_BYTES else [*range(160, 168), *range(176, 192)]
    kind = range(8 * (header + 12), 8 * (header + 14))
    changed = []
    for bit in [*fixed, 8, *queue, *kind]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 0x80 >> bit % 8
        changed.append(bytes(flipped))
    assert watched(programs, changed) == len(changed)
