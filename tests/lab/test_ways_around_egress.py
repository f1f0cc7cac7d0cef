# SPDX-License-Identifier: Apache-2.0
"""What goes to a pod is reported once, however a CNI hands it over; what the pod drops is its own.

The CNIs are stand-ins, made of the same kernel functions: BPF host routing (bpf_redirect_peer),
legacy routing (the kernel's, with a program on ingress), and endpoint routes (a policy on the
egress hook of the pod's interface).
"""

import contextlib
import dataclasses
import ipaddress
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostint_agent import bpf_calls
from hostint_report import drop_reasons
from tests.lab import cni, compiled, deaths, observed, raw_packets, traffic
from tests.lab.deaths import PORT, Stage
from tests.lab.namespace import Namespace, ip
from tests.lab.observed import Observed, Observer
from tests.lab.paths import wiring
from tests.pins import pin_directory

pytestmark = pytest.mark.lab
COUNT = 100
DENIED_PORT = 4999
TCP, UDP = 6, 17
ICMP = {4: 1, 6: 58}
_ACKNOWLEDGED_S = 0.3
HERE = Path(__file__).parent
HOST_ROUTING, LEGACY, ENDPOINT_ROUTES = "host-routing", "legacy", "endpoint-routes"
NOT_DELIVERED = ("unresolved", "unverified", "dropped", "dropped_late")


@dataclass
class Site:
    """A node with a CNI of some kind."""

    stage: Stage
    observer: Observer
    mode: str

    def port(self, name: str) -> int:
        """Port id of a place that a packet comes from or goes to."""
        interfaces = {
            "client": self.stage.client.interface,
            "server": self.stage.server.interface,
            "outside": "eth0",
        }
        return self.stage.node.port(interfaces[name]) if name in interfaces else 0

    def namespace(self, name: str) -> Namespace:
        """Where the sockets of a place are."""
        pods = {"client": self.stage.client, "server": self.stage.server, "outside": self.stage.far}
        return pods[name].namespace if name in pods else self.stage.host

    def address(self, name: str, version: int) -> str:
        """Address of a pod on the node, or of the node."""
        pods = {"client": self.stage.client, "server": self.stage.server}
        return pods[name].ip(version) if name in pods else self.stage.address(version)


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """The stand-ins' programs, pinned."""
    with pin_directory("ways") as pins:
        names = ("cni_ok", "cni_redirect_peer")
        compiled.bpf(HERE / "paths" / "cni.c", pins, names, {})
        denied = {"DENIED_PORT": DENIED_PORT}
        compiled.bpf(HERE / "policy_cni.c", pins, ("cni_to_pod",), denied)
        yield pins


def connect_by_bpf(stage: Stage, pins: Path) -> None:
    """Have what comes in for a pod of the node jump to the pod."""
    ways = bpf_calls.Map.open(pins / "cni_ways")
    for pod in (stage.client, stage.server):
        for source in (stage.client.interface, stage.server.interface, "eth0"):
            if source != pod.interface:
                port, to = stage.node.port(source), stage.node.port(pod.interface)
                for key, value in wiring._ways(port, pod, to):
                    ways.update(key, value)
    ways.close()


@pytest.fixture(scope="module", params=[HOST_ROUTING, LEGACY, ENDPOINT_ROUTES])
def site(request, programs) -> Iterator[Site]:
    mode = request.param
    with deaths.stage("routed") as stage, cni.Cni(stage.node) as theirs:
        at_ingress = "cni_redirect_peer" if mode == HOST_ROUTING else "cni_ok"
        if mode == HOST_ROUTING:
            connect_by_bpf(stage, programs)
        pods = (stage.client.interface, stage.server.interface)
        for interface in (*pods, "eth0"):
            program = bpf_calls.obj_get(programs / at_ingress)
            theirs.tcx(program, interface, "ingress", first=False)
        for interface in pods if mode == ENDPOINT_ROUTES else ():
            program = bpf_calls.obj_get(programs / "cni_to_pod")
            theirs.tcx(program, interface, "egress", first=False)
        yield Site(stage, Observer(stage), mode)


WAYS = [("client", "server"), ("outside", "server"), ("client", "host"), ("host", "server")]
every_way = pytest.mark.parametrize(
    ("source", "target"), WAYS, ids=["-to-".join(way) for way in WAYS]
)
both_versions = pytest.mark.parametrize("version", [4, 6])


def assert_all_delivered(found: Observed) -> None:
    """Each watched packet is reported, and nothing else is said of it."""
    assert found.drops == []
    assert {name: found.counters[name] for name in NOT_DELIVERED} == dict.fromkeys(NOT_DELIVERED, 0)
    assert found.counters["reported"] == found.counters["watched"] == len(found.flows)
    assert found.pending == 0


def to_port(protocol: int, port: int = PORT) -> dict[str, object]:
    return {"protocol": protocol, "destination_ports": ((port, port),)}


@both_versions
@every_way
def test_datagrams_are_reported_once(site, source, target, version):
    address = site.address(target, version)
    send = lambda: datagrams(site.namespace(source), site.namespace(target), address)  # noqa: E731
    found = site.observer.observe([to_port(UDP)], send)
    assert_all_delivered(found)
    assert found.counters["watched"] == COUNT
    ports = (site.port(source), site.port(target))
    assert found.false_flows(ports, measured=source != "host") == 0


@both_versions
@every_way
def test_segments_are_reported_once(site, source, target, version):
    """Both ways of a connection."""
    address = site.address(target, version)
    back = {"protocol": TCP, "source_ports": ((PORT, PORT),)}
    with traffic.tcp_echo(site.namespace(target), address, PORT):
        talk = lambda: observed.conversation(  # noqa: E731
            site.namespace(source), (address, PORT), COUNT
        )
        found = site.observer.observe([to_port(TCP), back], talk)
    assert_all_delivered(found)
    assert found.counters["watched"] > 2 * COUNT
    for start, end, port_of in (
        (source, target, lambda packet: packet.destination_port),
        (target, source, lambda packet: packet.source_port),
    ):
        flows = [each for each in found.flows if port_of(deaths.inner_of(each)) == PORT]
        assert len(flows) > COUNT
        one_way = dataclasses.replace(found, flows=flows)
        ports = (site.port(start), site.port(end))
        assert one_way.false_flows(ports, measured=start != "host") == 0


# -- what docs/cni.md says is not seen --


@both_versions
def test_echoes_to_a_pod_are_seen_on_its_hook_only(site, version):
    """No socket takes them."""
    address = site.address("server", version)
    rule = {"protocol": ICMP[version], "destinations": (ipaddress.ip_network(address),)}
    ping = lambda: observed.echoes(site.namespace("client"), address, COUNT)  # noqa: E731
    found = site.observer.observe([rule], ping)
    assert found.drops == []
    assert found.false_flows((site.port("client"), site.port("server"))) == 0
    reported = 0 if site.mode == HOST_ROUTING else COUNT
    assert (found.counters["watched"], len(found.flows)) == (COUNT, reported)
    assert not_seen_again(found) == COUNT - reported


def end_after_the_server(site: Site, address: str) -> dict[int, int]:
    """Connections that the server ends first: its end is in TIME_WAIT as the last segment comes."""
    family = traffic.family_of(address)
    with site.namespace("server").socket(family, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, PORT))
        server.listen()
        with contextlib.ExitStack() as clients:
            for _ in range(COUNT):
                client = site.namespace("client").socket(family, socket.SOCK_STREAM)
                clients.enter_context(client).connect((address, PORT))
                server.accept()[0].close()
                assert client.recv(1) == b""
            # The server's FINs have been acknowledged, however late the kernel does that.
            time.sleep(_ACKNOWLEDGED_S)
    return {}


@both_versions
def test_segments_to_time_wait_are_seen_on_the_hook_only(site, version):
    address = site.address("server", version)
    found = site.observer.observe([to_port(TCP)], lambda: end_after_the_server(site, address))
    assert found.drops == []
    assert found.false_flows((site.port("client"), site.port("server"))) == 0
    assert len(found.flows) + not_seen_again(found) == found.counters["watched"] == 4 * COUNT
    if site.mode == HOST_ROUTING:
        assert not_seen_again(found) == COUNT
    else:
        assert not_seen_again(found) == 0


@pytest.mark.parametrize("site", [LEGACY], indirect=True)
def test_macvlan_pod_has_no_port(site):
    """What it sends leaves the NIC as if it were the host's; what it is sent is not seen again."""
    other = site.stage.lab.nodes[1]
    name, address = f"{site.stage.host.name}m", "10.99.0.200"
    ip(f"netns add {name}")
    ip(
        f"-n {site.stage.host.name} link add pod9 link eth0 type macvlan mode bridge",
        f"-n {site.stage.host.name} link set pod9 netns {name}",
        f"-n {name} addr add {address}/24 dev pod9",
        f"-n {name} link set pod9 up",
    )
    try:
        pod = Namespace(name)
        assert traffic.ping(other.namespace, address)
        ends = [(other.namespace, pod, address), (pod, other.namespace, other.address)]
        received, sent = (
            site.observer.observe([to_port(UDP)], lambda t=t: datagrams(*t)) for t in ends
        )
        assert received.flows == received.drops == sent.drops == []
        assert not_seen_again(received) == received.counters["watched"] == COUNT
        assert_all_delivered(sent)
        assert sent.false_flows((0, site.port("outside")), measured=False) == 0
    finally:
        ip(f"netns del {name}")


def datagrams(source: Namespace, target: Namespace, address: str) -> observed.Bounds:
    """Send datagrams to a socket of another place."""
    with traffic.udp_sink(target, address, PORT) as sink:
        return observed.datagrams(source, (address, PORT), sink, COUNT)


def not_seen_again(found: Observed) -> int:
    """Watched packets whose outcome is not known."""
    return found.counters["unresolved"] + found.counters["unverified"] + found.pending


# -- what ends inside a pod --


def send_datagrams(site: Site, source: str, version: int) -> None:
    """Numbered datagrams for PORT of the server, one flow."""
    traffic.send_udp(site.namespace(source), site.address("server", version), PORT, count=COUNT)


def connect_in_vain(site: Site, source: str, version: int) -> None:
    """Connections to PORT of the server that are refused."""
    target = (site.address("server", version), PORT)
    for _ in range(COUNT):
        with site.namespace(source).socket(traffic.family_of(target[0]), socket.SOCK_STREAM) as one:
            one.settimeout(5)
            with pytest.raises(ConnectionRefusedError):
                one.connect(target)


def stray_segments(site: Site, source: str, version: int) -> None:
    """Acknowledgements of no connection, by a raw socket: the kernel makes the IP header."""
    here = (site.stage.far if source == "outside" else site.stage.client).ip(version)
    there = site.address("server", version)
    family = traffic.family_of(there)
    with site.namespace(source).socket(family, socket.SOCK_RAW, TCP) as sender:
        for number in range(COUNT):
            segment = raw_packets.tcp_ack(here, there, (10_000 + number, PORT), number)
            sender.sendto(segment, (there, 0))


@contextlib.contextmanager
def nothing(pod: Namespace, address: str) -> Iterator[None]:
    yield


@contextlib.contextmanager
def full_socket(pod: Namespace, address: str) -> Iterator[None]:
    """A socket of the pod that has no room left."""
    with traffic.udp_sink(pod, address, PORT) as sink:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        yield


@contextlib.contextmanager
def listening(pod: Namespace, address: str) -> Iterator[None]:
    with traffic.tcp_echo(pod, address, PORT):
        yield


@contextlib.contextmanager
def firewall(pod: Namespace, address: str) -> Iterator[None]:
    """Socket and firewall of the pod; the firewall drops everything."""
    pod.run("nft", "add table inet own")
    pod.run("nft", "add chain inet own input { type filter hook input priority 0; }")
    pod.run("nft", f"add rule inet own input udp dport {PORT} drop")
    try:
        with traffic.udp_sink(pod, address, PORT):
            yield
    finally:
        pod.run("nft", "delete table inet own")


@dataclass(frozen=True)
class End:
    """A way to end inside a pod. `taken`: a socket of the pod takes it first."""

    arrange: Callable[[Namespace, str], contextlib.AbstractContextManager[None]]
    send: Callable[[Site, str, int], None]
    protocol: int
    taken: bool = False


ENDS = {
    "closed-port": End(nothing, send_datagrams, UDP),
    "refused": End(nothing, connect_in_vain, TCP),
    "full-socket": End(full_socket, send_datagrams, UDP, taken=True),
    "tcp-state": End(listening, stray_segments, TCP, taken=True),
    "firewall": End(firewall, send_datagrams, UDP),
}


@both_versions
@pytest.mark.parametrize("source", ["client", "outside"])
@pytest.mark.parametrize("name", ENDS)
def test_what_a_pod_drops_is_not_the_nodes(site, name, source, version):
    end = ENDS[name]
    with end.arrange(site.namespace("server"), site.address("server", version)):
        found = site.observer.observe(
            [to_port(end.protocol)], lambda: end.send(site, source, version) or {}
        )
    assert found.drops == []
    assert found.counters["dropped"] == found.counters["dropped_late"] == 0
    assert found.counters["watched"] == COUNT
    # It left by the egress hook, or a socket took it; what did neither was not seen again.
    is_seen = end.taken or site.mode != HOST_ROUTING
    assert found.counters["reported"] == (COUNT if is_seen else 0)
    assert not_seen_again(found) == (0 if is_seen else COUNT)
    assert found.false_flows((site.port(source), site.port("server"))) == 0


# -- a policy on the egress hook of a pod's interface --


@both_versions
@pytest.mark.parametrize("source", ["client", "outside", "host"])
@pytest.mark.parametrize("protocol", [UDP, TCP])
@pytest.mark.parametrize("site", [ENDPOINT_ROUTES], indirect=True)
def test_denial_names_hook_and_interface(site, protocol, source, version):
    """It is a policy for what comes to the pod: the hook is that of an interface towards it."""
    address = site.address("server", version)

    def send() -> dict[int, int]:
        if protocol == UDP:
            traffic.send_udp(site.namespace(source), address, DENIED_PORT, count=COUNT)
            return {}
        for _ in range(COUNT):
            family = traffic.family_of(address)
            with site.namespace(source).socket(family, socket.SOCK_STREAM) as one:
                one.setblocking(False)
                with pytest.raises(BlockingIOError):
                    one.connect((address, DENIED_PORT))
        return {}

    found = site.observer.observe([to_port(protocol, DENIED_PORT)], send)
    assert found.counters["watched"] == found.counters["dropped_late"] == COUNT
    reasons = [drop_reasons.NAMES[each.drop_reason] for each in found.drops]
    assert reasons == ["denied at an egress hook"] * COUNT
    ports = {(each.ingress_port, each.egress_port) for each in found.drops}
    assert ports == {(site.port(source), site.port("server"))}
