# SPDX-License-Identifier: Apache-2.0
"""What is read of a network namespace, and which changes are a reason to read it again."""

import dataclasses
import errno
import socket
import struct

import pytest
import structlog

from hostint_agent import interfaces, netlink
from tests.agent import node_shapes


def route_message(kind: int, length: int) -> bytes:
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, length, 0, 0, 254, 0, 0, 1, 0)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def test_only_default_routes_are_a_reason_to_look_again():
    """A router daemon changes thousands of the others."""
    other = route_message(netlink.RTM_NEWROUTE, 24) + route_message(netlink.RTM_DELROUTE, 32)
    assert not interfaces._matters(other)
    assert interfaces._matters(route_message(netlink.RTM_DELROUTE, 0))
    assert interfaces._matters(other + route_message(netlink.RTM_NEWROUTE, 0))


def test_every_other_message_is_a_reason_to_look_again():
    assert interfaces._matters(route_message(netlink.RTM_NEWLINK, 24))
    assert interfaces._matters(b"what nobody understands")
    assert interfaces._matters(struct.pack("=IHHII", 16, netlink.RTM_NEWROUTE, 0, 0, 0))


def link_message(kind: str, *data: tuple[int, bytes]) -> bytes:
    inside = b"".join(netlink.attribute(*each) for each in data)
    info = netlink.attribute(1, kind.encode() + b"\0") + netlink.attribute(2, inside)
    head = struct.pack("=BxHiII", 0, 1, 7, 0, 0)
    return head + netlink.attribute(3, b"dev7\0") + netlink.attribute(18, info)


def test_tunnels_are_known_by_their_ports():
    port = struct.pack("!H", 4444)
    links = [
        interfaces._link(link_message("vxlan", (1, bytes(4)), (15, port))),
        interfaces._link(link_message("geneve", (5, port))),
        interfaces._link(link_message("bridge", (15, port), (5, port))),
        interfaces._link(link_message("vxlan")),
    ]
    assert [link.tunnel_port for link in links] == [4444, 4444, None, None]
    found = interfaces.Network((*links, *links), {}, frozenset(), frozenset())
    assert found.tunnel_ports("vxlan") == [4444]
    assert dataclasses.replace(found, links=()).tunnel_ports("geneve") == []


# what cannot be read is left out, and the rest is read

OTHER_FAMILIES = {
    # struct ifaddrmsg, and the address as IFA_LOCAL: an endpoint id of MCTP, an address of Phonet
    "MCTP": struct.pack("=BBBBI", 45, 8, 0, 0, 2) + netlink.attribute(2, b"\x09"),
    "Phonet": struct.pack("=BBBBI", 35, 0, 0x80, 0, 2) + netlink.attribute(2, b"\x6c"),
    "a family to come": struct.pack("=BBBBI", 99, 0, 0, 0, 2),
}
MALFORMED_ADDRESSES = {
    "half a header": b"\x02\x18",
    "no address": struct.pack("=BBBBI", socket.AF_INET, 24, 0, 0, 2),
    "five bytes": struct.pack("=BBBBI", socket.AF_INET, 24, 0, 0, 2)
    + netlink.attribute(2, bytes(5)),
    "an impossible attribute": struct.pack("=BBBBI", socket.AF_INET, 24, 0, 0, 2) + b"\xff\0\2\0",
    "IPv4 of 16 bytes": struct.pack("=BBBBI", socket.AF_INET, 24, 0, 0, 2)
    + netlink.attribute(1, bytes(16)),
}
LINK_HEAD = struct.pack("=BxHiII", 0, 1, 77, 0, 0)
MALFORMED_LINKS = {
    "no name": LINK_HEAD + netlink.attribute(4, bytes(4)),
    "half a header": LINK_HEAD[:9],
    "a short master": LINK_HEAD + netlink.attribute(3, b"x\0") + netlink.attribute(10, b"\1"),
    "a broken kind": LINK_HEAD
    + netlink.attribute(3, b"x\0")
    + netlink.attribute(18, b"\xff\0\1\0"),
}


def with_warnings(shape: node_shapes.Shape) -> tuple[interfaces.Network, list[str]]:
    with structlog.testing.capture_logs() as logs:
        found = node_shapes.read(shape)
    return found, [line["event"] for line in logs]


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_addresses_of_other_families_are_none_of_ours(family):
    shape = dataclasses.replace(node_shapes.KIND, more_addresses=[OTHER_FAMILIES[family]])
    found, warnings = with_warnings(shape)
    assert found == node_shapes.read(node_shapes.KIND)
    assert warnings == []


@pytest.mark.parametrize("name", MALFORMED_ADDRESSES)
def test_a_malformed_address_is_left_out_and_logged_once(name, monkeypatch):
    monkeypatch.setattr(interfaces, "_READER", interfaces._Reader())
    body = MALFORMED_ADDRESSES[name]
    shape = dataclasses.replace(node_shapes.KIND, more_addresses=[body, body])
    found, warnings = with_warnings(shape)
    assert found == node_shapes.read(node_shapes.KIND)
    assert warnings == ["netlink message left out"]
    assert with_warnings(shape)[1] == []


@pytest.mark.parametrize("name", MALFORMED_LINKS)
def test_a_malformed_link_is_left_out_and_logged_once(name, monkeypatch):
    monkeypatch.setattr(interfaces, "_READER", interfaces._Reader())
    shape = dataclasses.replace(node_shapes.KIND, more_links=[MALFORMED_LINKS[name]] * 2)
    found, warnings = with_warnings(shape)
    assert found == node_shapes.read(node_shapes.KIND)
    assert warnings == ["netlink message left out"]


def test_the_number_of_warnings_has_an_end(monkeypatch):
    monkeypatch.setattr(interfaces, "_READER", interfaces._Reader())
    head = struct.pack("=BBBBI", socket.AF_INET, 24, 0, 0, 2)
    bodies = [head + netlink.attribute(2, struct.pack("=IB", n, 0)) for n in range(1000)]
    shape = dataclasses.replace(node_shapes.KIND, more_addresses=bodies)
    assert len(with_warnings(shape)[1]) == interfaces._MAX_REPORTED


def test_a_route_of_another_family_is_no_default_route():
    """A kernel without IPv6 answers a dump of its routes with those of all families."""
    mpls = struct.pack("=BBBBBBBBI", 28, 0, 0, 0, 254, 0, 0, 1, 0) + netlink.attribute(
        4, bytes((9, 0, 0, 0))
    )
    assert interfaces.parse([], [], [mpls]).default_route == frozenset()


def test_a_link_local_address_is_no_global_one_whatever_its_scope():
    """That of a DNS cache on the node has scope global."""
    heads = [struct.pack("=BBBBI", socket.AF_INET, 32, 0, scope, 2) for scope in (0, 0, 253)]
    texts = ("169.254.20.10", "192.0.2.1", "192.0.2.2")
    bodies = [
        head + netlink.attribute(1, socket.inet_aton(text))
        for head, text in zip(heads, texts, strict=True)
    ]
    found = interfaces.parse([], bodies, [])
    assert found.addresses == {2: ("192.0.2.1",)}


def test_a_lower_device_of_index_0_is_none():
    """A tunnel that is bound to no device."""
    name = netlink.attribute(3, b"tun0\0")
    links = [
        interfaces._link(LINK_HEAD + name + netlink.attribute(5, struct.pack("=I", index)))
        for index in (0, 4)
    ]
    assert [link.lower for link in links] == [None, 4]


def test_a_subscription_that_fails_is_a_change_and_ends_the_reading():
    class Failing:
        left = 3

        def recv(self, _: int) -> bytes:
            self.left -= 1
            assert self.left
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    changes = interfaces.Changes()
    changes.close()
    changes._socket = Failing()
    assert changes.drain()


def test_a_name_that_is_not_utf_8_stays_the_same_bytes():
    link = interfaces._link(LINK_HEAD + netlink.attribute(3, b"p\xf6d0\0"))
    assert link.name.encode(errors="surrogateescape") == b"p\xf6d0"
