# SPDX-License-Identifier: Apache-2.0
"""A bridge with a tap on either side: frames that we write on one come out of the other, as real packets on the way."""

import contextlib
import fcntl
import os
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tests.lab.namespace import Namespace, ip

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TAP, _NO_PI, _VNET_HEADER = 0x2, 0x1000, 0x4000
# checksums, and TCP segmentation of IPv4 and IPv6, are left to whoever reads
_OFFLOADS = 0x1 | 0x2 | 0x4
# struct virtio_net_hdr: flags, gso type, bytes of headers, gso size, where the checksum begins and is
_HEADER = struct.Struct("=BBHHHH")
_NEEDS_CHECKSUM, _TCP4, _TCP6 = 1, 1, 4
_TCP_CHECKSUM_AT = 16
MTU = 65000
INSIDE, OUTSIDE = "in0", "out0"


def header(linear_bytes: int = 0) -> bytes:
    """Of an ordinary frame; a frame above a page has so many bytes in its linear part, all if 0."""
    return _HEADER.pack(0, 0, linear_bytes, 0, 0, 0)


def tcp_header(version: int, segment_bytes: int, transport_at: int) -> bytes:
    """Of a large TCP packet that is yet to be cut into segments."""
    kind, header_bytes = (_TCP4 if version == 4 else _TCP6), transport_at + 20
    return _HEADER.pack(
        _NEEDS_CHECKSUM, kind, header_bytes, segment_bytes, transport_at, _TCP_CHECKSUM_AT
    )


@dataclass
class Taps:
    """Both ends of the bridge."""

    namespace: Namespace
    inside: int
    outside: int

    def _is_readable(self, timeout_ms: int) -> bool:
        waiting = select.poll()
        waiting.register(self.outside, select.POLLIN)
        return bool(waiting.poll(timeout_ms))

    def through(self, frame: bytes, how: bytes) -> tuple[bytes, bytes]:
        """Write a frame, read what comes out: (its header, frame). Raises TimeoutError."""
        os.write(self.inside, how + frame)
        if not self._is_readable(10_000):
            raise TimeoutError(f"nothing came out for {frame[:200].hex()}")
        data = os.read(self.outside, 70_000)
        return data[: _HEADER.size], data[_HEADER.size :]

    @property
    def is_empty(self) -> bool:
        """Whether nothing more came out."""
        return not self._is_readable(0)


def _tap(name: str) -> int:
    handle = os.open("/dev/net/tun", os.O_RDWR)
    flags = _TAP | _NO_PI | _VNET_HEADER
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(handle, _TUNSETOFFLOAD, _OFFLOADS)
    return handle


@contextlib.contextmanager
def taps(name: str) -> Iterator[Taps]:
    """Build them in a namespace of this name; no packet is there but ours."""
    ip(f"netns add {name}")
    namespace = Namespace(name)
    ends: list[int] = []
    try:
        quiet = ("all", "default")
        namespace.run("sysctl", "-qw", *(f"net.ipv6.conf.{n}.disable_ipv6=1" for n in quiet))
        # where the module is loaded, bridges ask the firewall, which drops what is no right packet
        for family in ("iptables", "ip6tables", "arptables"):
            namespace.run("sysctl", "-qw", f"net.bridge.bridge-nf-call-{family}=0", check=False)
        ends += [namespace.inside(lambda: _tap(INSIDE)), namespace.inside(lambda: _tap(OUTSIDE))]
        ip(
            f"-n {name} link add br0 type bridge mcast_snooping 0",
            *(f"-n {name} link set {tap} mtu {MTU} master br0 up" for tap in (INSIDE, OUTSIDE)),
            f"-n {name} link set br0 mtu {MTU} up",
        )
        yield Taps(namespace, *ends)
    finally:
        for end in ends:
            os.close(end)
        ip(f"netns del {name}")
