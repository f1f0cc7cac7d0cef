# SPDX-License-Identifier: Apache-2.0
"""The inner packet of a report: whose flow it is, as far as the snapshot reaches. Pure; truncation is normal, never an error."""

import ipaddress
import struct
from dataclasses import dataclass

_VLAN = frozenset({0x8100, 0x88A8})
_IPV4, _IPV6 = 0x0800, 0x86DD
_ETHERNET_BYTES = 14
_EXTENSIONS = frozenset({0, 43, 44, 51, 60, 135})
_MAX_EXTENSIONS = 8
_FRAGMENT, _AUTH = 44, 51
_PORTED = frozenset({6, 17, 132})
_ICMP = frozenset({1, 58})
PROTOCOL_NAMES = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}


@dataclass(frozen=True, slots=True)
class InnerPacket:
    """What a snapshot tells; None where it does not reach or does not apply. `length` is that of the IP packet in bytes."""

    source_address: str | None = None
    destination_address: str | None = None
    protocol: int | None = None
    source_port: int | None = None
    destination_port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    ttl: int | None = None
    length: int | None = None
    truncated: bool = True

    @property
    def protocol_name(self) -> str:
        """Name of the protocol, or its number."""
        return PROTOCOL_NAMES.get(self.protocol or -1, str(self.protocol))


def parse(frame: bytes) -> InnerPacket:
    """Read an Ethernet frame that may end anywhere."""
    if len(frame) < _ETHERNET_BYTES:
        return InnerPacket()
    offset = _ETHERNET_BYTES
    kind = int.from_bytes(frame[12:14], "big")
    while kind in _VLAN and len(frame) >= offset + 4:
        kind = int.from_bytes(frame[offset + 2 : offset + 4], "big")
        offset += 4
    if kind == _IPV4:
        return _ipv4(frame[offset:])
    if kind == _IPV6:
        return _ipv6(frame[offset:])
    # A frame that ends inside of its tags has lost what follows them.
    return InnerPacket(truncated=kind in _VLAN)


def _ipv4(packet: bytes) -> InnerPacket:
    if len(packet) < 20:
        return InnerPacket()
    header_bytes = (packet[0] & 15) * 4
    length = int.from_bytes(packet[2:4], "big")
    is_first = not int.from_bytes(packet[6:8], "big") & 0x1FFF
    return InnerPacket(
        source_address=str(ipaddress.IPv4Address(packet[12:16])),
        destination_address=str(ipaddress.IPv4Address(packet[16:20])),
        protocol=packet[9],
        ttl=packet[8],
        length=length,
        truncated=len(packet) < length,
        **_transport(packet[9], packet[header_bytes:] if is_first else b""),
    )


def _ipv6(packet: bytes) -> InnerPacket:
    if len(packet) < 40:
        return InnerPacket()
    protocol, payload = _skip_extensions(packet[6], packet[40:])
    length = 40 + int.from_bytes(packet[4:6], "big")
    return InnerPacket(
        source_address=str(ipaddress.IPv6Address(packet[8:24])),
        destination_address=str(ipaddress.IPv6Address(packet[24:40])),
        protocol=protocol,
        ttl=packet[7],
        length=length,
        truncated=len(packet) < length,
        **_transport(protocol, payload),
    )


def _skip_extensions(protocol: int, payload: bytes) -> tuple[int, bytes]:
    """Follow extension headers; behind a later fragment there are no ports."""
    for _ in range(_MAX_EXTENSIONS):
        if protocol not in _EXTENSIONS or len(payload) < 8:
            break
        following = payload[0]
        if protocol == _FRAGMENT:
            offset = int.from_bytes(payload[2:4], "big") >> 3
            payload = b"" if offset else payload[8:]
        elif protocol == _AUTH:
            payload = payload[(payload[1] + 2) * 4 :]
        else:
            payload = payload[(payload[1] + 1) * 8 :]
        protocol = following
    return protocol, payload


def _transport(protocol: int, payload: bytes) -> dict[str, int]:
    if protocol in _PORTED and len(payload) >= 4:
        source, destination = struct.unpack_from("!HH", payload)
        return {"source_port": source, "destination_port": destination}
    if protocol in _ICMP and len(payload) >= 2:
        return {"icmp_type": payload[0], "icmp_code": payload[1]}
    return {}
