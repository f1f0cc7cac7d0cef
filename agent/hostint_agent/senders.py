# SPDX-License-Identifier: Apache-2.0
"""Send reports of one length to one collector: a connected UDP socket, batches by UDP_SEGMENT, and how that goes."""

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from hostint_agent.node_rules import Destination

# The interpreter's lock is kept during the call, which does not wait (MSG_DONTWAIT): letting it go would hand it to any other
# thread that is busy, which keeps it for 5 ms at a time, and that for every batch.
_SENDMSG = ctypes.PyDLL(None, use_errno=True).sendmsg
_SENDMSG.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_SENDMSG.restype = ctypes.c_ssize_t
_SOL_UDP = 17
_UDP_SEGMENT = 103
_SO_SNDBUFFORCE, _SO_COOKIE = 32, 57
_MSG_DONTWAIT = int(socket.MSG_DONTWAIT)
_IP_RECVERR, _IPV6_RECVERR = 11, 25
_CONTROL_BYTES = 24
_SEND_BUFFER_BYTES = 8 << 20
# what newer kernels take at once, what all take, and what is left where a route has no segmentation offload (IPsec, for one)
_BATCHES = (128, 64, 1)
_NO_SEGMENTS = frozenset((errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.EMSGSIZE))
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
# a collector is believed again when a report has gone without error this long after the last one: ICMP errors are rate-limited
_ERROR_MEMORY_S = 10.0

_REASONS = {
    errno.ECONNREFUSED: ("PortUnreachable", "port unreachable: nothing listens there"),
    errno.EHOSTUNREACH: ("HostUnreachable", "host unreachable: no answer from there"),
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

    @property
    def cookies(self) -> frozenset[int]:
        """Cookies of all sockets that are open now."""
        return self._cookies

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


class Sender:
    """A connected UDP socket to one collector."""

    def __init__(
        self,
        destination: Destination,
        clock: Callable[[], float] = time.monotonic,
        sockets: SendingSockets | None = None,
    ) -> None:
        """Connect, and announce the socket in `sockets`. Raises OSError (no route)."""
        self.destination = destination
        self._sockets = sockets or SendingSockets()
        family = socket.AF_INET6 if ":" in destination.address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._descriptor = self._socket.fileno()
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._mark(family, destination.dscp << 2)
        try:
            self._socket.connect((destination.address, destination.port))
            self._cookie = self._sockets.add(self._socket)
        except OSError:
            self._socket.close()
            raise
        self._most = list(_BATCHES)
        control = struct.pack("=QiiHxxxxxx", 18, _SOL_UDP, _UDP_SEGMENT, 0)
        self._control = ctypes.create_string_buffer(control, _CONTROL_BYTES)
        self._segment_bytes = ctypes.c_uint16.from_buffer(self._control, 16)
        self._header = _MessageHeader(control=ctypes.addressof(self._control))
        self._header_address = ctypes.addressof(self._header)
        self._room = select.poll()
        self._room.register(self._socket, select.POLLOUT)
        self._patient = True
        self._clock = clock
        self._last_error: tuple[float, int] | None = None
        self._last_success = 0.0

    def _mark(self, family: int, tos: int) -> None:
        """Set what every report carries, and ask to be told of reports that do not get out of this host."""
        if family == socket.AF_INET:
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
            self._socket.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        else:
            self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
            self._socket.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        self._descriptor = -1
        self._sockets.remove(self._cookie)

    def send(self, iov: int, count: int, length: int) -> int:
        """Send `count` reports of `length` bytes each, from the iovec at address `iov`; how many of them failed.

        A batch goes as a whole or not at all. Waits for room in the send buffer, but not long.
        """
        failed = sent = 0
        while sent < count:
            batch = min(self._most[0], count - sent)
            code = self._send_batch(iov + 16 * sent, batch, length)
            if code in _NO_SEGMENTS and batch > 1:
                # from now on
                del self._most[0]
                continue
            sent += batch
            if code:
                self._last_error = (self._clock(), code)
                failed += batch
        if failed < count:
            self._last_success = self._clock()
        return failed

    def _send_batch(self, iov: int, count: int, length: int) -> int:
        """One sendmsg; 0 or an errno."""
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
                self._last_error = (self._clock(), code)
            elif code != errno.EAGAIN or not self._wait_for_room():
                return code
        return code

    def _wait_for_room(self) -> bool:
        """Wait for the send buffer to empty; False if it stays full, and at once if it was full the last time."""
        if self._patient:
            self._take_errors()
            self._patient = any(
                event & select.POLLOUT for _, event in self._room.poll(_PATIENCE_MS)
            )
        return self._patient

    def _take_errors(self) -> None:
        """Empty the queue of what the network said: its errors are known by number, and poll would never wait again."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MOST_ERRORS):
                self._socket.recvmsg(0, 0, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)

    def health(self) -> Health:
        """Reachable, unless there was an error and no report has gone well since."""
        where = f"{self.destination.address}:{self.destination.port}"
        # what came back for the last report, before there is another one that would meet it
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._last_error = (self._clock(), code)
        self._take_errors()
        error = self._last_error
        if error is None or self._last_success - error[0] > _ERROR_MEMORY_S:
            return Health(True, "Sending", f"reports go to {where}")
        code = error[1]
        reason, words = _REASONS.get(code, ("SendFailed", os.strerror(code).lower()))
        return Health(False, reason, f"{where}: {words}")
