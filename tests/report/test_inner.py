# SPDX-License-Identifier: Apache-2.0
"""Whose flow the inner packet of a report is: behind tags, options and extension headers, and in fragments."""

import ipaddress
import struct

import pytest

from hostint_report import inner

SOURCE, DESTINATION = "10.0.0.1", "10.0.0.2"
SOURCE6, DESTINATION6 = "fd00::1", "fd00::2"
# What a payload begins with that is no header of ours: would be ports 257 and 257.
NO_PORTS = b"\1" * 32
PORTS = struct.pack("!HH", 40000, 443) + bytes(28)


def frame(kind: int, packet: bytes, *tags: int) -> bytes:
    tagged = b"".join(struct.pack("!HH", tag, 7) for tag in tags)
    return bytes(12) + tagged + struct.pack("!H", kind) + packet


def ipv4(payload: bytes, protocol: int = 6, options: bytes = b"", fragment: int = 0) -> bytes:
    length = 20 + len(options) + len(payload)
    head = struct.pack(
        "!BBHHHBBH", 0x45 + len(options) // 4, 0, length, 1, fragment, 63, protocol, 0
    )
    addresses = ipaddress.ip_address(SOURCE).packed + ipaddress.ip_address(DESTINATION).packed
    return head + addresses + options + payload


def ipv6(payload: bytes, following: int = 6) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(payload), following, 63)
    addresses = ipaddress.ip_address(SOURCE6).packed + ipaddress.ip_address(DESTINATION6).packed
    return head + addresses + payload


HOP_BY_HOP = struct.pack("!BB6x", 6, 0)
LONG_ROUTING = struct.pack("!BB22x", 6, 2)
AUTH = struct.pack("!BB22x", 6, 4)  # in words of four bytes, less two
FIRST, LATER = (struct.pack("!BBHI", 6, 0, offset << 3 | 1, 1) for offset in (0, 5))

WITH_PORTS = {
    "ipv4": frame(0x0800, ipv4(PORTS)),
    "vlan": frame(0x0800, ipv4(PORTS), 0x8100),
    "two vlans": frame(0x86DD, ipv6(PORTS), 0x88A8, 0x8100),
    "options": frame(0x0800, ipv4(PORTS, options=NO_PORTS[:8])),
    "first fragment": frame(0x0800, ipv4(PORTS, fragment=0x2000)),
    "ipv6": frame(0x86DD, ipv6(PORTS)),
    "hop by hop": frame(0x86DD, ipv6(HOP_BY_HOP + PORTS, 0)),
    "long routing header": frame(0x86DD, ipv6(LONG_ROUTING + PORTS, 43)),
    "authentication": frame(0x86DD, ipv6(AUTH + PORTS, 51)),
    "first fragment, ipv6": frame(0x86DD, ipv6(FIRST + PORTS, 44)),
}
WITHOUT_PORTS = {
    "later fragment": frame(0x0800, ipv4(NO_PORTS, fragment=0x2005)),
    "last fragment": frame(0x0800, ipv4(NO_PORTS, fragment=0x0005)),
    "later fragment, ipv6": frame(0x86DD, ipv6(LATER + NO_PORTS, 44)),
}


@pytest.mark.parametrize("name", WITH_PORTS)
def test_ports_are_found_behind_everything_before_them(name):
    found = inner.parse(WITH_PORTS[name])
    assert (found.source_port, found.destination_port) == (40000, 443)
    assert found.protocol == 6
    assert found.source_address in (SOURCE, SOURCE6)
    assert found.destination_address in (DESTINATION, DESTINATION6)
    assert found.ttl == 63
    assert not found.truncated


@pytest.mark.parametrize("name", WITHOUT_PORTS)
def test_later_fragment_has_a_flow_and_no_ports(name):
    found = inner.parse(WITHOUT_PORTS[name])
    assert (found.source_port, found.destination_port) == (None, None)
    assert found.protocol == 6
    assert found.source_address in (SOURCE, SOURCE6)


@pytest.mark.parametrize("name", WITH_PORTS | WITHOUT_PORTS)
def test_packet_cut_at_any_length_says_less_and_nothing_else(name):
    whole = (WITH_PORTS | WITHOUT_PORTS)[name]
    expected = inner.parse(whole)
    fields = ("source_address", "destination_address", "source_port", "destination_port", "length")
    for length in range(len(whole)):
        found = inner.parse(whole[:length])
        assert found.truncated
        for field in fields:
            assert getattr(found, field) in (None, getattr(expected, field)), (length, field)


def test_icmp_has_a_type_and_a_code():
    for kind, protocol, build in ((0x0800, 1, ipv4), (0x86DD, 58, ipv6)):
        found = inner.parse(frame(kind, build(b"\3\4" + bytes(6), protocol)))
        assert (found.icmp_type, found.icmp_code, found.source_port) == (3, 4, None)
