# SPDX-License-Identifier: Apache-2.0
"""Every way in which a node drops packets: reason, INT code, function, one report, all counted.

docs/drop-reasons.md has the same for people.
"""

import contextlib
import fcntl
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hostint_agent import bpf_calls
from tests.lab import deaths, raw_packets, traffic
from tests.lab.deaths import PORT, Arrangement, Stage

pytestmark = pytest.mark.lab
_SO_RCVBUFFORCE = 33
COUNT = 3
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PROBE = 10, 23, 3
Sender = Callable[[Stage, int], object]
Arrange = Callable[[Stage, int], Arrangement]


@pytest.fixture(scope="module")
def bridged() -> Iterator[Stage]:
    with deaths.stage("bridged") as built:
        yield built


@pytest.fixture(scope="module")
def routed() -> Iterator[Stage]:
    with deaths.stage("routed") as built:
        yield built


def to(stage: Stage, version: int, place: str) -> str:
    """Addresses by name."""
    return {
        "far": stage.far.ip(version),
        "beside": stage.server.ip(version),
        "host": stage.address(version),
        "nowhere": "10.200.0.1" if version == 4 else "fd20::1",
        "refused": "10.201.0.1" if version == 4 else "fd21::1",
        "silent": "10.99.0.250" if version == 4 else "fd99::fa",
    }[place]


# -- senders: each sends COUNT packets of one flow --


def datagrams(
    place: str = "far", *, size: int = 64, count: int = COUNT, ttl: int | None = None
) -> Sender:
    """From a socket of the client, with DF where that exists."""

    def send(stage: Stage, version: int) -> None:
        six = version == 6
        family = socket.AF_INET6 if six else socket.AF_INET
        level = socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP
        with stage.client.namespace.socket(family, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(level, _IPV6_MTU_DISCOVER if six else _IP_MTU_DISCOVER, _PROBE)
            if ttl is not None:
                sender.setsockopt(level, socket.IPV6_UNICAST_HOPS if six else socket.IP_TTL, ttl)
            sender.bind(("::" if six else "0.0.0.0", stage.fresh_port()))
            for number in range(count):
                sender.sendto(traffic.payload(number, size), (to(stage, version, place), PORT))

    return send


def udp_packets(
    place: str = "far", *, source: str = "", destination: str = "", wrong: bool = False, **how: bool
) -> Sender:
    """Byte by byte, to the gateway; `how` is that of `raw_packets.packet`."""

    def send(stage: Stage, version: int) -> None:
        there = destination or to(stage, version, place)
        here = source or stage.client.ip(version)
        ports = (stage.fresh_port(), PORT)
        content = raw_packets.udp(here, there, ports, b"hostint-lab", wrong=wrong)
        stage.send_frames(
            [raw_packets.packet(here, there, raw_packets.UDP, content, **how)] * COUNT
        )

    return send


def acknowledgements(stage: Stage, version: int) -> None:
    """TCP segments of no connection."""
    here, there, port = stage.client.ip(version), stage.far.ip(version), stage.fresh_port()
    segments = [raw_packets.tcp_ack(here, there, (port, PORT), n) for n in range(COUNT)]
    stage.send_frames([raw_packets.packet(here, there, raw_packets.TCP, s) for s in segments])


def connection_attempts(stage: Stage, version: int) -> None:
    """TCP connections to where nobody listens, from one port."""
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    port = stage.fresh_port()
    for _ in range(COUNT):
        with stage.client.namespace.socket(family, socket.SOCK_STREAM) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind((stage.client.ip(version), port))
            with pytest.raises(ConnectionRefusedError):
                client.connect((stage.address(version), PORT))


def unknown_protocol(stage: Stage, version: int) -> None:
    """A protocol that no one handles, for the host."""
    here, there = stage.client.ip(version), stage.address(version)
    stage.send_frames([raw_packets.packet(here, there, deaths.NO_SUCH_PROTOCOL, b"x" * 40)] * COUNT)


def beside(stage: Stage, version: int, mac: str = "") -> None:
    """Bridged frames to the pod beside, whose MAC may be another's."""
    here, there, port = stage.client.ip(version), stage.server.ip(version), stage.fresh_port()
    content = raw_packets.udp(here, there, (port, PORT), b"hostint-lab")
    mac = mac or raw_packets.mac(stage.server.namespace, "eth0")
    stage.send_frames([raw_packets.packet(here, there, raw_packets.UDP, content)] * COUNT, mac)


def to_a_stranger(stage: Stage, version: int) -> None:
    """A destination MAC that nobody has."""
    beside(stage, version, "02:aa:bb:cc:dd:ee")


# -- arrangements: what makes the packets die --


def nothing(stage: Stage, version: int) -> Arrangement:
    return contextlib.nullcontext()


def nft(hook: str, rule: str, family: str = "inet") -> Arrange:
    return lambda stage, version: stage.nft(hook, rule, family)


def forward(rule: str) -> Arrange:
    return nft("hook forward priority 0", rule)


def nft_at_the_device(stage: Stage, version: int) -> Arrangement:
    hook = f"hook ingress device {stage.client.interface} priority 0"
    return stage.nft(hook, f"udp dport {PORT} drop")


def iptables(binary: str, verdict: str) -> Arrange:
    def arrange(stage: Stage, version: int) -> Arrangement:
        command = binary if version == 4 else binary.replace("ip", "ip6", 1)
        rule = f"FORWARD -p udp --dport {PORT} -j {verdict}"
        return stage.commands((f"{command} -A {rule}", f"{command} -D {rule}"))

    return arrange


@contextlib.contextmanager
def strict_connection_tracking(stage: Stage, version: int) -> Iterator[None]:
    with (
        stage.nft("hook forward priority 0", "ct state invalid drop"),
        stage.sysctl(net__netfilter__nf_conntrack_tcp_loose=0),
    ):
        yield


def route(kind: str) -> Arrange:
    def arrange(stage: Stage, version: int) -> Arrangement:
        verb = f"ip -{version} route %s {kind} {to(stage, version, 'refused')}"
        return stage.commands((verb % "add", verb % "del"))

    return arrange


def reverse_path_filter(stage: Stage, version: int) -> Arrangement:
    return stage.sysctl(**{f"net__ipv4__conf__{stage.gateway}__rp_filter": 1})


def small_mtu(stage: Stage, version: int) -> Arrangement:
    return stage.commands(("ip link set eth0 mtu 1280", "ip link set eth0 mtu 1500"))


def impatient_neighbours(**more: int) -> Arrange:
    def arrange(stage: Stage, version: int) -> Arrangement:
        family = "ipv4" if version == 4 else "ipv6"
        values = {"mcast_solicit": 1, "retrans_time_ms": 50} | more
        return stage.sysctl(**{f"net__{family}__neigh__eth0__{n}": v for n, v in values.items()})

    return arrange


def tcx(interface: Callable[[Stage], str], kind: int) -> Arrange:
    return lambda stage, version: stage.shot_by_tcx(interface(stage), kind)


def clsact(interface: Callable[[Stage], str], direction: str) -> Arrange:
    return lambda stage, version: stage.shot_by_clsact(interface(stage), direction)


def in_port(stage: Stage) -> str:
    return stage.client.interface


def out_port(stage: Stage) -> str:
    return "eth0"


def bridge_port(setting: str, value: str, back: str, *ports: int) -> Arrange:
    def arrange(stage: Stage, version: int) -> Arrangement:
        names = [stage.node.pods[port].interface for port in ports]
        verb = "bridge link set dev {} {} {}"
        pairs = [(verb.format(n, setting, value), verb.format(n, setting, back)) for n in names]
        return stage.commands(*pairs)

    return arrange


@contextlib.contextmanager
def locked_port(stage: Stage, version: int) -> Iterator[None]:
    """A port that takes only frames of senders that an administrator has let in."""
    port = f"bridge link set dev {stage.client.interface}"
    own = raw_packets.mac(stage.client.namespace, "eth0")
    forget = f"bridge fdb del {own} dev {stage.client.interface} master"
    with stage.commands((f"{port} learning off locked on", f"{port} learning on locked off")):
        stage.host.run(*forget.split(), check=False)
        yield


@contextlib.contextmanager
def full_socket(stage: Stage, version: int) -> Iterator[None]:
    """A socket of the host that has no room left."""
    with traffic.udp_sink(stage.host, stage.address(version), PORT) as sink:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        with stage.host.socket(sink.family, socket.SOCK_DGRAM) as filler:
            for _ in range(8):
                filler.sendto(b"x" * 1000, (stage.address(version), PORT))
        yield


@contextlib.contextmanager
def no_udp_memory(stage: Stage, version: int) -> Iterator[None]:
    """What all sockets together may take is used up: one gets no more than the least that every one gets.

    The limit is the machine's, so it is put back even if this process is killed, by a child that reads to the end; and
    one session at a time may change it.
    """
    limit = Path("/proc/sys/net/ipv4/udp_mem")
    address = stage.address(version)
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(limit.open())
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = limit.read_text()
        undo = ["sh", "-c", 'cat >/dev/null; echo "$1" >"$2"', "undo", before, str(limit)]
        stack.enter_context(_without_udp_memory(stage, address, limit, undo))
        yield


@contextlib.contextmanager
def _without_udp_memory(stage: Stage, address: str, limit: Path, undo: list[str]) -> Iterator[None]:
    with (
        traffic.udp_sink(stage.host, address, PORT),
        traffic.udp_sink(stage.host, address, PORT + 1) as hoard,
        stage.sysctl(net__ipv4__udp_rmem_min=1),
        stage.host.socket(hoard.family, socket.SOCK_DGRAM) as filler,
        subprocess.Popen(undo, stdin=subprocess.PIPE),
    ):
        hoard.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        for _ in range(4000):
            filler.sendto(bytes(1000), (address, PORT + 1))
        limit.write_text("0 0 0")
        # what is left of the first page, which every socket gets
        for _ in range(32):
            filler.sendto(b"x", (address, PORT))
        yield


def listening_socket(stage: Stage, version: int) -> Arrangement:
    return traffic.udp_sink(stage.host, stage.address(version), PORT)


@dataclass(frozen=True)
class Death:
    """A situation and what it is to lead to; `reason` and `code` may differ by IP version."""

    name: str
    arrange: Arrange
    reason: str
    code: int
    send: Sender = datagrams()
    versions: tuple[int, ...] = (4, 6)
    reported: bool = True
    late: bool = False  # it had been counted as forwarded or delivered before
    left: bool = False  # it had been handed to eth0
    function: str = ""  # that drops it, if the reason does not say why

    def check(self, stage: Stage, version: int) -> None:
        """Let it happen."""
        with self.arrange(stage, version):
            outcome = stage.outcome(lambda: self.send(stage, version), COUNT)
        assert outcome.reasons == {self.reason: COUNT}
        by_function = {(self.reason, self.function): COUNT} if self.function else {}
        assert outcome.functions == by_function
        assert outcome.counters["dropped_late" if self.late else "dropped"] == COUNT
        assert outcome.dead == outcome.counters["watched"] == COUNT
        assert len(outcome.reports) == self.reported
        if not self.reported:
            assert outcome.counters["drops_not_asked"] == COUNT
            return
        assert outcome.counters["drops_suppressed"] == COUNT - 1
        report = outcome.reports[0]
        assert report.drop_reason == self.code
        assert report.ingress_port == stage.node.port(stage.client.interface)
        assert report.egress_port == (stage.node.port("eth0") if self.left else 0)
        packet = deaths.inner_of(report)
        assert (packet.source_address is not None) and (":" in packet.source_address) == (
            version == 6
        )
        assert packet.destination_port in (PORT, None)


NETFILTER = {"reason": "NETFILTER_DROP", "code": 80}


def unsaid(function: str) -> dict[str, Any]:
    """The kernel gives no reason, only the function."""
    return {"reason": "NOT_SPECIFIED", "code": 0, "function": function}


DEATHS = [
    Death("iptables", iptables("iptables", "DROP"), **NETFILTER),
    Death("iptables-legacy", iptables("iptables-legacy", "DROP"), **NETFILTER),
    Death("iptables-REJECT", iptables("iptables", "REJECT"), **NETFILTER),
    Death("nft-forward", forward(f"udp dport {PORT} drop"), **NETFILTER),
    Death("nft-reject", forward(f"udp dport {PORT} reject"), **NETFILTER),
    Death("nft-device", nft_at_the_device, **NETFILTER),
    Death(
        "nft-prerouting", nft("hook prerouting priority -300", "udp dport 4007 drop"), **NETFILTER
    ),
    Death(
        "nft-postrouting", nft("hook postrouting priority 300", "udp dport 4007 drop"), **NETFILTER
    ),
    Death("conntrack-new", forward("udp dport 4007 ct state new drop"), **NETFILTER),
    Death("conntrack-invalid", strict_connection_tracking, send=acknowledgements, **NETFILTER),
    Death(
        "input-firewall",
        nft("hook input priority 0", "udp dport 4007 drop"),
        send=datagrams("host"),
        **NETFILTER,
    ),
    Death("no-route", nothing, "IP_INNOROUTES", 29, datagrams("nowhere")),
    Death(
        "blackhole4",
        route("blackhole"),
        send=datagrams("refused"),
        versions=(4,),
        **unsaid("ip_error"),
    ),
    Death(
        "blackhole6",
        route("blackhole"),
        send=datagrams("refused"),
        versions=(6,),
        **unsaid("dst_discard_out"),
    ),
    Death(
        "unreachable4",
        route("unreachable"),
        send=datagrams("refused"),
        versions=(4,),
        **unsaid("ip_error"),
    ),
    Death("unreachable6", route("unreachable"), "IP_INNOROUTES", 29, datagrams("refused"), (6,)),
    Death(
        "prohibit4",
        route("prohibit"),
        send=datagrams("refused"),
        versions=(4,),
        **unsaid("ip_error"),
    ),
    Death("prohibit6", route("prohibit"), "IP_INNOROUTES", 29, datagrams("refused"), (6,)),
    Death("ttl", nothing, "IP_INHDR", 26, datagrams(ttl=1)),
    Death(
        "rp-filter", reverse_path_filter, "IP_RPFILTER", 82, udp_packets(source="198.18.0.1"), (4,)
    ),
    Death("martian-source", nothing, "IP_LOCALNET", 32, udp_packets(source="127.0.0.5"), (4,)),
    Death("martian-source6", nothing, "IP_INHDR", 200, udp_packets(source="::1"), (6,)),
    Death("own-source", nothing, "IP_LOCAL_SOURCE", 82, udp_packets(source="10.99.0.11"), (4,)),
    Death("group-source", nothing, "IP_INVALID_SOURCE", 27, udp_packets(source="224.0.0.5"), (4,)),
    Death("zero-target", nothing, "IP_INVALID_DEST", 213, udp_packets(destination="0.0.0.0"), (4,)),
    Death("neighbour4", impatient_neighbours(), "NEIGH_FAILED", 93, datagrams("silent"), (4,)),
    Death(
        "neighbour6",
        impatient_neighbours(),
        send=datagrams("silent"),
        versions=(6,),
        **unsaid("neigh_invalidate"),
    ),
    Death("mtu", small_mtu, "PKT_TOO_BIG", 70, datagrams(size=1300)),
    Death("tcx-ingress", tcx(in_port, bpf_calls.TCX_INGRESS), "TC_INGRESS", 80),
    Death("clsact-ingress", clsact(in_port, "ingress"), "TC_INGRESS", 80),
    Death("udp-checksum", listening_socket, "UDP_CSUM", 182, udp_packets("host", wrong=True)),
    Death("full-socket", full_socket, "SOCKET_RCVBUFF", 194, datagrams("host"), late=True),
    Death("no-memory", no_udp_memory, "PROTO_MEM", 194, datagrams("host"), late=True),
    Death("no-socket", nothing, "NO_SOCKET", 192, datagrams("host")),
    Death("no-listener", nothing, "NO_SOCKET", 192, connection_attempts),
    Death("no-protocol", nothing, "IP_NOPROTO", 209, unknown_protocol),
    Death("tcx-egress", tcx(out_port, bpf_calls.TCX_EGRESS), "TC_EGRESS", 92, late=True, left=True),
    Death("clsact-egress", clsact(out_port, "egress"), "TC_EGRESS", 92, late=True, left=True),
]
BRIDGE_DEATHS = [
    Death("checksum-bridged", nothing, "IP_INHDR", 200, udp_packets(wrong_checksum=True), (4,)),
    Death(
        "bridge-nft",
        nft("hook forward priority 0", "udp dport 4007 drop", "bridge"),
        send=beside,
        **NETFILTER,
    ),
    Death(
        "isolated",
        bridge_port("isolated", "on", "off", 0, 1),
        send=beside,
        **unsaid("br_handle_frame_finish"),
    ),
    Death("locked", locked_port, send=beside, **unsaid("br_handle_frame_finish")),
    Death("no-flooding", bridge_port("flood", "off", "on", 1), "NO_TX_TARGET", 89, to_a_stranger),
]
ROUTED_DEATHS = [
    Death("checksum", nothing, "IP_CSUM", 31, udp_packets(wrong_checksum=True), (4,)),
    Death("foreign-mac", nothing, "OTHERHOST", 13, to_a_stranger, reported=False),
]


def every(cases: list[Death]) -> pytest.MarkDecorator:
    listed = [pytest.param(d, v, id=f"{d.name}-v{v}") for d in cases for v in d.versions]
    return pytest.mark.parametrize(("death", "version"), listed)


@every(DEATHS)
def test_a_death_on_a_bridged_node(bridged, death, version):
    death.check(bridged, version)


@every(ROUTED_DEATHS)
def test_a_death_on_a_routed_node(routed, death, version):
    death.check(routed, version)


@every(BRIDGE_DEATHS)
def test_a_death_in_the_bridge(bridged, death, version):
    death.check(bridged, version)


# -- queues: how many die is up to the clock, so the queue's own count is what ours is held against --

SHAPER = "tbf rate 64kbit burst 2000 limit 3000"
QUEUES = {
    "tbf": ((SHAPER,), 64),
    "pfifo": ((f"handle 1: {SHAPER}", "parent 1:1 handle 10: pfifo limit 2"), 64),
    "too-long-for-tbf": (("tbf rate 64kbit burst 500 limit 30000",), 1000),
}


def is_full_queue(stage: Stage, outcome: deaths.Outcome, dropped: int) -> deaths.v05.DropReport:
    """One report of a full queue at eth0, and as many deaths as the queue itself has counted."""
    assert dropped > 1
    assert outcome.reasons == {"QDISC_DROP": dropped}
    assert outcome.counters["dropped_late"] == dropped
    assert outcome.counters["drops_suppressed"] == dropped - 1
    (report,) = outcome.reports
    assert (report.drop_reason, report.queue) == (71, True)
    assert report.egress_port == stage.node.port("eth0")
    return report


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", QUEUES)
def test_a_full_queue_behind_our_egress_hook(bridged, kind, version):
    lines, size = QUEUES[kind]
    with bridged.queue("eth0", *lines) as dropped:
        send = datagrams(size=size, count=60)
        outcome = bridged.outcome(lambda: send(bridged, version), dropped)
        report = is_full_queue(bridged, outcome, dropped())
    assert report.ingress_port == bridged.node.port(bridged.client.interface)


@pytest.mark.parametrize("version", [4, 6])
def test_what_the_host_itself_sends_dies_in_a_full_queue(bridged, version):
    with bridged.queue("eth0", SHAPER) as dropped:
        send = lambda: bridged.send(bridged.host, bridged.far.ip(version), 60)  # noqa: E731
        outcome = bridged.outcome(send, dropped)
        report = is_full_queue(bridged, outcome, dropped())
    assert report.ingress_port == 0


@pytest.mark.parametrize("version", [4, 6])
def test_what_the_output_firewall_refuses_never_reached_an_interface(bridged, version):
    """Seen is what reaches an interface: nothing is reported, but nothing false either."""

    def send() -> None:
        with pytest.raises(PermissionError):
            bridged.send(bridged.host, bridged.far.ip(version))

    rule = f"udp dport {PORT} counter drop"
    with bridged.nft("hook output priority 0", rule) as refused:
        outcome = bridged.outcome(send, 0, timeout_s=0.2)
        assert refused() == 1
    assert (outcome.reasons, outcome.reports, outcome.counters["watched"]) == ({}, [], 0)


@pytest.mark.parametrize("version", [4, 6])
def test_an_egress_device_whose_other_end_is_down(bridged, version):
    with bridged.unplugged():
        outcome = bridged.outcome(lambda: datagrams()(bridged, version), COUNT)
    is_full_queue(bridged, outcome, COUNT)


def test_what_a_queue_still_held_when_it_was_taken_away_is_not_reported(bridged):
    """The kernel gives no reason that only a queue gives, so it is not believed of a packet that had left."""
    with bridged.queue("eth0", "tbf rate 64kbit burst 500 limit 30000"):
        datagrams(count=20)(bridged, 4)
    outcome = bridged.outcome(lambda: None, 0, timeout_s=0.2)
    assert (outcome.reasons, outcome.reports) == ({}, [])


# -- tunnels --


@pytest.mark.parametrize(
    ("fdb", "reason", "code"),
    [((), "NO_TX_TARGET", 89), (("dst 203.0.113.1",), "IP_OUTNOROUTES", 29)],
    ids=["no-entry", "no-route"],
)
def test_a_tunnel_that_leads_nowhere(bridged, fdb, reason, code):
    with bridged.vxlan(4, *fdb) as target:
        send = lambda: bridged.send(bridged.client.namespace, target, COUNT)  # noqa: E731
        outcome = bridged.outcome(send, COUNT)
    assert outcome.reasons == {reason: COUNT}
    (report,) = outcome.reports
    assert report.drop_reason == code
    assert deaths.inner_of(report).destination_address == target


def test_an_ipv6_packet_that_a_tunnel_copies_is_not_followed_but_counted(bridged):
    """The kernel makes room for the outer headers in a clone; what dies is not what came in."""
    with bridged.vxlan(6) as target:
        before = bridged.datapath.identity()
        send = lambda: bridged.send(bridged.client.namespace, target, COUNT)  # noqa: E731
        outcome = bridged.outcome(send, 0, timeout_s=0.3)
        after = bridged.datapath.identity()
    assert (outcome.reasons, outcome.reports, outcome.counters["watched"]) == ({}, [], COUNT)
    lost = outcome.counters["unresolved"] + outcome.counters["unverified"]
    assert lost + after.pending - before.pending == COUNT


# -- fragments --


def first_fragments(stage: Stage, place: str) -> list[bytes]:
    """The first of two fragments, of either version."""
    made = []
    for version in (4, 6):
        here, there = stage.client.ip(version), to(stage, version, place)
        whole = raw_packets.udp(here, there, (stage.fresh_port(), PORT), b"." * 1000)
        more = raw_packets.MORE_FRAGMENTS
        made.append(raw_packets.packet(here, there, raw_packets.UDP, whole[:504], fragment=more))
    return made


def test_fragments_that_never_become_a_packet(bridged):
    """For the host, and for a pod where connection tracking puts them together."""
    times = {"net__ipv4__ipfrag_time": 1, "net__ipv6__ip6frag_time": 1}
    tracker = {"net__netfilter__nf_conntrack_frag6_timeout": 1}
    with (
        bridged.nft("hook forward priority 0", "ct state invalid drop"),
        bridged.sysctl(**times, **tracker),
    ):
        fragments = first_fragments(bridged, "host") + first_fragments(bridged, "far")
        outcome = bridged.outcome(lambda: bridged.send_frames(fragments * 2), 8)
    assert outcome.reasons == {"DUP_FRAG": 4, "FRAG_REASM_TIMEOUT": 4}
    assert outcome.counters["drops_not_asked"] == 4
    assert [report.drop_reason for report in outcome.reports] == [201] * 4
    packets = [deaths.inner_of(report) for report in outcome.reports]
    assert {p.destination_port for p in packets} == {PORT}
    assert {(p.length, p.truncated) for p in packets} == {(524, True), (552, True)}


def fragmented(stage: Stage, version: int) -> list[bytes]:
    """A datagram in two fragments, the first of which comes last: it is the one that connection tracking makes whole."""
    here, there = stage.client.ip(version), to(stage, version, "far")
    whole = raw_packets.udp(here, there, (stage.fresh_port(), PORT), b"." * 1000)
    places = ((63, whole[504:]), (raw_packets.MORE_FRAGMENTS, whole[:504]))
    return [
        raw_packets.packet(here, there, raw_packets.UDP, part, fragment=place)
        for place, part in places
    ]


@pytest.mark.parametrize("version", [4, 6])
def test_fragments_that_become_a_packet_which_is_dropped(bridged, version):
    """Its fingerprint is that of the first fragment, in whose sk_buff it is."""
    with bridged.nft("hook forward priority 0", "ct state new drop"):
        outcome = bridged.outcome(lambda: bridged.send_frames(fragmented(bridged, version)), 1)
    assert outcome.reasons == {"NETFILTER_DROP": 1}
    (report,) = outcome.reports
    assert deaths.inner_of(report).destination_port == PORT
