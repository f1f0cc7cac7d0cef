# SPDX-License-Identifier: Apache-2.0
"""What becomes of reports when the network does not take them: each is counted, and none holds the exporter up."""

import contextlib
import select
import socket
import struct
import time

import pytest

from hostint_agent import exporter
from hostint_agent.node_rules import Destination
from tests.agent.cable import FAR, FAR6, NOBODY, NOBODY6, cable
from tests.agent.exports import accounts, exported, sequence  # noqa: F401
from tests.agent.rings import Receiver, closed_destination, eventually, rings
from tests.lab.namespace import Namespace

pytestmark = pytest.mark.bpf
SO_SNDBUF, SO_RCVBUFFORCE = socket.SO_SNDBUF, 33
# as much as some batches need; the kernel doubles it
SMALL_BUFFER = 20_000
IP_BYTES, UDP_BYTES = 20, 8
LENGTH = 40


def queue(end: Namespace, verb: str, rate: str, limit: str) -> None:
    """What leaves by the cable waits in a queue of `limit` bytes and goes at `rate`."""
    end.run(
        *("tc", "qdisc", verb, "dev", "eth0", "root"),
        *("tbf", "rate", rate, "burst", "30kb", "limit", limit),
    )


def far_receiver(far: Namespace, address: str = FAR) -> Receiver:
    return far.inside(lambda: Receiver("far", address))


def drained(near: Namespace, exports: exporter.Exporter) -> None:
    """Poll until nothing waits, with the sockets at the near end."""
    while near.inside(exports.poll):
        pass


def received(receiver: Receiver, count: int) -> list[bytes]:
    """So many reports, and no more."""
    came = receiver.take(count)
    assert receiver.is_empty()
    return came


@pytest.mark.parametrize("address", [FAR, FAR6])
def test_reports_leave_the_host(address):
    with cable() as (near, far), rings() as datapath, far_receiver(far, address) as receiver:
        written = [datapath.write(0, 0, 40 + i % 3) for i in range(100)]
        exports = exported(datapath, {0: receiver.destination})
        drained(near, exports)
        assert sorted(received(receiver, 100)) == sorted(written)
        assert exports.counters() == {0: (100, 0)}


@pytest.mark.parametrize("address", [FAR, FAR6])
def test_reports_that_a_full_device_queue_refuses_are_counted_as_failed(address):
    with cable() as (near, far), rings(1, 4096) as datapath:
        with far_receiver(far, address) as receiver:
            queue(near, "add", "8mbit", "60kb")
            exports = exported(datapath, {0: receiver.destination})
            for _ in range(4000):
                datapath.write(0, 0)
            drained(near, exports)
            sent, failed = exports.counters()[0]
            assert (sent + failed, failed > 0) == (4000, True)
            assert exports.health()["far"].reason == "QueueFull"
            assert len(received(receiver, sent)) == sent


def test_a_full_send_buffer_is_waited_for_once_and_then_counted_as_failed():
    with cable() as (near, far), rings(1, 4096) as datapath:
        with far_receiver(far) as receiver:
            exports = exported(datapath, {0: receiver.destination})
            datapath.write(0, 0)
            drained(near, exports)
            exports._senders[0]._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUF, SMALL_BUFFER)
            queue(near, "add", "8kbit", "10mb")
            for _ in range(4000):
                datapath.write(0, 0)
            began = time.monotonic()
            drained(near, exports)
            # of 32 batches most found it full, and one wait is 50 ms
            assert time.monotonic() - began < 1
            sent, failed = exports.counters()[0]
            assert (sent + failed, failed > 2000) == (4001, True)
            assert exports.health()["far"].reason == "SendBufferFull"
            queue(near, "change", "1gbit", "10mb")
            nudge(near)
            assert len(received(receiver, sent)) == sent


def nudge(near: Namespace) -> None:
    """One packet of somebody else, so that the queue looks at its new rate."""
    with near.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.sendto(b"", (FAR, 9))


def test_a_short_jam_costs_no_report():
    with cable() as (near, far), rings(1, 4096) as datapath:
        with far_receiver(far) as receiver:
            exports = exported(datapath, {0: receiver.destination})
            datapath.write(0, 0)
            drained(near, exports)
            exports._senders[0]._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUF, SMALL_BUFFER)
            # a batch is through in 1 ms, the buffer is full after a few
            queue(near, "add", "80mbit", "10mb")
            for _ in range(4000):
                datapath.write(0, 0)
            drained(near, exports)
            assert exports.counters() == {0: (4001, 0)}
            assert len(received(receiver, 4001)) == 4001


def test_what_the_network_said_earlier_does_not_end_the_wait_for_room():
    with cable() as (near, far), rings(1, 4096) as datapath:
        with far_receiver(far) as receiver:
            to = receiver.destination
        exports = exported(datapath, {0: to})
        datapath.write(0, 0)
        drained(near, exports)
        sender = exports._senders[0]._socket
        eventually(lambda: has_errors(sender))
        with far.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
            listening.bind((to.address, to.port))
            sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUF, SMALL_BUFFER)
            queue(near, "add", "80mbit", "10mb")
            for _ in range(4000):
                datapath.write(0, 0)
            drained(near, exports)
            assert exports.counters() == {0: (4001, 0)}


def has_errors(sender: socket.socket) -> bool:
    asked = select.poll()
    asked.register(sender, 0)
    return bool(asked.poll(0))


def test_stop_ends_when_the_network_takes_nothing():
    with cable() as (near, far), rings(2, 4096) as datapath:
        with far_receiver(far) as receiver:
            exports = exported(datapath, {0: receiver.destination})
            datapath.write(0, 0)
            drained(near, exports)
            exports._senders[0]._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUF, SMALL_BUFFER)
            queue(near, "add", "8kbit", "10mb")
            for i in range(4000):
                datapath.write(i % 2, 0, 40 + i % 7)
            began = time.monotonic()
            exports.start()
            exports.stop()
            assert time.monotonic() - began < 2
            assert not exports.alive
            assert exports.fill() == [0, 0]


def test_one_jammed_collector_costs_another_no_report():
    with cable() as (near, far), rings(1, 4096) as datapath:
        with far_receiver(far) as jammed, near.inside(lambda: Receiver("near")) as free:
            exports = exported(datapath, {0: jammed.destination, 1: free.destination})
            datapath.write(0, 0)
            drained(near, exports)
            exports._senders[0]._socket.setsockopt(socket.SOL_SOCKET, SO_SNDBUF, SMALL_BUFFER)
            queue(near, "add", "8kbit", "10mb")
            for i in range(4000):
                datapath.write(0, i % 2)
            drained(near, exports)
            assert exports.counters()[1] == (2000, 0)
            assert exports.counters()[0][1] > 0
            assert len(received(free, 2000)) == 2000


@pytest.mark.parametrize("address", [NOBODY, NOBODY6])
def test_a_host_that_does_not_answer_shows_in_health(address):
    with cable() as (near, _), rings() as datapath:
        for version in ("ipv4", "ipv6"):
            near.run("sysctl", "-qw", f"net.{version}.neigh.eth0.retrans_time_ms=20")
        exports = exported(datapath, {0: Destination("silent", address, 9, 0)})

        def unreachable() -> bool:
            datapath.write(0, 0)
            drained(near, exports)
            return not exports.health()["silent"].reachable

        eventually(unreachable)
        assert exports.health()["silent"].reason == "HostUnreachable"


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_without_a_route_every_report_is_counted_as_failed(address):
    with cable() as (near, _), rings() as datapath:
        exports = exported(datapath, {0: Destination("elsewhere", address, 9, 0)})
        for i in range(50):
            datapath.write(0, 0, 40 + i % 2)
        drained(near, exports)
        assert exports.counters() == {0: (0, 50)}
        assert exports.health()["elsewhere"].reason == "NoRoute"


def test_a_route_that_goes_away_is_counted_and_told_and_may_come_back():
    with cable() as (near, far), rings() as datapath, far_receiver(far) as receiver:
        exports = exported(datapath, {0: receiver.destination})
        for step in range(3):
            for _ in range(20):
                datapath.write(0, 0)
            if step == 1:
                near.run("ip", "route", "del", "10.98.0.0/24")
            if step == 2:
                near.run("ip", "route", "add", "10.98.0.0/24", "dev", "eth0")
            drained(near, exports)
        assert exports.counters() == {0: (40, 20)}
        assert len(received(receiver, 40)) == 40


def test_reports_that_a_firewall_refuses_are_counted_as_failed():
    with cable() as (near, far), rings() as datapath, far_receiver(far) as receiver:
        near.run(
            "nft", "add table inet t; add chain inet t o { type filter hook output priority 0; }"
        )
        near.run("nft", "add rule inet t o udp dport", str(receiver.destination.port), "drop")
        exports = exported(datapath, {0: receiver.destination})
        for _ in range(100):
            datapath.write(0, 0)
        drained(near, exports)
        assert exports.counters() == {0: (0, 100)}
        assert exports.health()["far"].reachable is False
        assert receiver.is_empty()


def test_refused_batches_are_each_sent_once():
    with rings(1, 1024) as datapath:
        closed = closed_destination()
        exports = exported(datapath, {0: closed})
        with capture(closed) as seen:
            for _ in range(4):
                for _ in range(200):
                    datapath.write(0, 0, LENGTH)
                exports.poll()
            assert exports.counters() == {0: (800, 0)}
            assert sorted(map(sequence, seen(800))) == list(range(1, 801))


@contextlib.contextmanager
def capture(destination: Destination):
    """Reports of LENGTH bytes to a port of the loopback where nobody listens."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        raw.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
        raw.settimeout(5)

        def seen(count: int) -> list[bytes]:
            found: list[bytes] = []
            while len(found) < count:
                packet = raw.recv(65536)
                if struct.unpack_from("!H", packet, IP_BYTES + 2)[0] == destination.port:
                    # the loopback hands batches over whole
                    starts = range(IP_BYTES + UDP_BYTES, len(packet), LENGTH)
                    found += [packet[start : start + LENGTH] for start in starts]
            return found

        yield seen
