# SPDX-License-Identifier: Apache-2.0
"""rtnetlink over a plain socket: dumps, requests, attributes. What the messages mean is in rtnetlink(7) and linux/rtnetlink.h.

A library would be no less to trust and much more to carry: pyroute2 costs every agent 25 MB of memory and each look at the
interfaces more than 10 ms. What is needed of it are four dumps and three requests.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Self

RTM_NEWLINK, RTM_GETLINK = 16, 18
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWQDISC, RTM_GETQDISC = 36, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46

NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_EXCL, NLM_F_CREATE = 0x200, 0x400

_NLMSG_ERROR, _NLMSG_DONE, _NLMSG_OVERRUN = 2, 3, 4
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
# without the bits that say "nested" and "in network order"
_TYPE_MASK = 0x3FFF
# more than the kernel puts into one datagram of a dump
_BUFFER_BYTES = 1 << 17
_TIMEOUT_S = 5.0
# a dump that met a change is asked for again; each change also wakes whoever listens, so giving up loses nothing
_TRIES = 8


class NetlinkError(OSError):
    """What the kernel said cannot be understood; what was asked is in `filename`. A refusal is a plain OSError."""


class _Interrupted(Exception):
    """The tables changed during a dump: what came is no picture of any moment."""

    def __init__(self, bodies: list[bytes]) -> None:
        super().__init__()
        self.bodies = bodies


def attribute(kind: int, value: bytes) -> bytes:
    """An attribute as bytes, padded."""
    padding = bytes(-len(value) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + padding


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Attributes by type, from `offset` on. Raises NetlinkError when their lengths are impossible."""
    found = {}
    end = len(data)
    # fewer bytes than a header can only be padding
    while end - offset >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size or length > end - offset:
            raise NetlinkError(0, f"attribute {kind & _TYPE_MASK} of {length} bytes", "netlink")
        found[kind & _TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += length + 3 & ~3
    return found


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence number, body) of each message in a datagram. Raises NetlinkError."""
    offset = 0
    while offset < len(data):
        if len(data) - offset < _HEADER.size:
            raise NetlinkError(0, f"{len(data) - offset} bytes are no message", "netlink")
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or length > len(data) - offset:
            raise NetlinkError(0, f"message {kind} of {length} bytes", "netlink")
        yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
        offset += length + 3 & ~3


class Socket:
    """A connection to rtnetlink of this network namespace, for one thread."""

    def __init__(self) -> None:
        """Open it. Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.settimeout(_TIMEOUT_S)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self, kind: int, body: bytes, *, whole: bool = True) -> list[bytes]:
        """Return the bodies of all messages that answer a dump, taken while nothing changed.

        `whole` False: where changes do not end, return the last answer. What changed meanwhile may
        be missing in it. Raises OSError.
        """
        bodies: list[bytes] = []
        for attempt in range(_TRIES):
            self._send(kind, NLM_F_DUMP, body)
            try:
                return self._answers(f"dump {kind}")
            except _Interrupted as interrupted:
                bodies = interrupted.bodies
                time.sleep(0.001 * 2**attempt)
        if whole:
            raise NetlinkError(0, "tables changed during every dump", f"dump {kind}")
        return bodies

    def request(self, kind: int, flags: int, body: bytes, what: str) -> None:
        """Ask for a change and wait until it is done. Raises OSError, with `what` as its filename."""
        self._send(kind, flags | NLM_F_ACK, body)
        self._answers(what)

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        length = _HEADER.size + len(body)
        header = _HEADER.pack(length, kind, flags | NLM_F_REQUEST, self._sequence, 0)
        self._socket.sendto(header + body, (0, 0))

    def _receive(self, what: str) -> bytes:
        data, _, flags, _ = self._socket.recvmsg(_BUFFER_BYTES)
        if flags & socket.MSG_TRUNC:
            raise NetlinkError(0, f"answer of more than {_BUFFER_BYTES} bytes", what)
        return data

    def _answers(self, what: str) -> list[bytes]:
        """Everything up to the message that ends it."""
        bodies: list[bytes] = []
        interrupted = False
        while True:
            for kind, flags, sequence, body in messages(self._receive(what)):
                if sequence != self._sequence:
                    continue  # the rest of an answer that was given up
                interrupted |= bool(flags & NLM_F_DUMP_INTR)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    _raise_for(body, what)
                    if interrupted:
                        raise _Interrupted(bodies)
                    return bodies
                if kind == _NLMSG_OVERRUN:
                    raise NetlinkError(0, "data lost", what)
                bodies.append(body)


def _raise_for(body: bytes, what: str) -> None:
    """What an error message, and the end of a dump, begin with: 0, or a negative errno."""
    code = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
    if code:
        raise OSError(code, os.strerror(code), what)
