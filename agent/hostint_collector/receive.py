# SPDX-License-Identifier: Apache-2.0
"""The socket: receive datagrams in bursts, and tell what the kernel had to throw away."""

import contextlib
import select
import socket
import struct
from collections.abc import Iterator

_SO_RCVBUFFORCE = 33
_SO_RXQ_OVFL = 40
_RECEIVE_BUFFER_BYTES = 16 << 20
_MAX_DATAGRAM = 65535
_BURST = 256


def parse_endpoint(text: str) -> tuple[str, int]:
    """Read HOST:PORT or [IPV6]:PORT. Raises ValueError."""
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError(f"'{text}' is not HOST:PORT, such as 0.0.0.0:32766 or [::]:32766")
    return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104 (a collector listens everywhere)


class Receiver:
    """A UDP socket that counts its own losses."""

    def __init__(self, host: str, port: int) -> None:
        """Bind. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
        except PermissionError:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_RXQ_OVFL, 1)
        self.socket.bind((host, port))
        self.socket.setblocking(False)
        self.kernel_drops = 0

    @property
    def port(self) -> int:
        """The port that it is bound to."""
        return int(self.socket.getsockname()[1])

    def wait(self, timeout_s: float) -> bool:
        """Wait for a datagram; False at the time-out."""
        return bool(select.select([self.socket], [], [], timeout_s)[0])

    def burst(self) -> Iterator[tuple[bytes, str]]:
        """Datagrams that are there, with their senders' addresses; ends when none is left or the burst is full."""
        for _ in range(_BURST):
            try:
                data, control, _, sender = self.socket.recvmsg(_MAX_DATAGRAM, 32)
            except BlockingIOError:
                return
            for level, kind, value in control:
                if level == socket.SOL_SOCKET and kind == _SO_RXQ_OVFL:
                    self.kernel_drops = struct.unpack("=I", value)[0]
            # With an empty datagram an agent finds out whether its collector is back.
            if data:
                yield data, sender[0]

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()
