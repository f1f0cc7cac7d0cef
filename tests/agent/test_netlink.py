# SPDX-License-Identifier: Apache-2.0
"""Our rtnetlink reader says what pyroute2 says, and takes no half of an answer for a whole one."""

import ipaddress
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pyroute2
import pytest

from hostint_agent import interfaces, netlink
from tests.lab.namespace import Namespace, ip

_HEADER = struct.Struct("=IHHII")
INTERRUPTED = netlink.NLM_F_DUMP_INTR
ERROR, DONE, OVERRUN = 2, 3, 4


def message(kind: int, body: bytes = b"", *, flags: int = 0, sequence: int = 1) -> bytes:
    return _HEADER.pack(16 + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)


def done(sequence: int = 1, code: int = 0, flags: int = 0) -> bytes:
    return message(DONE, struct.pack("=i", code), flags=flags, sequence=sequence)


class Kernel:
    """Answers with what it was given, a datagram at a time."""

    def __init__(self, *datagrams: bytes, flags: int = 0) -> None:
        self.datagrams = list(datagrams)
        self.asked = 0
        self._flags = flags

    def sendto(self, data: bytes, address: object) -> None:
        self.asked += 1

    def recvmsg(self, size: int) -> tuple[bytes, list[object], int, None]:
        return self.datagrams.pop(0), [], self._flags, None

    def close(self) -> None:
        pass


@pytest.fixture
def speaking(monkeypatch):
    def make(*datagrams: bytes, flags: int = 0) -> tuple[netlink.Socket, Kernel]:
        made, kernel = netlink.Socket(), Kernel(*datagrams, flags=flags)
        made._socket.close()
        made._socket = kernel
        monkeypatch.setattr(netlink.time, "sleep", lambda _: None)
        return made, kernel

    return make


def test_a_dump_is_everything_up_to_its_end_over_several_datagrams(speaking):
    route, _ = speaking(message(16, b"one.") + message(16, b"two."), message(16, b"six.") + done())
    assert route.dump(18, b"") == [b"one.", b"two.", b"six."]


def test_a_dump_that_met_a_change_is_asked_for_again(speaking):
    route, kernel = speaking(
        message(16, b"old.", flags=INTERRUPTED) + done(1),
        message(16, b"new.", sequence=2) + done(2),
    )
    assert route.dump(18, b"") == [b"new."]
    assert kernel.asked == 2


def test_a_dump_whose_end_alone_tells_of_a_change_is_asked_for_again(speaking):
    route, _ = speaking(
        message(16, b"old.") + done(1, flags=INTERRUPTED),
        message(16, b"new.", sequence=2) + done(2),
    )
    assert route.dump(18, b"") == [b"new."]


def test_a_dump_that_never_meets_quiet_fails(speaking):
    answers = [done(number, flags=INTERRUPTED) for number in range(1, 100)]
    route, kernel = speaking(*answers)
    with pytest.raises(netlink.NetlinkError, match="changed during every dump"):
        route.dump(18, b"")
    assert kernel.asked < 10


def test_a_dump_that_need_not_be_whole_is_the_last_answer(speaking):
    """Addresses of IPVS may change for as long as a cluster lives."""
    answers = [
        message(16, bytes((number, 0, 0, 0)), sequence=number) + done(number, flags=INTERRUPTED)
        for number in range(1, 100)
    ]
    route, kernel = speaking(*answers)
    assert route.dump(18, b"", whole=False) == [bytes((kernel.asked, 0, 0, 0))]
    assert kernel.asked < 10


def test_what_answers_an_older_question_is_passed_over(speaking):
    route, _ = speaking(message(16, b"old.", sequence=7) + message(16, b"new.") + done())
    assert route.dump(18, b"") == [b"new."]


def test_a_refusal_is_the_error_that_its_number_means(speaking):
    route, _ = speaking(message(ERROR, struct.pack("=i", -2) + bytes(16)))
    with pytest.raises(FileNotFoundError, match="a filter"):
        route.request(45, 0, b"", "a filter")


def test_an_error_at_the_end_of_a_dump_is_no_end_of_a_dump(speaking):
    route, _ = speaking(message(16, b"one."), done(code=-12))
    with pytest.raises(OSError, match="Cannot allocate memory"):
        route.dump(18, b"")


def test_a_request_that_was_granted_returns(speaking):
    route, _ = speaking(message(ERROR, bytes(20)))
    route.request(44, 0, b"", "a filter")


def test_lost_data_is_an_error(speaking):
    route, _ = speaking(message(OVERRUN))
    with pytest.raises(netlink.NetlinkError, match="data lost"):
        route.dump(18, b"")


def test_a_datagram_that_did_not_fit_is_an_error(speaking):
    route, _ = speaking(message(16, b"one."), flags=socket.MSG_TRUNC)
    with pytest.raises(netlink.NetlinkError, match="answer of more than"):
        route.dump(18, b"")


@pytest.mark.parametrize("length", [0, 15, 21])
def test_a_message_of_an_impossible_length_is_an_error(speaking, length):
    route, _ = speaking(_HEADER.pack(length, 16, 0, 1, 0) + b"one.")
    with pytest.raises(netlink.NetlinkError):
        route.dump(18, b"")


def test_half_a_message_is_an_error(speaking):
    route, _ = speaking(message(16, b"one.")[:12])
    with pytest.raises(netlink.NetlinkError, match="no message"):
        route.dump(18, b"")


@pytest.mark.parametrize("length", [0, 3, 9])
def test_an_attribute_of_an_impossible_length_is_an_error(length):
    with pytest.raises(netlink.NetlinkError):
        netlink.attributes(struct.pack("=HH", length, 3) + b"abcd")


def test_attributes_are_read_as_they_were_written_without_their_flags():
    nested = 0x8000
    data = netlink.attribute(3, b"eth0\0") + netlink.attribute(18 | nested, b"x" * 7)
    assert netlink.attributes(b"skip" + data, 4) == {3: b"eth0\0", 18: b"x" * 7}


# against the kernel

LINKS = 40
ROUTES = 4000


@pytest.fixture(scope="module")
def crowded() -> Iterator[Namespace]:
    """A namespace with interfaces of many kinds, addresses and routes: answers of several datagrams each."""
    name, far = f"hostint-nl-{os.getpid()}", f"hostint-nlf-{os.getpid()}"
    ip(f"netns add {name}", f"netns add {far}")
    here = Namespace(name)
    try:
        lines = ["link set lo up", "link add br0 type bridge", "link add ifb9 type ifb"]
        lines += [
            "link add vx0 type vxlan id 7 dstport 4789 remote 192.0.2.9",
            "tuntap add tun0 mode tun",
        ]
        lines += ["tuntap add tap0 mode tap", "link add here type veth peer name there"]
        lines += ["link add mv0 link there type macvlan", "link set here master br0"]
        lines += ["addr add 192.0.2.1/24 dev br0", "link set br0 up"]
        lines += [
            "addr add 192.0.2.129 peer 192.0.2.130 dev tun0",
            "link set tun0 up",
            "link set here up",
        ]
        for number in range(LINKS):
            lines += [
                f"link add pod{number} type veth peer name eth{number} netns {far}",
                f"link set pod{number} up",
                f"addr add 10.{number}.0.1/24 dev pod{number}",
                f"addr add fd00:{number:x}::1/64 dev pod{number} nodad",
            ]
        lines += [f"route add 172.16.{n // 256}.{n % 256}/32 dev br0" for n in range(ROUTES)]
        # one default route has two ways, another one is in a table of its own
        lines += ["route add default nexthop via 10.1.0.9 dev pod1 nexthop via 10.2.0.9 dev pod2"]
        lines += ["route add default via 10.4.0.9 dev pod4 table 100"]
        lines += ["route add ::/0 via fd00:3::9 dev pod3"]
        ip(*(f"-n {name} {line}" for line in lines))
        yield here
    finally:
        ip(f"netns del {name}", f"netns del {far}")


def links_by_pyroute2() -> set[tuple[object, ...]]:
    with pyroute2.IPRoute() as route:
        found = set()
        for link in route.get_links():
            info = link.get_attr("IFLA_LINKINFO")
            kind = info.get_attr("IFLA_INFO_KIND") if info else None
            foreign = link.get_attr("IFLA_LINK_NETNSID") is not None
            shown = (link["index"], link.get_attr("IFLA_IFNAME"), kind, link["ifi_type"] == 1)
            lower = None if foreign else link.get_attr("IFLA_LINK") or None
            master = link.get_attr("IFLA_MASTER")
            found.add((*shown, bool(link["flags"] & 8), foreign, master, lower))
        return found


def addresses_by_pyroute2() -> dict[int, tuple[str, ...]]:
    found: dict[int, list[str]] = {}
    with pyroute2.IPRoute() as route:
        for one in route.get_addr():
            text = one.get_attr("IFA_LOCAL") or one.get_attr("IFA_ADDRESS")
            if one["scope"] == 0 and not ipaddress.ip_address(text).is_link_local:
                found.setdefault(one["index"], []).append(text)
    return {i: tuple(sorted(texts)) for i, texts in found.items()}


def every_address(network: interfaces.Network) -> set[str]:
    return {address for some in network.addresses.values() for address in some}


@pytest.mark.lab
def test_we_read_of_links_what_pyroute2_reads(crowded):
    ours = crowded.inside(interfaces.read_network).links
    told = {
        (
            *(i.ifindex, i.name, i.kind, i.is_ethernet),
            i.is_loopback,
            *(i.has_foreign_peer, i.master, i.lower),
        )
        for i in ours
    }
    assert told == crowded.inside(links_by_pyroute2)
    kinds = {"veth", "bridge", "vxlan", "ifb", "macvlan", "tun", None}
    assert len(told) > LINKS
    assert {link.kind for link in ours} == kinds
    by_name = {link.name: link for link in ours}
    assert by_name["pod0"].has_foreign_peer
    assert not by_name["here"].has_foreign_peer
    assert by_name["here"].master == by_name["br0"].ifindex
    assert by_name["here"].lower == by_name["mv0"].lower == by_name["there"].ifindex
    assert by_name["pod0"].lower is None
    assert by_name["tap0"].is_ethernet
    assert not by_name["tun0"].is_ethernet


@pytest.mark.lab
def test_we_read_of_addresses_what_pyroute2_reads(crowded):
    ours = crowded.inside(interfaces.read_network)
    assert ours.addresses == crowded.inside(addresses_by_pyroute2)
    assert {"10.7.0.1", "fd00:7::1", "192.0.2.129"} <= every_address(ours)


@pytest.mark.lab
def test_default_routes_are_those_of_the_main_table_with_all_their_ways(crowded):
    ours = crowded.inside(interfaces.read_network)
    names = {link.ifindex: link.name for link in ours.links}
    assert {names[index] for index in ours.default_route} == {"pod1", "pod2", "pod3"}


@pytest.mark.lab
def test_routes_come_in_several_datagrams_and_all_of_them(crowded):
    def routes() -> list[bytes]:
        with netlink.Socket() as route:
            return route.dump(netlink.RTM_GETROUTE, struct.pack("=BBBBBBBBI", 2, *([0] * 8)))

    answer = crowded.inside(routes)
    assert sum(map(len, answer)) > 1 << 17
    assert sum(body[1] == 32 and b"\xac\x10" in body for body in answer) >= ROUTES


@pytest.mark.lab
def test_what_is_read_while_links_come_and_go_is_whole(crowded):
    """What stays is in every answer, though every answer met changes."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            ip(f"-n {crowded.name} link add churn type ifb", f"-n {crowded.name} link del churn")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        before = {link.name for link in crowded.inside(interfaces.read_network).links} - {"churn"}
        for _ in range(100):
            links = crowded.inside(interfaces.read_network).links
            names = [link.name for link in links]
            assert set(names) - {"churn"} == before
            assert len(names) == len(set(names))
    finally:
        stop.set()
        thread.join()


@pytest.mark.lab
def test_addresses_that_change_without_end_stop_no_reading(crowded):
    """A dump of more than a datagram meets a change each time."""
    stop = threading.Event()
    name = crowded.name
    ip(*(f"-n {name} addr add 10.200.{n // 250}.{n % 250}/32 dev ifb9" for n in range(4000)))

    def churn() -> None:
        while not stop.is_set():
            change = f"-n {name} addr {{}} 10.201.0.1/32 dev ifb9"
            ip(*(change.format(word) for _ in range(50) for word in ("add", "del")))

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(10):
            found = crowded.inside(interfaces.read_network)
            assert {"10.7.0.1", "fd00:7::1", "192.0.2.1"} <= every_address(found)
    finally:
        stop.set()
        thread.join()
        ip(f"-n {name} addr flush dev ifb9")


CHANGES = {
    "an address": "addr {0} 10.202.0.1/32 dev ifb9",
    "an IPv6 address": "addr {0} fd00:ffff::1/64 dev ifb9 nodad",
    "a temporary IPv6 address": "addr {0} fd00:ffff::2/64 dev ifb9 valid_lft 90 preferred_lft 60",
    "a link": "link {0} ifb8 type ifb",
    "a default route": "route {0} default via 192.0.2.9 dev br0 metric 77",
}


@pytest.mark.lab
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_when_it_comes_and_when_it_goes(crowded, change):
    changes = crowded.inside(interfaces.Changes)
    try:
        for word in ("add", "del"):
            changes.drain()
            ip(f"-n {crowded.name} {CHANGES[change].format(word)}")
            assert changes.wait(5)
            time.sleep(0.05)
        changes.drain()
        assert not changes.wait(0.05)
        ip(*(f"-n {crowded.name} route {word} 172.31.0.1/32 dev br0" for word in ("add", "del")))
        assert not changes.wait(0.2)
    finally:
        changes.close()


@pytest.mark.lab
def test_changes_that_were_lost_are_a_change(crowded):
    """More messages than the socket has room for: ENOBUFS."""
    changes = crowded.inside(interfaces.Changes)
    try:
        changes._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        lines = [f"-n {crowded.name} route {{}} 172.31.{n}.1/32 dev br0" for n in range(250)]
        ip(*(line.format(word) for word in ("add", "del") for line in lines))
        assert changes.wait(5)
        assert not changes.wait(0.05)
    finally:
        changes.close()


def test_pyroute2_is_nothing_that_an_agent_imports():
    """25 MB of every agent's memory."""
    script = "import sys, hostint_agent.__main__; assert 'pyroute2' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
