# SPDX-License-Identifier: Apache-2.0
"""Send reports of one length to one collector by UDP, in batches (UDP_SEGMENT).

The socket is not connected: a connected one keeps the source address and the translation of a
cgroup program (a Service of Cilium) that it began with, and fails once these are gone, or sends
from an address that is gone (IPv6). Without connect(2) the kernel chooses both for every system call,
which is one for 64 or 128 reports, and IP_RECVERR returns ICMP errors all the same.
"""

import contextlib
import ctypes
import errno
import ipaddress
import math
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hostint_agent.node_rules import Destination

# The interpreter's lock is kept during the call, which does not wait (MSG_DONTWAIT): letting it go would hand it to any other
# thread that is busy, which keeps it for 5 ms at a time, and that for every batch.
_SENDMSG = ctypes.PyDLL(None, use_errno=True).sendmsg
_SENDMSG.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_SENDMSG.restype = ctypes.c_ssize_t
_SOL_UDP = 17
_UDP_SEGMENT = 103
_SO_ATTACH_FILTER, _SO_SNDBUFFORCE, _SO_COOKIE = 26, 32, 57
# struct sock_filter: BPF_RET | BPF_K with 0, which accepts nothing
_ACCEPT_NOTHING = struct.pack("=HBBI", 6, 0, 0, 0)
_MSG_DONTWAIT = int(socket.MSG_DONTWAIT)
_IP_RECVERR, _IPV6_RECVERR = 11, 25
# linux/in6.h, RFC 5014
_IPV6_ADDR_PREFERENCES, _IPV6_PREFER_SRC_PUBLIC = 72, 2
_CONTROL_BYTES = 24
_SEND_BUFFER_BYTES = 8 << 20
# What newer kernels take at once, what all take, and what is left without segmentation: a route may
# have none (IPsec).
_BATCHES = (128, 64, 1)
# UDP_SEGMENT is refused with one of these (udp_send_skb), and so are datagrams for other reasons.
_NO_SEGMENTS = frozenset((errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.EMSGSIZE))
# Routes change: larger batches are tried again after this long.
_SEGMENTS_AGAIN_S = 60.0
# what the network said to an earlier datagram: the kernel says it at the next call, which then sends nothing
_OF_EARLIER = frozenset(
    (
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENOPROTOOPT,
        errno.EPROTO,
        errno.ENONET,
        errno.EACCES,
    )
)
_TRIES = 3
# more than a receive buffer holds
_MOST_ERRORS = 256
# a full send buffer is waited for this long, and then not again before a report has gone
_PATIENCE_MS = 50
# A report proves that its collector is reachable if it goes this long after the last error, because
# ICMP errors are rate-limited,
_ERROR_MEMORY_S = 10.0
# and if no error follows for this long: a neighbour is asked three times, a second apart.
_ANSWER_S = 4.0
# Without reports an unreachable collector is sent an empty datagram this often.
_RECHECK_S = 10.0

_REASONS = {
    errno.ECONNREFUSED: ("PortUnreachable", "port unreachable: nothing listens there"),
    errno.EHOSTUNREACH: ("HostUnreachable", "host unreachable: no answer from there"),
    errno.ENETUNREACH: ("NoRoute", "network unreachable: there is no route"),
    errno.EADDRNOTAVAIL: ("NoRoute", "no address of this node is usable as source"),
    errno.EPERM: ("Filtered", "a firewall of this node drops reports"),
    errno.EACCES: ("Prohibited", "a route or router prohibits it"),
    errno.EAGAIN: ("SendBufferFull", "send buffer full: the network takes reports too slowly"),
    errno.ENOBUFS: ("QueueFull", "device queue full: the network takes reports too slowly"),
}


@dataclass(frozen=True, slots=True)
class Health:
    """What sending to one collector is like now."""

    reachable: bool
    reason: str
    message: str


class SendingSockets:
    """The open sockets of this process that send reports, known by their cookies (SO_COOKIE).

    One instance serves all exporters of a process. Safe to use from any thread.
    """

    def __init__(self, on_sockets: Callable[[frozenset[int]], None] = lambda _: None) -> None:
        """Start without any socket.

        `on_sockets` is called with the cookies of all open sockets: before the first report leaves
        a new socket, and after a socket is closed. An OSError that it raises for a new socket
        closes that socket, and reports to its collector fail until a retry succeeds.
        """
        self._on_sockets = on_sockets
        self._lock = threading.Lock()
        self._cookies: frozenset[int] = frozenset()

    def add(self, opened: socket.socket) -> int:
        """Announce a socket that has sent nothing, and return its cookie. Raises OSError."""
        cookie = _cookie(opened)
        with self._lock:
            self._on_sockets(self._cookies | {cookie})
            self._cookies |= {cookie}
        return cookie

    def remove(self, cookie: int) -> None:
        """Announce that the socket with this cookie is closed."""
        with self._lock:
            self._cookies -= {cookie}
            # A cookie is never used again, so one that stays behind in a map is harmless.
            with contextlib.suppress(OSError):
                self._on_sockets(self._cookies)


def _cookie(opened: socket.socket) -> int:
    """Return the number by which the kernel knows a socket; unique since boot."""
    return int.from_bytes(opened.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


class _MessageHeader(ctypes.Structure):
    """struct msghdr of the C library."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_bytes", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_bytes", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Outcomes:
    """What became of datagrams to one collector, and whether it counts as reachable."""

    def __init__(self) -> None:
        self.last_attempt = -math.inf
        # errno of the last error; 0: there was none, or it is over
        self._code = 0
        self._failed_at = -math.inf
        # when the first datagram went that shows that the error is over
        self._proof_at = math.inf

    def failed(self, code: int, now: float) -> None:
        """Note an error, of this datagram or of an earlier one."""
        self._code, self._failed_at, self._proof_at = code, now, math.inf

    def succeeded(self, now: float) -> None:
        """Note a datagram that went without error."""
        if self._code and now - self._failed_at >= _ERROR_MEMORY_S:
            self._proof_at = min(self._proof_at, now)

    def error(self, now: float) -> int:
        """Return the errno that makes the collector unreachable; 0 if it is reachable."""
        if now - self._proof_at >= _ANSWER_S:
            self._code, self._proof_at = 0, math.inf
        return self._code


def _socket_address(address: str, port: int) -> tuple[socket.AddressFamily, Any, bytes]:
    """Return the family, the address for Python and struct sockaddr_in or sockaddr_in6."""
    mapped = getattr(ipaddress.ip_address(address), "ipv4_mapped", None)
    # A mapped address is sent to by IPv4, and takes that family's options only.
    found = socket.getaddrinfo(str(mapped or address), port, flags=socket.AI_NUMERICHOST)[0]
    family, to = found[0], found[4]
    start = struct.pack("=H", family) + struct.pack("!H", port)
    if len(to) == 2:
        return family, to, start + socket.inet_pton(family, str(to[0])) + bytes(8)
    host, flow, scope = to[0].partition("%")[0], to[2], to[3]
    number = socket.inet_pton(family, host)
    return family, to, start + struct.pack("!I", flow) + number + struct.pack("=I", scope)


class Sender:
    """A UDP socket for the reports of one collector."""

    def __init__(
        self,
        destination: Destination,
        clock: Callable[[], float] = time.monotonic,
        sockets: SendingSockets | None = None,
    ) -> None:
        """Open a socket, and announce it in `sockets`. Raises OSError."""
        self.destination = destination
        self._sockets = sockets or SendingSockets()
        family, self._to, name = _socket_address(destination.address, destination.port)
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._descriptor = self._socket.fileno()
        try:
            self._set_options(family, destination.dscp << 2)
            self._cookie = self._sockets.add(self._socket)
        except OSError:
            self._socket.close()
            raise
        # the smallest batch that was refused is larger than _BATCHES[_level], until _level_ends
        self._level, self._level_ends = 0, -math.inf
        self._name = ctypes.create_string_buffer(name, len(name))
        control = struct.pack("=QiiHxxxxxx", 18, _SOL_UDP, _UDP_SEGMENT, 0)
        self._control = ctypes.create_string_buffer(control, _CONTROL_BYTES)
        self._segment_bytes = ctypes.c_uint16.from_buffer(self._control, 16)
        self._header = _MessageHeader(
            name=ctypes.addressof(self._name),
            name_bytes=len(name),
            control=ctypes.addressof(self._control),
        )
        self._header_address = ctypes.addressof(self._header)
        self._room = select.poll()
        self._room.register(self._socket, select.POLLOUT)
        self._patient = True
        self._clock = clock
        self._outcomes = _Outcomes()

    def _set_options(self, family: socket.AddressFamily, tos: int) -> None:
        """Set what every report carries, and ask for errors of reports that do not arrive."""
        ours = self._socket
        try:
            ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
        except PermissionError:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        # Nothing is read from this socket, so nothing that anybody sends to it may take memory.
        program = ctypes.create_string_buffer(_ACCEPT_NOTHING, len(_ACCEPT_NOTHING))
        ours.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(program))
        )
        if family == socket.AF_INET:
            ours.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
            ours.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        else:
            ours.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
            ours.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
            # A collector knows a node by its address, and temporary ones change every day.
            ours.setsockopt(socket.IPPROTO_IPV6, _IPV6_ADDR_PREFERENCES, _IPV6_PREFER_SRC_PUBLIC)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        self._descriptor = -1
        self._sockets.remove(self._cookie)

    def send(self, iov: int, count: int, length: int) -> int:
        """Send `count` reports of `length` bytes, from the iovec at `iov`; return how many failed.

        A batch goes as a whole or not at all. Waits for room in the send buffer, but not long.
        """
        failed = sent = 0
        level = self._first_level()
        may_be_segments = True
        while sent < count:
            batch = min(_BATCHES[level], count - sent)
            code = self._send_batch(iov + 16 * sent, batch, length)
            if batch > 1 and may_be_segments and code in _NO_SEGMENTS:
                level = next(i for i, size in enumerate(_BATCHES) if size < batch)
                continue
            sent += batch
            if code:
                self._outcomes.failed(code, self._clock())
                failed += batch
                # A single report has no segments: smaller batches would fail as well.
                if code in _NO_SEGMENTS:
                    may_be_segments, level = False, 0
            elif level != self._first_level():
                self._level, self._level_ends = level, self._clock() + _SEGMENTS_AGAIN_S
        now = self._outcomes.last_attempt = self._clock()
        if failed < count:
            self._outcomes.succeeded(now)
        return failed

    def _first_level(self) -> int:
        """Return the index of the batch size to begin with."""
        return self._level if self._level and self._clock() < self._level_ends else 0

    def _send_batch(self, iov: int, count: int, length: int) -> int:
        """Make one system call, again after errors of earlier reports; return 0 or an errno."""
        header = self._header
        header.iov, header.iov_count = iov, count
        self._segment_bytes.value = length
        header.control_bytes = _CONTROL_BYTES if count > 1 else 0
        code = 0
        for _ in range(_TRIES):
            if _SENDMSG(self._descriptor, self._header_address, _MSG_DONTWAIT) >= 0:
                self._patient = True
                return 0
            code = ctypes.get_errno()
            if code in _OF_EARLIER:
                self._outcomes.failed(code, self._clock())
            elif code != errno.EAGAIN or not self._wait_for_room():
                return code
        return code

    def _wait_for_room(self) -> bool:
        """Wait for the send buffer to empty; return False if it stays full.

        Returns False at once if it stayed full the last time.
        """
        if self._patient:
            self._take_errors()
            self._patient = any(
                event & select.POLLOUT for _, event in self._room.poll(_PATIENCE_MS)
            )
        return self._patient

    def _take_errors(self) -> None:
        """Empty the queue of errors: they are known by number, and poll would never wait again."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MOST_ERRORS):
                self._socket.recvmsg(0, 0, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)

    def recheck(self) -> None:
        """Send an empty datagram to an unreachable collector that got no report lately.

        Without it an error would stand until there is a report, though the collector is back.
        """
        now = self._clock()
        if not self._error() or now - self._outcomes.last_attempt < _RECHECK_S:
            return
        self._outcomes.last_attempt = now
        # An error may be that of an earlier datagram.
        for _ in range(_TRIES):
            try:
                self._socket.sendto(b"", _MSG_DONTWAIT, self._to)
            except OSError as error:
                self._outcomes.failed(error.errno or errno.EIO, now)
            else:
                self._outcomes.succeeded(now)
                break

    def _error(self) -> int:
        """Return the errno that makes the collector unreachable, or 0."""
        # what came back for the last report, before there is another one that would meet it
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._outcomes.failed(code, self._clock())
        self._take_errors()
        return self._outcomes.error(self._clock())

    def health(self) -> Health:
        """Return whether the collector is reachable, as far as reports have shown."""
        where = f"{self.destination.address}:{self.destination.port}"
        code = self._error()
        if not code:
            return Health(True, "Sending", f"reports go to {where}")
        reason, words = _REASONS.get(code, ("SendFailed", os.strerror(code).lower()))
        return Health(False, reason, f"{where}: {words}")
