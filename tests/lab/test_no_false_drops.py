# SPDX-License-Identifier: Apache-2.0
"""A packet that was delivered is never called dropped: a million of them, each taken by its receiver, and not one drop.

Meanwhile strangers die as fast as the machine can make them, so that the addresses of the dead go to the living and back, and
packet sockets on the interfaces that nobody reads from take (and lose) a clone of every packet.
"""

import contextlib
import itertools
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hostint_agent import bpf_types, classifier, kernel, loader
from tests.lab import datapath as datapaths
from tests.lab import deaths, traffic
from tests.lab.deaths import PORT, Stage
from tests.lab.delivery import Delivery
from tests.lab.topology import Mode, Pod

pytestmark = pytest.mark.lab
_HOUR_NS = 3600 * 10**9
GROUP, BROADCAST, WASTE = "239.4.4.4", "10.244.1.255", "10.203.0.1"
MILLION = 1_000_000
ATTEMPTS = 3
TCP_BYTES = 100_000_000
CONTROL_S = 60


@pytest.fixture(scope="module")
def delivery(tmp_path_factory: pytest.TempPathFactory) -> Delivery:
    return Delivery(tmp_path_factory.mktemp("delivery"))


def watch(stage: Stage) -> None:
    """Watch UDP and TCP to PORT, and what comes back from there."""
    report, port = bpf_types.RuleAction.REPORT, ((PORT, PORT),)
    rules = [
        classifier.Rule(1, 1, report, protocol=17, destination_ports=port),
        classifier.Rule(2, 1, report, protocol=6, destination_ports=port),
        classifier.Rule(3, 1, report, protocol=6, source_ports=port),
    ]
    stage.datapath.watch(rules, {1: datapaths.policy(interval_ns=_HOUR_NS)})


@contextlib.contextmanager
def unread_taps(stage: Stage) -> Iterator[None]:
    """Packet sockets on both interfaces whose buffers overflow: every packet is cloned, and the clone dies."""
    with contextlib.ExitStack() as stack:
        for interface in (stage.client.interface, stage.server.interface, "eth0"):
            tap = stage.host.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            stack.callback(tap.close)
            tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            tap.bind((interface, 0))
        yield


@contextlib.contextmanager
def crowded(mode: Mode, bpf_dir: Path | None = None) -> Iterator[Stage]:
    """A stage with taps, and a device that has no room."""
    with (
        deaths.stage(mode, bpf_dir) as stage,
        unread_taps(stage),
        stage.unread_device(),
        stage.nft("hook output priority 0", "ip daddr 127.0.0.1 udp dport 9 drop"),
    ):
        watch(stage)
        stage.client.namespace.run(*f"ip route replace {GROUP} dev eth0".split())
        stage.host.run(*f"ip route add {WASTE} dev t0".split())
        yield stage


@pytest.fixture(scope="module")
def routed() -> Iterator[Stage]:
    with crowded("routed") as stage:
        yield stage


@pytest.fixture(scope="module")
def bridged() -> Iterator[Stage]:
    with crowded("bridged") as stage:
        yield stage


@dataclass
class Verdicts:
    """What changed while packets were delivered: counters, drops by the kernel's name, drop reports."""

    counters: Mapping[str, int] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    reports: Sequence[object] = ()


@contextlib.contextmanager
def judged(stage: Stage, delivery: Delivery) -> Iterator[Verdicts]:
    """What the datapath says of the packets that the block delivers, while others of the node die.

    Those are unwatched: refused by the output firewall, and for t0 (a reason that is believed even of packets that have left).
    Both die in the sender's own call, and so take no room in the queues of others.
    """
    names, counters = kernel.drop_reason_names(), stage.datapath.counters
    found = Verdicts()
    stage.datapath.drain()
    reasons, before = counters.drops(names), counters.watchlist(1)
    with delivery.wasting(stage.host, "127.0.0.1", WASTE):
        yield found
        after = counters.watchlist(1)
    found.counters = {name: after[name] - before[name] for name in before}
    found.reasons = {n: c - reasons.get(n, 0) for n, c in counters.drops(names).items()}
    found.reasons = {name: count for name, count in found.reasons.items() if count}
    found.reports = stage.drop_reports()


def assert_no_drop(found: Verdicts) -> None:
    """Nothing is reported, nothing is counted."""
    assert (found.reports, found.reasons) == ([], {})
    assert found.counters["dropped"] + found.counters["dropped_late"] == 0


@contextlib.contextmanager
def no_drop(stage: Stage, delivery: Delivery) -> Iterator[None]:
    """Nothing that the block delivers is called dropped."""
    with judged(stage, delivery) as found:
        yield
    assert_no_drop(found)


@dataclass(frozen=True)
class Way:
    """Datagrams from one namespace to another, by names of `place`; `sockets` get each of them."""

    name: str
    count: int
    sender: str
    receivers: tuple[str, ...]
    version: int = 4
    address: str = ""  # if it is not the receiver's
    sockets: int = 1
    options: tuple[str, ...] = ()

    def send(self, stage: Stage, delivery: Delivery) -> bool:
        """Send them; whether every socket got every one."""
        address = self.address or place(stage, self.receivers[0])[self.version]
        receivers = [place(stage, name)[0] for name in self.receivers]
        sender = place(stage, self.sender)[0]
        received = delivery.send(sender, (address, PORT), self.count, receivers, *self.options)
        return received == [self.count] * self.sockets

    def check(self, stage: Stage, delivery: Delivery) -> None:
        """Nothing false, whatever happens; and all delivered, if not at once: the machine has others who fill its queues."""
        for _ in range(ATTEMPTS):
            with judged(stage, delivery) as found:
                complete = self.send(stage, delivery)
            assert_no_drop(found)
            if complete:
                break
        assert complete
        if "gso=20" not in self.options:
            assert found.counters["watched"] == self.count


def place(stage: Stage, name: str) -> dict[int, Any]:
    """Namespace (0) and addresses (4, 6) of a place."""
    if name == "host":
        return {0: stage.host, 4: stage.address(4), 6: stage.address(6)}
    pod = {"client": stage.client, "beside": stage.server, "far": stage.far}[name]
    return {0: pod.namespace, 4: pod.address, 6: pod.address6}


RAW, FAR, HOST, BESIDE = ("raw",), ("far",), ("host",), ("beside",)
JOINED = ("sockets=4", "raw", "join=pod0")
WAYS = [
    Way("forwarded", 250_000, "client", FAR),
    Way("forwarded-v6", 100_000, "client", FAR, 6),
    Way("beside", 100_000, "client", BESIDE),
    Way("to-host", 150_000, "client", HOST, sockets=2, options=RAW),
    Way("to-host-v6", 100_000, "client", HOST, 6, options=("trunc",)),
    Way("from-host", 100_000, "host", FAR, options=("stamp",)),
    Way("gro-to-host", 100_000, "client", HOST, options=("gso=20",)),
    Way("gso-forwarded", 60_000, "client", FAR, 6, options=("gso=20",)),
    Way("group", 50_000, "client", HOST, address=GROUP, sockets=5, options=JOINED),
]
BRIDGED_WAYS = [
    Way("routed", 30_000, "client", FAR),
    Way("bridged", 30_000, "client", BESIDE),
    Way("bridged-v6", 30_000, "client", BESIDE, 6),
    Way("flooded", 20_000, "client", ("host", "beside"), address=BROADCAST, sockets=2),
]


def named(ways: list[Way]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("way", [pytest.param(way, id=way.name) for way in ways])


@named(WAYS)
def test_no_datagram_that_was_delivered_is_called_dropped(routed, delivery, way):
    way.check(routed, delivery)


def test_these_are_a_million():
    assert sum(way.count for way in WAYS) >= MILLION


@named(BRIDGED_WAYS)
def test_no_datagram_through_a_bridge_is_called_dropped(bridged, delivery, way):
    way.check(bridged, delivery)


# -- TCP --


def wait_until(check: Callable[[], bool], what: str) -> None:
    """Wait for something. Raises TimeoutError."""
    deadline = time.monotonic() + deaths.WAIT_S
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {deaths.WAIT_S} s: {what}")
        time.sleep(0.01)


def watched(stage: Stage) -> int:
    """Packets watched so far."""
    return stage.datapath.counters.watchlist(1)["watched"]


# what the kernel calls a drop of a segment whose bytes the receiver has had before
AGAIN = {"TCP_OLD_DATA", "TCP_OFOMERGE", "TCP_OLD_ACK", "TCP_OLD_SEQUENCE", "TCP_RFC7323_PAWS_ACK"}


@contextlib.contextmanager
def connection(
    stage: Stage, source: str, target: str, version: int = 4
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection: the end that connects, and the end that accepts."""
    here, there = place(stage, source), place(stage, target)
    family = traffic.family_of(there[version])
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(there[0].socket(family, socket.SOCK_STREAM))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((there[version], PORT))
        server.listen()
        client = stack.enter_context(here[0].socket(family, socket.SOCK_STREAM))
        client.connect((there[version], PORT))
        accepted = stack.enter_context(server.accept()[0])
        for end in (client, accepted):
            end.settimeout(30)
        yield client, accepted


def transfer(client: socket.socket, accepted: socket.socket, total: int) -> int:
    """Send so many bytes, in small pieces and large; how many came."""

    def send() -> None:
        left = total
        for size in itertools.cycle((300, 50_000)):
            client.sendall(bytes(min(size, left)))
            left -= min(size, left)
            if not left:
                break
        client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    received = 0
    while data := accepted.recv(1 << 20):
        received += len(data)
    sender.join()
    return received


def retransmissions(end: socket.socket) -> int:
    """tcpi_total_retrans of struct tcp_info."""
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("=I", info, 100)[0])


@contextlib.contextmanager
def lossy(pod: Pod, hook: str, percent: int) -> Iterator[None]:
    """A pod that loses some of what comes (input) or goes (output): its own affair, not the node's."""
    inside = pod.namespace
    inside.run("nft", "add table inet loss")
    inside.run("nft", f"add chain inet loss here {{ type filter hook {hook} priority 0; }}")
    rule = f"add rule inet loss here tcp sport {PORT} numgen random mod 100 0-{percent - 1} drop"
    inside.run("nft", rule)
    inside.run("nft", rule.replace("sport", "dport"))
    try:
        yield
    finally:
        inside.run("nft", "delete table inet loss")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("source", "target"), [("client", "far"), ("host", "far")])
def test_no_segment_that_was_delivered_is_called_dropped(routed, delivery, source, target, version):
    with no_drop(routed, delivery), connection(routed, source, target, version) as ends:
        assert transfer(*ends, TCP_BYTES) == TCP_BYTES


@pytest.mark.parametrize("version", [4, 6])
def test_of_what_the_host_received_only_repetitions_are_called_dropped(routed, delivery, version):
    """The kernel frees a segment as dropped when its bytes had come before; such a segment is counted, not reported."""
    with judged(routed, delivery) as found, connection(routed, "client", "host", version) as ends:
        assert transfer(*ends, TCP_BYTES) == TCP_BYTES
    assert found.reports == []
    assert set(found.reasons) <= AGAIN


@pytest.mark.parametrize("hook", ["input", "output"])
@pytest.mark.parametrize("source", ["client", "host"])
def test_what_is_sent_again_is_not_called_dropped(routed, delivery, source, hook):
    """The copies that wait in the sender's queue until they are acknowledged are clones of what went out."""
    first, total = 1000, 2_000_000
    with no_drop(routed, delivery), connection(routed, source, "far") as (client, accepted):
        with lossy(routed.far, hook, 100):
            client.sendall(bytes(first))
            wait_until(lambda: retransmissions(client) >= 2, "data is sent again")
        with lossy(routed.far, hook, 4):
            assert transfer(client, accepted, total) == first + total


def test_what_the_host_gets_a_second_time_is_counted_and_not_reported(routed):
    """Its acknowledgement was lost: the pod sends the same again, and the host throws it away."""
    with connection(routed, "client", "host") as (client, accepted):
        with lossy(routed.client, "input", 100):
            outcome = routed.outcome(lambda: client.send(b"x" * 100), lambda: 2)
        assert accepted.recv(200) == b"x" * 100
    assert outcome.reasons == {"TCP_OLD_DATA": 2}
    assert (outcome.reports, outcome.counters["drops_not_asked"]) == ([], 2)


@pytest.mark.parametrize("version", [4, 6])
def test_last_segment_of_a_connection_is_not_called_dropped(routed, delivery, version):
    """The host closes first: the client's FIN is taken in TIME_WAIT, and freed without a reason."""
    count, address = 100, routed.address(version)
    before = watched(routed)
    with no_drop(routed, delivery), contextlib.ExitStack() as stack:
        server = stack.enter_context(
            routed.host.socket(traffic.family_of(address), socket.SOCK_STREAM)
        )
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((address, PORT))
        server.listen(count)
        clients = []
        for _ in range(count):
            client = routed.client.namespace.socket(server.family, socket.SOCK_STREAM)
            clients.append(stack.enter_context(client))
            client.connect((address, PORT))
            server.accept()[0].close()
            assert client.recv(1) == b""
        # A FIN that acknowledges the other one as well would be queued in a whole socket.
        states = ("ss", "-Htan", "state", "fin-wait-2", f"sport = :{PORT}")
        acknowledged = lambda: len(routed.host.run(*states).splitlines())  # noqa: E731
        wait_until(lambda: acknowledged() >= count, "the FINs are acknowledged")
        for client in clients:
            client.close()
        # SYN, ACK, ACK of the FIN, FIN
        wait_until(lambda: watched(routed) >= before + 4 * count, "the clients have closed")


# -- sockets that go away with unread data: it had been delivered, and nobody can say that it got lost on the way --


@pytest.fixture
def silent(routed):
    """The stage, and afterwards the proof that nothing was called dropped."""
    names, counters = kernel.drop_reason_names(), routed.datapath.counters
    routed.datapath.drain()
    reasons = counters.drops(names)
    yield routed
    assert counters.drops(names) == reasons
    assert routed.drop_reports() == []


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
def test_datagrams_that_a_socket_never_read_are_not_called_dropped(silent, version, killed):
    before = watched(silent)
    address = silent.address(version)
    with traffic.udp_sink(silent.host, address, PORT) as sink:
        keeper = subprocess.Popen(["sleep", "600"], pass_fds=[sink.fileno()])
        try:
            traffic.send_udp(silent.client.namespace, address, PORT, count=200)
            wait_until(lambda: watched(silent) == before + 200, "200 came in")
            assert sink.recv(100) == traffic.payload(0)
            if killed:
                sink.close()
        finally:
            keeper.kill()
            keeper.wait()


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
def test_a_connection_that_ends_with_unread_data_is_not_called_dropped(silent, killed):
    before = watched(silent)
    with connection(silent, "client", "host") as (client, accepted):
        keeper = subprocess.Popen(["sleep", "600"], pass_fds=[accepted.fileno()])
        try:
            client.sendall(b"x" * 50_000)
            wait_until(lambda: watched(silent) >= before + 5, "the data came in")
            assert accepted.recv(1) == b"x"
            if killed:
                accepted.close()
        finally:
            keeper.kill()
            keeper.wait()


# -- without the proof --


def test_without_the_proof_the_dead_would_be_taken_for_the_living(delivery, tmp_path):
    """The same traffic; the drop program believes every address. So the tests above can fail."""
    sources = tmp_path / "bpf"
    shutil.copytree(loader.default_bpf_dir(), sources)
    text = (sources / "drop.h").read_text()
    checks = {
        "scratch->fingerprint != fingerprint": "false",
        "!may_have_tuple(&scratch->key, &scratch->arrived, state)": "false",
    }
    for check, nothing in checks.items():
        assert text.count(check) == 1
        text = text.replace(check, nothing)
    (sources / "drop.h").write_text(text)
    with crowded("routed", sources) as stage, judged(stage, delivery) as found:
        # whose address the allocator hands on is its affair: until it has happened
        deadline = time.monotonic() + CONTROL_S
        while not stage.datapath.counters.watchlist(1)["dropped_late"]:
            assert time.monotonic() < deadline
            Way("to-host", 30_000, "client", HOST).send(stage, delivery)
            Way("forwarded", 30_000, "client", FAR).send(stage, delivery)
    assert found.counters["dropped_late"] > 0
    assert found.reports != []
