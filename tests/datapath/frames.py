# SPDX-License-Identifier: Apache-2.0
"""Frames to throw at the programs: right ones of every kind, and what becomes of them when they are cut, flipped and spliced."""

import random
import struct
from collections.abc import Iterator, Sequence

MACS = bytes.fromhex("020000000001020000000002")
TCP, UDP, SCTP, ICMP, ICMPV6, GRE, IPIP = 6, 17, 132, 1, 58, 47, 4
ODD = (2, 4, 41, 47, 50, 89, 103, 112, 136, 253, 255)
HOP_BY_HOP, ROUTING, FRAGMENT, AUTH, OPTIONS, MOBILITY = 0, 43, 44, 51, 60, 135
EXTENSIONS = (HOP_BY_HOP, ROUTING, FRAGMENT, AUTH, OPTIONS, MOBILITY)
NO_NEXT_HEADER = 59
C_TAG, S_TAG = 0x8100, 0x88A8
OTHER_TYPES = (0x0806, 0x8847, 0x88CC, 0x88F7, 0x8863, 0x0027, 0x05DC, 0x9100, 0x0801, 0xFFFF)
PORTS = (0, 53, 80, 443, 1023, 1024, 5060, 8080, 40000, 65535)
VXLAN_PORT = 4789


def ethernet(packet: bytes, kind: int | None = None, tags: Sequence[int] = ()) -> bytes:
    """A frame; its type follows from the IP version unless given."""
    if kind is None:
        kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    types = [*tags, kind]
    head = MACS + struct.pack("!H", types[0])
    return (
        head + b"".join(struct.pack("!HH", 0x2007, following) for following in types[1:]) + packet
    )


def checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(
    source: bytes,
    destination: bytes,
    protocol: int,
    payload: bytes,
    *,
    options: bytes = b"",
    fragment: int = 0,
) -> bytes:
    """An IPv4 packet; `fragment` is the word of flags and offset."""
    words = 5 + len(options) // 4
    length = 4 * words + len(payload)
    head = struct.pack("!BBHHHBBH", 0x40 | words, 0, length, 7, fragment, 64, protocol, 0)
    head += source + destination + options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def ipv6(source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    """An IPv6 packet; `protocol` is that of the first header in `payload`."""
    head = struct.pack("!IHBB", 0x60012345, len(payload) & 0xFFFF, protocol, 64)
    return head + source + destination + payload


def extensions(kinds: Sequence[int], protocol: int, *, words: int = 0, fragment: int = 0) -> bytes:
    """A chain of extension headers before `protocol`, each of `words` times 8 bytes more than it must have."""
    text = b""
    for kind, following in zip(kinds, [*kinds, protocol][1:], strict=True):
        if kind == FRAGMENT:
            text += struct.pack("!BBHI", following, 0, fragment, 99)
        elif kind == AUTH:
            text += struct.pack("!BB10x", following, 1 + 2 * words) + bytes(8 * words)
        else:
            text += struct.pack("!BB6x", following, words) + bytes(8 * words)
    return text


def transport(protocol: int, sport: int, dport: int, size: int = 8) -> bytes:
    """A transport header and `size` bytes of content."""
    content = bytes(range(256)) * (size // 256 + 1)
    content = content[:size]
    if protocol == TCP:
        return struct.pack("!HHIIBBHHH", sport, dport, 1, 2, 0x50, 0x10, 8192, 0, 0) + content
    if protocol == UDP:
        return struct.pack("!HHHH", sport, dport, (8 + size) & 0xFFFF, 0) + content
    if protocol == SCTP:
        return struct.pack("!HHII", sport, dport, 3, 0) + content
    if protocol == ICMP:
        return struct.pack("!BBHHH", 8, 0, 0, 1, 1) + content
    if protocol == ICMPV6:
        return struct.pack("!BBHHH", 128, 0, 0, 1, 1) + content
    return content


class Mill:
    """Frames without end, the same for the same seed."""

    def __init__(self, seed: int, kinds: int = 3000) -> None:
        self.random = random.Random(seed)
        self.whole = [self._whole() for _ in range(kinds)]
        self._makers = (
            *[self._as_it_is] * 4,
            *[self._cut] * 5,
            *[self._flipped] * 6,
            *[self._flipped_and_cut] * 2,
            *[self._spliced] * 2,
            self._noise,
            self._noise_of_a_type,
            self._padded,
        )

    def frames(self, count: int) -> Iterator[bytes]:
        """`count` frames: every length of a frame of every sort first, then at random."""
        left = count
        for frame in self._every_length():
            if not left:
                return
            left -= 1
            yield frame
        choose, makers = self.random.choice, self._makers
        for _ in range(left):
            yield choose(makers)()

    def _address(self, version: int) -> bytes:
        pick = self.random
        if version == 4:
            return bytes((10, pick.choice((0, 0, 1, 9)), pick.randrange(2), pick.randrange(1, 9)))
        net = pick.choice(("fd00", "fd00", "fd01", "2001"))
        return bytes.fromhex(net) + bytes(12) + bytes((pick.randrange(2), pick.randrange(1, 9)))

    def _inner(self) -> tuple[int, bytes]:
        """A protocol and what it carries, which may be another frame or packet."""
        pick = self.random
        protocol = pick.choice((TCP, TCP, TCP, UDP, UDP, SCTP, ICMP, ICMPV6, pick.choice(ODD)))
        size = pick.choice((0, 1, 8, 33, 64, 200, 512, 1300))
        return protocol, transport(protocol, pick.choice(PORTS), pick.choice(PORTS), size)

    def _packet4(self, protocol: int, payload: bytes) -> bytes:
        pick = self.random
        return ipv4(
            self._address(4),
            self._address(4),
            protocol,
            payload,
            options=bytes([1]) * pick.choice((0, 0, 0, 4, 12, 40)),
            # none, don't fragment, the first, the last, later ones: every bit of the offset by itself
            fragment=pick.choice(
                (0, 0, 0, 0x4000, 0x2000, 0x00B9, 0x2000 | 1 << pick.randrange(13))
            ),
        )

    def _packet6(self, protocol: int, payload: bytes) -> bytes:
        pick = self.random
        chain = pick.choices(EXTENSIONS, k=pick.choice((0, 0, 0, 1, 1, 2, 3, 5, 6, 7, 8)))
        fragment = pick.choice((0, 1, 1, 185 << 3, 1 | 8 << pick.randrange(13)))
        words = pick.choice((0, 0, 0, 1, 3, 20))
        text = extensions(chain, protocol, words=words, fragment=fragment) + payload
        first = chain[0] if chain else protocol
        return ipv6(self._address(6), self._address(6), first, text)

    def _packet(self) -> bytes:
        make = self.random.choice((self._packet4, self._packet6))
        return make(*self._inner())

    def _nested(self) -> bytes:
        """A packet in a packet: IPIP and its like, GRE, vxlan."""
        pick, inner = self.random, self._packet()
        shape = pick.randrange(3)
        if shape == 0:
            payload, protocol = inner, IPIP if inner[0] >> 4 == 4 else 41
        elif shape == 1:
            payload = struct.pack("!HH", 0, 0x0800 if inner[0] >> 4 == 4 else 0x86DD) + inner
            protocol = GRE
        else:
            vxlan = struct.pack("!II", 1 << 27, 7 << 8) + ethernet(inner)
            payload = transport(UDP, 40000, VXLAN_PORT, 0) + vxlan
            protocol = UDP
        return pick.choice((self._packet4, self._packet6))(protocol, payload)

    def _whole(self) -> bytes:
        pick = self.random
        packet = self._nested() if pick.random() < 0.15 else self._packet()
        if pick.random() < 0.05:
            return ethernet(packet, pick.choice(OTHER_TYPES))
        tags = pick.choice(
            ((), (), (), (), (), (C_TAG,), (S_TAG,), (S_TAG, C_TAG), (C_TAG, C_TAG), (C_TAG,) * 3)
        )
        return ethernet(packet, tags=tags)

    def _every_length(self) -> Iterator[bytes]:
        for frame in self.whole[:150]:
            for length in range(14, min(len(frame), 400) + 1):
                yield frame[:length]
        longest = max(self.whole[:200], key=len)
        for length in (*range(14, 1501), *range(1501, 3713, 7), 3712):
            yield longest[:length].ljust(length, b"\x5a")

    def _as_it_is(self) -> bytes:
        return self.random.choice(self.whole)

    def _cut(self) -> bytes:
        frame = self.random.choice(self.whole)
        return frame[: 14 + int(self.random.random() * min(len(frame) - 13, 200))]

    def _flipped(self) -> bytes:
        """Some bits of the headers are others."""
        pick = self.random
        frame = bytearray(pick.choice(self.whole))
        span = min(len(frame), 110) - 12
        for _ in range(1 + int(pick.random() * 6)):
            frame[12 + int(pick.random() * span)] ^= 1 << int(pick.random() * 8)
        return bytes(frame)

    def _flipped_and_cut(self) -> bytes:
        frame = self._flipped()
        return frame[: 14 + int(self.random.random() * min(len(frame) - 13, 200))]

    def _spliced(self) -> bytes:
        """The beginning of one and the end of another."""
        pick = self.random
        one, other = pick.choice(self.whole), pick.choice(self.whole)
        at = 14 + int(pick.random() * 80)
        return one[:at].ljust(14, b"\0") + other[at:]

    def _noise(self) -> bytes:
        pick = self.random
        return pick.randbytes(14 + int(pick.random() ** 3 * 1500))

    def _noise_of_a_type(self) -> bytes:
        pick = self.random
        types = b"\x08\x00", b"\x86\xdd", b"\x81\x00\x00\x01\x08\x00", b"\x88\xa8\x00\x01\x86\xdd"
        first = pick.choice(b"\x45\x46\x4f\x40\x60\x61\x6f\x00")
        noise = pick.randbytes(int(pick.random() ** 2 * 400))
        return MACS + pick.choice(types) + bytes([first]) + noise

    def _padded(self) -> bytes:
        """Longer than its headers say, by up to as much as there may be."""
        frame = self.random.choice(self.whole)
        return frame.ljust(min(3712, len(frame) + int(self.random.random() ** 4 * 3000)), b"\0")
