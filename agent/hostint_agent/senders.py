# SPDX-License-Identifier: Apache-2.0
"""Send reports of one length to one collector: a connected UDP socket, batches by UDP_SEGMENT, and how that goes."""

import ctypes
import errno
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from hostint_agent.node_rules import Destination

_LIBC = ctypes.CDLL(None, use_errno=True)
_SOL_UDP = 17
_UDP_SEGMENT = 103
_SO_SNDBUFFORCE = 32
_SEND_BUFFER_BYTES = 8 << 20
MAX_SEGMENTS = 64
_MAX_BATCH_BYTES = 65_000
# a collector is believed again when a report has gone without error this long after the last one: ICMP errors are rate-limited
_ERROR_MEMORY_S = 10.0
_NO_SEGMENTS = (errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.EMSGSIZE)


@dataclass(frozen=True, slots=True)
class Health:
    """What sending to one collector is like now."""

    reachable: bool
    reason: str
    message: str


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
        self, destination: Destination, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Connect. Raises OSError (no route)."""
        self.destination = destination
        family = socket.AF_INET6 if ":" in destination.address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._mark(family, destination.dscp << 2)
        try:
            self._socket.connect((destination.address, destination.port))
        except OSError:
            self._socket.close()
            raise
        self._segments = True
        control = struct.pack("=QiiHxxxxxx", 18, _SOL_UDP, _UDP_SEGMENT, 0)
        self._control = ctypes.create_string_buffer(control, 24)
        self._segment_bytes = ctypes.c_uint16.from_buffer(self._control, 16)
        self._header = _MessageHeader()
        self._clock = clock
        self._last_error: tuple[float, int] | None = None
        self._last_success = 0.0

    def _mark(self, family: int, tos: int) -> None:
        if family == socket.AF_INET:
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        else:
            self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self, iov: int, count: int, length: int) -> int:
        """Send `count` reports of `length` bytes each, from the iovec at address `iov`; how many of them failed."""
        most = min(MAX_SEGMENTS, _MAX_BATCH_BYTES // length) if self._segments else 1
        failed = sent = 0
        while sent < count:
            batch = min(most, count - sent)
            code = self._send_batch(iov + 16 * sent, batch, length)
            if code in _NO_SEGMENTS and batch > 1:
                # a route without segmentation offload (IPsec, for one): one by one from now on
                self._segments, most = False, 1
                continue
            if code:
                self._last_error = (self._clock(), code)
                failed += batch
            else:
                self._last_success = self._clock()
            sent += batch
        return failed

    def _send_batch(self, iov: int, count: int, length: int) -> int:
        """One sendmsg; 0 or an errno. An error that belongs to an earlier datagram is noted and the call made again."""
        header = self._header
        header.iov, header.iov_count = iov, count
        self._segment_bytes.value = length
        header.control = ctypes.addressof(self._control) if count > 1 else None
        header.control_bytes = 24 if count > 1 else 0
        for _ in range(3):
            if _LIBC.sendmsg(self._socket.fileno(), ctypes.byref(header), 0) >= 0:
                return 0
            code = ctypes.get_errno()
            if code == errno.EINTR:
                continue
            if code != errno.ECONNREFUSED:
                return code
            self._last_error = (self._clock(), code)
        return code

    def health(self) -> Health:
        """Reachable, unless there was an error and no report has gone well since."""
        where = f"{self.destination.address}:{self.destination.port}"
        # what came back for the last report, before there is another one that would meet it
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._last_error = (self._clock(), code)
        error = self._last_error
        if error is None or self._last_success - error[0] > _ERROR_MEMORY_S:
            return Health(True, "Sending", f"reports go to {where}")
        code = error[1]
        reason = "PortUnreachable" if code == errno.ECONNREFUSED else "SendFailed"
        words = os.strerror(code).lower()
        if code == errno.ECONNREFUSED:
            words = "port unreachable: nothing listens there"
        return Health(False, reason, f"{where}: {words}")
