# SPDX-License-Identifier: Apache-2.0
"""What is said of packets for a node's own addresses: who takes them is known when it is taken.

Such an address may be the host's, a Service's that is local to the node, or one that NAT sends on.
The run prints a table: of the packets of each situation, how many were watched, reported, falsely
reported, or counted as not followed.
"""

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from hostint_report import v05
from tests.lab import deaths, observed, traffic
from tests.lab.deaths import PORT, Stage
from tests.lab.namespace import Namespace
from tests.lab.observed import Bounds, Observed, Observer
from tests.lab.paths.wiring import SERVICE

pytestmark = pytest.mark.lab
COUNT = 100
# where a pod listens, behind NAT
POD_PORT = 4100
TCP, UDP, SCTP = 6, 17, 132
ICMP = {4: 1, 6: 58}
NO_SOCKET = 192
# of a datagram that leaves its sender as three fragments
_FRAGMENTED_BYTES, _FRAGMENTS = 3000, 3
_FIRST_SCTP_PORT = 10_000
COLUMNS = ("packets", "watched", "reported", "dropped", "false", "unverified", "unresolved")
Row = dict[str, Any]


@dataclass
class Site:
    """A node, with one Service address on its loopback device that others have a route to."""

    stage: Stage
    observer: Observer
    rows: list[Row]

    def namespace(self, place: str) -> Namespace:
        """Where the sockets of a place are."""
        pods = {"client": self.stage.client, "pod": self.stage.server, "elsewhere": self.stage.far}
        return pods[place].namespace if place in pods else self.stage.host

    def address(self, place: str, version: int) -> str:
        """Address of the host, the Service, or a pod."""
        addresses = {
            "host": self.stage.address(version),
            "service": SERVICE[version],
            "client": self.stage.client.ip(version),
            "pod": self.stage.server.ip(version),
            "elsewhere": self.stage.far.ip(version),
        }
        return addresses[place]

    def port(self, place: str) -> int:
        """Port id of the interface towards a place; 0: the host's own sockets."""
        interfaces = {
            "client": self.stage.client.interface,
            "pod": self.stage.server.interface,
            "elsewhere": "eth0",
        }
        return self.stage.node.port(interfaces[place]) if place in interfaces else 0


def _table(rows: list[Row]) -> str:
    lines = [f"{'situation':50}{'':6}" + "".join(f"{column:>11}" for column in COLUMNS)]
    for row in rows:
        cells = "".join(f"{row[column]:>11}" for column in COLUMNS)
        lines.append(f"{row['situation']:50}{'IPv' + str(row['version']):6}{cells}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def site(pytestconfig) -> Iterator[Site]:
    with deaths.stage("routed") as stage:
        rows: list[Row] = []
        for version in (4, 6):
            stage.host.run(*f"ip addr add {SERVICE[version]} dev lo".split())
            node = stage.node.address if version == 4 else stage.node.address6
            other = stage.lab.nodes[1].namespace
            other.run(*f"ip route add {SERVICE[version]} via {node}".split())
        yield Site(stage, Observer(stage), rows)
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + _table(rows))


# -- what is sent, and who takes it: each returns the bounds of latencies by number --


@dataclass(frozen=True)
class Way:
    """From one place to an address of the node, and, if `taker` is not empty, to its sockets."""

    site: Site
    version: int
    source: Namespace
    address: str
    taker: Namespace
    taken_at: tuple[str, int]

    @property
    def target(self) -> tuple[str, int]:
        return self.address, PORT

    def sink(self) -> contextlib.AbstractContextManager[socket.socket]:
        return traffic.udp_sink(self.taker, *self.taken_at)


Send = Callable[[Way], Bounds]


def udp(way: Way) -> Bounds:
    with way.sink() as sink:
        return observed.datagrams(way.source, way.target, sink, COUNT)


def fragments(way: Way) -> Bounds:
    with way.sink() as sink:
        return observed.datagrams(way.source, way.target, sink, COUNT, _FRAGMENTED_BYTES)


def udp_in_vain(way: Way) -> Bounds:
    traffic.send_udp(way.source, *way.target, count=COUNT)
    return {}


def tcp(way: Way) -> Bounds:
    with traffic.tcp_echo(way.taker, *way.taken_at):
        return observed.conversation(way.source, way.target, COUNT)


def tcp_in_vain(way: Way) -> Bounds:
    for _ in range(COUNT):
        with way.source.socket(traffic.family_of(way.address), socket.SOCK_STREAM) as client:
            with pytest.raises(ConnectionRefusedError):
                client.connect(way.target)
    return {}


def echo(way: Way) -> Bounds:
    return observed.echoes(way.source, way.address, COUNT)


def sctp(way: Way) -> Bounds:
    """Associations that begin, each from a port of its own, from and to raw sockets."""
    family = traffic.family_of(way.address)
    ports = range(_FIRST_SCTP_PORT, _FIRST_SCTP_PORT + COUNT)
    # an INIT chunk: initiate tag, window, streams out and in, first TSN (RFC 9260)
    chunks = [struct.pack("!BBHIIHHI", 1, 0, 20, port, 65536, 1, 1, port) for port in ports]
    packets = [
        struct.pack("!HHII", port, PORT, 0, 0) + chunk
        for port, chunk in zip(ports, chunks, strict=True)
    ]
    with (
        # the tests do not compute its CRC32c
        way.site.stage.sysctl(net__netfilter__nf_conntrack_checksum=0),
        way.taker.socket(family, socket.SOCK_RAW, SCTP) as receiver,
        way.source.socket(family, socket.SOCK_RAW, SCTP) as sender,
    ):
        target = (way.address, 0)
        took = observed.exchange(sender, target, receiver, packets)
    return dict(zip(ports, took, strict=True))


@dataclass(frozen=True)
class Situation:
    """Packets for an address of the node (`to`), and the place that is to take them."""

    name: str
    send: Send
    protocol: int | Mapping[int, int] = UDP
    source: str = "client"
    to: str = "host"
    taker: str = "host"
    wildcard: bool = False  # a socket of the host would take them, were it not for NAT
    masquerade: bool = False
    packets: int | None = COUNT  # None: as many segments as it takes

    def protocol_of(self, version: int) -> int:
        """The protocol's number."""
        return self.protocol if isinstance(self.protocol, int) else self.protocol[version]

    def way(self, site: Site, version: int) -> Way:
        """Addresses and namespaces."""
        port = PORT if self.taker == "host" else POD_PORT
        taken_at = (site.address(self.to if self.taker == "host" else self.taker, version), port)
        return Way(
            site,
            version,
            site.namespace(self.source),
            site.address(self.to, version),
            site.namespace(self.taker),
            taken_at,
        )

    def rule(self, site: Site, version: int) -> dict[str, Any]:
        """Watch what is sent to the address. Fragments have no ports."""
        network = ipaddress.ip_network(site.address(self.to, version))
        has_ports = self.protocol in (TCP, UDP) and self.send is not fragments
        ports = {"destination_ports": ((PORT, PORT),)} if has_ports else {}
        return {"protocol": self.protocol_of(version), "destinations": (network,)} | ports

    @contextlib.contextmanager
    def arranged(self, site: Site, version: int) -> Iterator[None]:
        """Have NAT, and a socket of the host."""
        with contextlib.ExitStack() as stack:
            if self.taker != "host":
                stack.enter_context(self._translated(site, version))
            if not self.wildcard:
                yield
                return
            any_address = "0.0.0.0" if version == 4 else "::"
            sink = stack.enter_context(traffic.udp_sink(site.stage.host, any_address, PORT))
            yield
            sink.setblocking(False)
            with pytest.raises(BlockingIOError):
                sink.recv(1)

    @contextlib.contextmanager
    def _translated(self, site: Site, version: int) -> Iterator[None]:
        """Have the node send on what is for the address, as kube-proxy does."""
        family = "ip" if version == 4 else "ip6"
        to, own = site.address(self.taker, version), site.address("host", version)
        name = {TCP: "tcp", UDP: "udp"}.get(self.protocol_of(version))
        match, port = (f"{name} dport {PORT}", f":{POD_PORT}") if name else ("", "")
        target = f"[{to}]{port}" if version == 6 and port else f"{to}{port}"
        snat = f"{family} daddr {to} snat to {own};" if self.masquerade else ""
        lines = [
            f"table {family} delivery {{",
            "chain pre { type nat hook prerouting priority dstnat;",
            f"{family} daddr {site.address(self.to, version)} {match} dnat to {target}; }}",
            f"chain post {{ type nat hook postrouting priority srcnat; {snat} }}",
            "}",
        ]
        site.stage.host.run("nft", "\n".join(lines))
        try:
            yield
        finally:
            site.stage.host.run("nft", f"delete table {family} delivery")


@contextlib.contextmanager
def counted(source: Namespace, match: str) -> Iterator[Callable[[], int]]:
    """Count what a place sends, by its own firewall."""
    source.run("nft", "add table inet counted")
    source.run("nft", "add chain inet counted out { type filter hook output priority 0; }")
    source.run("nft", f"add rule inet counted out {match} counter")
    try:
        yield lambda: int(
            source.run("nft", "list table inet counted").split("packets ")[1].split()[0]
        )
    finally:
        source.run("nft", "delete table inet counted")


def observe(site: Site, situation: Situation, version: int) -> tuple[Observed, int]:
    """Have it happen; return what was said, and how many packets there were."""
    way = situation.way(site, version)
    with (
        situation.arranged(site, version),
        counted(way.source, f"tcp dport {PORT}") as segments,
    ):
        found = site.observer.observe([situation.rule(site, version)], lambda: situation.send(way))
        return found, segments() if situation.packets is None else situation.packets


def note(
    site: Site, situation: Situation, version: int, found: Observed, packets: int, false: int
) -> None:
    """Put a line into the table."""
    counts = {name: found.counters[name] for name in ("watched", "reported", "unverified")}
    more = {
        "situation": situation.name,
        "version": version,
        "packets": packets,
        "dropped": len(found.drops),
        "false": false,
        "unresolved": found.counters["unresolved"] + found.pending,
    }
    site.rows.append(counts | more)


TO_SERVICE = {"to": "service"}
DELIVERED = [
    Situation("UDP to the host", udp),
    Situation("TCP to the host", tcp, TCP, packets=None),
    Situation("echo to the host", echo, ICMP),
    Situation("UDP to the host, from outside", udp, source="elsewhere"),
    Situation("Service on lo, socket of the host", udp, **TO_SERVICE),
    Situation("Service on lo, TCP socket of the host", tcp, TCP, packets=None, **TO_SERVICE),
    Situation("echo to a Service on lo", echo, ICMP, **TO_SERVICE),
    Situation("Service on lo, DNAT to a pod", udp, taker="pod", **TO_SERVICE),
    Situation(
        "Service on lo, DNAT, wildcard socket of the host",
        udp,
        taker="pod",
        wildcard=True,
        **TO_SERVICE,
    ),
    Situation(
        "Service on lo, DNAT to a pod, TCP", tcp, TCP, taker="pod", packets=None, **TO_SERVICE
    ),
    Situation("NodePort", udp, source="elsewhere", taker="pod", masquerade=True),
    Situation(
        "NodePort, wildcard socket of the host",
        udp,
        source="elsewhere",
        taker="pod",
        masquerade=True,
        wildcard=True,
    ),
    Situation("NodePort, TCP", tcp, TCP, "elsewhere", taker="pod", masquerade=True, packets=None),
    Situation("hostPort", udp, taker="pod"),
    Situation("hostPort, TCP", tcp, TCP, taker="pod", packets=None),
    Situation("externalIP on lo", udp, source="elsewhere", taker="pod", **TO_SERVICE),
    Situation(
        "externalIP on lo, wildcard socket of the host",
        udp,
        source="elsewhere",
        taker="pod",
        wildcard=True,
        **TO_SERVICE,
    ),
    Situation("Service on lo, DNAT to another node", udp, taker="elsewhere", **TO_SERVICE),
    Situation("Service on lo, DNAT of echoes to a pod", echo, ICMP, taker="pod", **TO_SERVICE),
    Situation("Service on lo, DNAT of SCTP to a pod", sctp, SCTP, taker="pod", **TO_SERVICE),
]
REFUSED = [
    Situation("closed port", udp_in_vain),
    Situation("closed port, TCP", tcp_in_vain, TCP),
    Situation("Service on lo, closed port", udp_in_vain, **TO_SERVICE),
]
FRAGMENTS = [
    Situation("fragments to the host", fragments, packets=COUNT * _FRAGMENTS),
    Situation(
        "fragments, DNAT to a pod", fragments, taker="pod", packets=COUNT * _FRAGMENTS, **TO_SERVICE
    ),
]
both_versions = pytest.mark.parametrize("version", [4, 6])


def every(situations: list[Situation]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("situation", situations, ids=lambda each: each.name)


@both_versions
@every(DELIVERED)
def test_delivery_is_reported_where_it_happened(site, situation, version):
    found, packets = observe(site, situation, version)
    ports = (site.port(situation.source), site.port(situation.taker))
    false = found.false_flows(ports) + len(found.drops)
    note(site, situation, version, found, packets, false)
    assert false == 0
    assert found.counters["watched"] == found.counters["reported"] == packets
    assert len(found.flows) == packets >= COUNT
    assert found.counters["unverified"] == found.counters["unresolved"] == found.pending == 0


def is_refusal(report: v05.DropReport, port: int) -> bool:
    """The host had no socket for it."""
    return (report.drop_reason, report.ingress_port, report.egress_port) == (NO_SOCKET, port, 0)


@both_versions
@every(REFUSED)
def test_closed_port_is_a_drop_and_no_delivery(site, situation, version):
    found, packets = observe(site, situation, version)
    port = site.port(situation.source)
    false = len(found.flows) + sum(not is_refusal(each, port) for each in found.drops)
    note(site, situation, version, found, packets, false)
    assert false == 0
    assert found.counters["watched"] == found.counters["dropped"] == packets
    assert len(found.drops) == packets


@both_versions
@every(FRAGMENTS)
def test_reassembled_fragments_are_not_reported_falsely(site, situation, version):
    """A known limit: what cannot be told apart is counted, see docs/datapath.md.

    Of those that leave again, one that is neither first nor last is what it was.
    """
    found, packets = observe(site, situation, version)
    ports = (site.port(situation.source), site.port(situation.taker))
    again = len(found.flows) - len({each.packet for each in found.flows})
    false = replace(found, bounds={}).false_flows(ports) + again + len(found.drops)
    note(site, situation, version, found, packets, false)
    assert false == 0
    not_followed = found.counters["unverified"] + found.counters["unresolved"] + found.pending
    assert found.counters["watched"] == len(found.flows) + not_followed == packets
    assert not_followed >= packets - COUNT
    if situation.taker == "host":
        assert found.flows == []
