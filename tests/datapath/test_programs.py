# SPDX-License-Identifier: Apache-2.0
"""What the programs say of single packets, in test runs: a packet comes in, and leaves as what a test makes of it."""

import dataclasses
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hostint_agent import bpf_types, classifier
from hostint_report import inner, v05
from tests.datapath import frames, runner
from tests.lab import datapath as datapaths
from tests.lab.namespace import Namespace, ip

pytestmark = pytest.mark.bpf
INTERFACE = "one0"
SOURCE, DESTINATION = b"\x0a\0\0\1", b"\x0a\0\0\2"
ROUNDS = 40
REPORT = bpf_types.RuleAction.REPORT


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    name = f"hl{os.getpid()}-programs"
    ip(f"netns add {name}", f"-n {name} link add {INTERFACE} type veth peer name one1")
    yield Namespace(name)
    ip(f"netns del {name}")


class Programs:
    """Runs the TC programs on one CPU, in a namespace; the memory of a packet is seldom not that of the one before."""

    def __init__(self, namespace: Namespace, datapath: datapaths.Datapath) -> None:
        self.namespace = namespace
        self.datapath = datapath
        names = ("ingress", "egress", "deliver")
        self._fds = {name: datapath.program(name) for name in names}
        self._runners = {name: runner.Runner(fd) for name, fd in self._fds.items()}
        self._index = namespace.inside(lambda: socket.if_nametoindex(INTERFACE))

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def come(self, frame: bytes) -> None:
        assert self._runners["ingress"].run(frame, runner.context(ifindex=self._index)) == -1

    def leave(self, frame: bytes, *, sent: bool = False) -> None:
        """Forwarded, or sent by the host."""
        given = runner.context(ifindex=self._index, ingress_ifindex=0 if sent else self._index)
        assert self._runners["egress"].run(frame, given) == -1

    def taken(self, frame: bytes) -> None:
        """A socket takes it."""
        assert self._runners["deliver"].run(frame, runner.context()) == 1

    def inside(self, work: Callable[[], Any]) -> Any:
        """Do this in the namespace, on one CPU."""

        def pinned() -> Any:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            return work()

        return self.namespace.inside(pinned)


@pytest.fixture
def programs(namespace) -> Iterator[Programs]:
    before = os.sched_getaffinity(0)
    with datapaths.loaded(namespace) as datapath:
        datapath.enable()
        made = Programs(namespace, datapath)
        yield made
        made.close()
    os.sched_setaffinity(0, before)


def udp(
    port: int, payload: bytes = b"", *, source: bytes = SOURCE, destination: bytes = DESTINATION
) -> bytes:
    """A frame with a UDP datagram."""
    head = frames.transport(frames.UDP, 40000, port, 0)[:4]
    datagram = head + (8 + len(payload)).to_bytes(2, "big") + b"\0\0" + payload
    return frames.ethernet(frames.ipv4(source, destination, frames.UDP, datagram))


def test_rules_that_change_meanwhile_judge_a_packet_that_leaves(programs):
    """Its tuple is the same, so the verdict that it got on arrival would do, were it not for the rules."""
    frame = udp(80, bytes(16))
    rules = [[classifier.Rule(1, watchlist, REPORT, protocol=frames.UDP)] for watchlist in (1, 2)]
    policies = {watchlist: datapaths.policy() for watchlist in (1, 2)}

    def send() -> None:
        for _ in range(ROUNDS):
            programs.datapath.watch(rules[0], policies)
            programs.come(frame)
            programs.datapath.watch(rules[1], policies)
            programs.leave(frame)

    programs.inside(send)
    first, second = (programs.datapath.identity(watchlist) for watchlist in (1, 2))
    assert first.watched_difference == second.watched_difference == 0
    assert first.counters["reported"] == 0
    assert second.counters["reported"] > ROUNDS / 2


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


def vxlan(frame: bytes) -> bytes:
    return udp(
        frames.VXLAN_PORT, (8 << 24).to_bytes(4, "big") + (7 << 8).to_bytes(4, "big") + frame
    )


INSIDE = udp(80, b"what is inside  ", source=b"\x0a\1\0\1", destination=b"\x0a\1\0\2")


@pytest.mark.parametrize(
    ("came", "left", "port", "shown"),
    [
        pytest.param(vxlan(INSIDE), INSIDE, frames.VXLAN_PORT, None, id="the tunnel it has left"),
        pytest.param(INSIDE, vxlan(INSIDE), 80, INSIDE, id="what is in the tunnel"),
        pytest.param(
            vxlan(INSIDE), vxlan(INSIDE), frames.VXLAN_PORT, vxlan(INSIDE), id="passed on"
        ),
    ],
)
def test_report_of_a_tunnel_shows_what_matched(programs, came, left, port, shown):
    ports = ((port, port),)
    rule = classifier.Rule(1, 1, REPORT, protocol=frames.UDP, destination_ports=ports)

    def send() -> list[bytes]:
        programs.datapath.watch([rule])
        for _ in range(ROUNDS):
            programs.come(came)
            programs.leave(left)
        return programs.datapath.drain()

    reports = [v05.decode(data) for data in programs.inside(send)]
    assert len(reports) > ROUNDS * 0.8
    for report in reports:
        packet = inner.parse(report.packet)
        assert (packet.protocol, packet.destination_port) == (frames.UDP, port)
        if shown:
            assert report.packet[14:] == shown[14 : bpf_types.SNAP_BYTES]
        else:
            # nothing but the tuple, in headers that are right
            assert packet.source_address == str(ipaddress.ip_address(SOURCE))
            assert frames.checksum(report.packet[14:34]) == 0
            assert len(report.packet) == 14 + 20 + 8


def test_what_a_tunnel_delivers_is_reported_for_the_tunnel(programs):
    """The rule is about the tunnel, and a socket of the host takes what was inside."""
    ports = ((frames.VXLAN_PORT, frames.VXLAN_PORT),)
    rule = classifier.Rule(1, 1, REPORT, protocol=frames.UDP, destination_ports=ports)

    def send() -> list[bytes]:
        programs.datapath.config.set_port_is_ifindex(True)
        programs.datapath.watch([rule])
        for _ in range(ROUNDS):
            programs.come(vxlan(INSIDE))
            programs.taken(INSIDE)
        return programs.datapath.drain()

    reports = [v05.decode(data) for data in programs.inside(send)]
    assert len(reports) > ROUNDS / 2
    for report in reports:
        packet = inner.parse(report.packet)
        assert packet.source_address == str(ipaddress.ip_address(SOURCE))
        assert packet.destination_port == frames.VXLAN_PORT
        assert len(report.packet) == 14 + 20 + 8
        assert (report.ingress_port > 0, report.egress_port, report.hop_latency > 0) == (
            True,
            0,
            True,
        )


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
