# SPDX-License-Identifier: Apache-2.0
"""IP packets byte by byte, for what no socket would send, and a way to put them on a pod's wire."""

import ipaddress
import socket
import struct

from tests.lab.namespace import Namespace

UDP, TCP = 17, 6
MORE_FRAGMENTS = 0x2000
_FRAGMENT_HEADER = 44


def checksum(data: bytes) -> int:
    """RFC 1071."""
    padded = data + bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packet(
    source: str,
    destination: str,
    protocol: int,
    payload: bytes,
    *,
    fragment: int | None = None,
    wrong_checksum: bool = False,
) -> bytes:
    """An IPv4 or IPv6 packet, as the addresses say; `fragment` is IPv4's word of flags and offset, for both."""
    ends = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    if ":" in source:
        if fragment is not None:
            more, offset = bool(fragment & MORE_FRAGMENTS), fragment & 0x1FFF
            payload = struct.pack("!BBHI", protocol, 0, offset << 3 | more, 7) + payload
            protocol = _FRAGMENT_HEADER
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + ends + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 7, fragment or 0, 64, protocol, 0)
    value = checksum(head + ends) ^ (0x1111 if wrong_checksum else 0)
    return head[:10] + struct.pack("!H", value) + ends + payload


def _pseudo_header(source: str, destination: str, protocol: int, payload_bytes: int) -> bytes:
    ends = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    return ends + struct.pack("!II", payload_bytes, protocol)


def udp(
    source: str, destination: str, ports: tuple[int, int], data: bytes, *, wrong: bool = False
) -> bytes:
    """A UDP datagram with its checksum, or with a wrong one."""
    length = 8 + len(data)
    head = struct.pack("!HHH", *ports, length)
    pseudo = _pseudo_header(source, destination, UDP, length)
    value = checksum(pseudo + head + bytes(2) + data) or 0xFFFF
    return head + struct.pack("!H", value ^ (0x1111 if wrong else 0)) + data


def tcp_ack(source: str, destination: str, ports: tuple[int, int], sequence: int) -> bytes:
    """An acknowledgement of a connection that nobody has."""
    head = struct.pack("!HHIIBBH", *ports, sequence, 1, 5 << 4, 0x10, 1024)
    pseudo = _pseudo_header(source, destination, TCP, 20)
    return head + struct.pack("!HH", checksum(pseudo + head + bytes(4)), 0)


def mac(namespace: Namespace, interface: str) -> str:
    """MAC address of an interface."""
    shown = namespace.run("ip", "-o", "link", "show", "dev", interface)
    return shown.split("link/ether ")[1].split()[0]


def frame(source_mac: str, destination_mac: str, content: bytes) -> bytes:
    """An Ethernet frame around an IP packet."""
    macs = bytes.fromhex((destination_mac + source_mac).replace(":", ""))
    return macs + (b"\x08\x00" if content[0] >> 4 == 4 else b"\x86\xdd") + content


def put_on_wire(namespace: Namespace, interface: str, frames: list[bytes]) -> None:
    """Send frames as they are."""
    with namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((interface, 0))
        for each in frames:
            sender.send(each)
