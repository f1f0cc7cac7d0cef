# SPDX-License-Identifier: Apache-2.0
"""Every socket that sends reports is announced by its cookie, before it sends and after it ends."""

import contextlib
import socket

import pytest

from hostint_agent import senders, succession
from tests.agent.exports import Clock, accounts, exported  # noqa: F401
from tests.agent.rings import Receiver, closed_destination, rings

pytestmark = pytest.mark.bpf
SO_COOKIE = 57


class Announced:
    """Takes the announcements, and what had arrived at a receiver when each was made."""

    def __init__(self, receiver: Receiver | None = None) -> None:
        self.receiver = receiver
        self.cookies: list[frozenset[int]] = []
        self.silent: list[bool] = []

    def __call__(self, cookies: frozenset[int]) -> None:
        self.cookies.append(cookies)
        if self.receiver:
            self.silent.append(self.receiver.is_empty())


def cookie(of: socket.socket) -> int:
    return int.from_bytes(of.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")


def test_socket_is_announced_before_its_first_report():
    with rings() as datapath, Receiver() as receiver:
        announced = Announced(receiver)
        sockets = senders.SendingSockets(announced)
        exports = exported(datapath, {0: receiver.destination}, sockets=sockets)
        assert announced.cookies == []
        datapath.write(0, 0)
        exports.poll()
        (own,) = announced.cookies[-1]
        assert own == cookie(exports._senders[0]._socket) != 0
        assert announced.cookies == [frozenset((own,))]
        assert announced.silent == [True]
        receiver.take(1)


def test_closed_socket_is_withdrawn():
    with rings() as datapath, Receiver("a") as one, Receiver("b") as two:
        announced = Announced()
        sockets = senders.SendingSockets(announced)
        exports = exported(datapath, {0: one.destination}, sockets=sockets)
        datapath.write(0, 0)
        exports.poll()
        first = announced.cookies[-1]
        exports.set_destinations({0: two.destination})
        assert announced.cookies == [first, frozenset()]
        datapath.write(0, 0)
        exports.poll()
        second = announced.cookies[-1]
        exports.stop()
        assert announced.cookies == [first, frozenset(), second, frozenset()]
        assert not first & second


def test_socket_that_cannot_be_announced_sends_nothing():
    full = True
    clock = Clock()

    def refuse(_: frozenset[int]) -> None:
        if full:
            raise OSError(7, "map update: Argument list too long")

    with rings() as datapath, Receiver() as receiver:
        sockets = senders.SendingSockets(refuse)
        exports = exported(datapath, {0: receiver.destination}, sockets=sockets, clock=clock)
        datapath.write(0, 0)
        exports.poll()
        assert exports.counters() == {0: (0, 1)}
        assert "argument list too long" in exports.health()["here"].message
        assert receiver.is_empty()
        full = False
        clock.now += 1
        exports.recheck()
        assert exports.health()["here"].reachable, "it heals without a report"


def test_exporters_of_one_process_share_their_announcements():
    announced = Announced()
    sockets = senders.SendingSockets(announced)
    with rings() as one, rings() as two, contextlib.ExitStack() as stack:
        for datapath in (one, two):
            exports = exported(datapath, {0: closed_destination()}, sockets=sockets)
            stack.callback(exports.stop)
            datapath.write(0, 0)
            exports.poll()
        assert len(announced.cookies[-1]) == 2
    assert announced.cookies[-1] == frozenset()


def test_reports_of_an_older_build_are_sent_by_announced_sockets():
    with rings() as datapath, Receiver() as receiver:
        announced = Announced()
        sockets = senders.SendingSockets(announced)
        datapath.write(0, 0)
        succession._empty(datapath.maps, {0: receiver.destination}, sockets)
        receiver.take(1)
        assert [len(cookies) for cookies in announced.cookies] == [1, 0]
