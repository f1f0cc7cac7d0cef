# SPDX-License-Identifier: Apache-2.0
"""Addresses and routes of the node change below a sender that goes on sending."""

import contextlib
import errno
import socket
from collections.abc import Iterator

import pytest

from hostint_agent import senders
from hostint_agent.node_rules import Destination
from tests.agent.cable import FAR, FAR6, cable
from tests.agent.exports import Clock, accounts, exported  # noqa: F401
from tests.agent.rings import Receiver, Rings, eventually, rings
from tests.lab.namespace import Namespace

pytestmark = pytest.mark.bpf
SO_NO_CHECK = 11
BURST = 100
# of the near end, by the address of the far one: its address, another one, its network
OWN = {FAR: ("10.98.0.1/24", "10.98.0.5/24"), FAR6: ("fd98::1/64", "fd98::5/64")}
NETWORK = {FAR: "10.98.0.0/24", FAR6: "fd98::/64"}


class Testbed:
    """An exporter at the near end of a cable, and a collector at the far end."""

    __test__ = False

    def __init__(self, near: Namespace, datapath: Rings, receiver: Receiver) -> None:
        self._near, self._datapath, self.receiver = near, datapath, receiver
        self.exports = exported(datapath, {0: receiver.destination})

    def burst(self) -> tuple[int, int]:
        """Write and send reports; return how many were counted as (sent, failed)."""
        before = self.exports.counters().get(0, (0, 0))
        for _ in range(BURST):
            self._datapath.write(0, 0)
        while self._near.inside(self.exports.poll):
            pass
        sent, failed = self.exports.counters()[0]
        return sent - before[0], failed - before[1]

    def sources(self, count: int) -> set[str]:
        """Take exactly so many reports, and return whom they are from."""
        came = [self.receiver.socket.recvfrom(2048)[1][0] for _ in range(count)]
        assert self.receiver.is_empty()
        return set(came)

    def address(self, verb: str, address: str, *more: str) -> None:
        flags = ("nodad",) if ":" in address and verb == "add" else ()
        self._near.run("ip", "addr", verb, address, "dev", "eth0", *flags, *more)

    def route(self, verb: str, network: str) -> None:
        self._near.run("ip", "route", verb, network, "dev", "eth0")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many reports each system call was given."""
    seen: list[int] = []
    real = senders._SENDMSG

    def counted(descriptor: int, header: int, flags: int) -> int:
        seen.append(senders._MessageHeader.from_address(header).iov_count)
        return real(descriptor, header, flags)

    monkeypatch.setattr(senders, "_SENDMSG", counted)
    return seen


@contextlib.contextmanager
def connected(address: str) -> Iterator[Testbed]:
    with cable() as (near, far), rings(1, 1024) as datapath:
        # Else the addresses of a network all go with the first of them.
        near.run("sysctl", "-qw", "net.ipv4.conf.eth0.promote_secondaries=1")
        with far.inside(lambda: Receiver("far", address)) as receiver:
            made = Testbed(near, datapath, receiver)
            assert made.burst() == (BURST, 0)
            assert made.sources(BURST) == {plain(OWN[address][0])}
            yield made
            made.exports.stop()


def plain(address: str) -> str:
    return address.partition("/")[0]


@pytest.mark.parametrize("order", ["del add", "add del"])
@pytest.mark.parametrize("address", [FAR, FAR6])
def test_reports_leave_from_the_new_address_of_a_node(address, order, calls):
    with connected(address) as site:
        before, after = OWN[address]
        for verb in order.split():
            site.address(verb, before if verb == "del" else after)
        assert site.burst() == (BURST, 0)
        assert site.sources(BURST) == {plain(after)}
        calls.clear()
        assert site.burst() == (BURST, 0)
        assert calls == [BURST]


@pytest.mark.parametrize("address", [FAR, FAR6])
def test_reports_without_any_address_fail_until_there_is_one(address, calls):
    with connected(address) as site:
        before, after = OWN[address]
        site.address("del", before)
        if address == FAR6:
            site._near.run("ip", "-6", "addr", "flush", "dev", "eth0")
        assert site.burst() == (0, BURST)
        assert site.exports.health()["far"].reason == "NoRoute"
        site.address("add", after)
        calls.clear()
        assert site.burst() == (BURST, 0)
        assert site.sources(BURST) == {plain(after)}
        assert calls == [BURST]


@pytest.mark.parametrize("address", [FAR, FAR6])
def test_address_that_moves_away_while_the_route_is_gone(address, calls):
    with connected(address) as site:
        before, after = OWN[address]
        site.route("del", NETWORK[address])
        assert site.burst() == (0, BURST)
        site.address("add", after)
        site.address("del", before)
        with contextlib.suppress(RuntimeError):
            site.route("add", NETWORK[address])
        calls.clear()
        assert site.burst() == (BURST, 0)
        assert site.sources(BURST) == {plain(after)}
        assert calls == [BURST]


@pytest.mark.parametrize("address", [FAR, FAR6])
def test_route_that_comes_back_brings_reports_and_segments_back(address, calls):
    with connected(address) as site:
        site.route("del", NETWORK[address])
        assert site.burst() == (0, BURST)
        site.route("add", NETWORK[address])
        calls.clear()
        assert site.burst() == (BURST, 0)
        assert site.sources(BURST) == {plain(OWN[address][0])}
        assert calls == [BURST]


def test_source_that_is_deprecated_is_used_no_more():
    with connected(FAR6) as site:
        before, after = OWN[FAR6]
        site.address("add", after)
        site.address("change", before, "preferred_lft", "0")
        assert site.burst() == (BURST, 0)
        assert site.sources(BURST) == {plain(after)}
        site.address("del", before)
        assert site.burst() == (BURST, 0)
        assert site.sources(BURST) == {plain(after)}


def test_mapped_address_is_one_of_ipv4():
    with rings() as datapath, Receiver(dscp=46) as receiver:
        to = receiver.destination
        mapped = Destination("here", f"::ffff:{to.address}", to.port, to.dscp)
        exports = exported(datapath, {0: mapped})
        datapath.write(0, 0)
        exports.poll()
        _, control, _, (source, _) = receiver.socket.recvmsg(2048, 64)
        assert (control[0][2][0], source) == (46 << 2, "127.0.0.1")


def test_segments_are_tried_again_after_a_while(calls):
    clock = Clock()
    with rings() as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination}, clock=clock)

        def burst() -> list[int]:
            calls.clear()
            for _ in range(10):
                datapath.write(0, 0)
            exports.poll()
            receiver.take(10)
            return list(calls)

        assert burst() == [10]
        sender = exports._senders[0]._socket
        # The kernel refuses UDP_SEGMENT with EIO on a socket that sends no checksums.
        sender.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        assert burst() == [10] + [1] * 10
        assert burst() == [1] * 10
        clock.now += 61
        assert burst() == [10] + [1] * 10, "tried again"
        assert burst() == [1] * 10, "and then not for a while"
        sender.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 0)
        assert burst() == [1] * 10
        clock.now += 61
        assert burst() == [10]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP])
def test_error_that_single_reports_get_too_is_not_about_segments(code, calls, monkeypatch):
    with rings(1, 1024) as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        counted = senders._SENDMSG

        def refuse(descriptor: int, header: int, flags: int) -> int:
            counted(-1, header, flags)
            senders.ctypes.set_errno(code)
            return -1

        def burst() -> None:
            calls.clear()
            for _ in range(1000):
                datapath.write(0, 0)
            while exports.poll():
                pass

        monkeypatch.setattr(senders, "_SENDMSG", refuse)
        burst()
        assert exports.counters() == {0: (0, 1000)}
        assert len(calls) < 20, "a call for each report"
        monkeypatch.setattr(senders, "_SENDMSG", counted)
        burst()
        assert exports.counters() == {0: (1000, 1000)}
        assert max(calls) == 128
        receiver.take(1000)


def test_stable_address_is_preferred_to_temporary_ones():
    """A collector knows a node by its address; temporary ones change every day (RFC 8981)."""
    with cable() as (near, far), rings() as datapath:
        near.run("sysctl", "-qw", "net.ipv6.conf.eth0.use_tempaddr=2")
        near.run("ip", "addr", "flush", "dev", "eth0", "scope", "global")
        near.run(
            *"ip addr add fd98::77/64 dev eth0 mngtmpaddr nodad valid_lft 9999 preferred_lft 9999".split()
        )
        assert "temporary" in near.run("ip", "-6", "addr", "show", "dev", "eth0")
        eventually(lambda: "tentative" not in near.run("ip", "-6", "addr", "show", "dev", "eth0"))
        with far.inside(lambda: Receiver("far", FAR6)) as receiver:
            exports = exported(datapath, {0: receiver.destination})
            datapath.write(0, 0)
            near.inside(exports.poll)
            assert receiver.socket.recvfrom(2048)[1][0] == "fd98::77"
