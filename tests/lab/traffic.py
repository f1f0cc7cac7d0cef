# SPDX-License-Identifier: Apache-2.0
"""Packets with known content between namespaces, and what interfaces saw of them, with the kernel's timestamps."""

import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.lab.namespace import Namespace

_SO_TIMESTAMPNS = 35
_ETH_P_ALL = 3
PAYLOAD_TAG = b"hostint-lab"


def family_of(address: str) -> int:
    """Socket family of an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def payload(number: int, size: int = 64) -> bytes:
    """A datagram's content: recognisable, numbered."""
    return (PAYLOAD_TAG + struct.pack("!I", number)).ljust(size, b".")


def send_udp(
    source: Namespace,
    address: str,
    port: int,
    *,
    count: int = 1,
    source_port: int = 0,
    ttl: int | None = None,
    pause_s: float = 0.0,
) -> int:
    """Send numbered datagrams; the source port they came from."""
    family = family_of(address)
    with source.socket(family, socket.SOCK_DGRAM) as sender:
        sender.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", source_port))
        if ttl is not None and family == socket.AF_INET:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        elif ttl is not None:
            sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
        for number in range(count):
            sender.sendto(payload(number), (address, port))
            if pause_s:
                time.sleep(pause_s)
        return int(sender.getsockname()[1])


@contextmanager
def udp_sink(namespace: Namespace, address: str, port: int) -> Iterator[socket.socket]:
    """A socket that takes datagrams, so that they are delivered and not refused."""
    sink = namespace.socket(family_of(address), socket.SOCK_DGRAM)
    try:
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sink.bind((address, port))
        yield sink
    finally:
        sink.close()


@contextmanager
def tcp_echo(namespace: Namespace, address: str, port: int) -> Iterator[None]:
    """A TCP server that sends back what it gets."""
    server = namespace.socket(family_of(address), socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, port))
    server.listen()
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            if not select.select([server], [], [], 0.1)[0]:
                continue
            connection, _ = server.accept()
            with connection:
                connection.settimeout(5)
                while data := connection.recv(65536):
                    connection.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        server.close()


def tcp_exchange(source: Namespace, address: str, port: int, data: bytes = b"hello") -> int:
    """Send something to an echo server and wait for it to come back; the source port."""
    with source.socket(family_of(address), socket.SOCK_STREAM) as client:
        client.settimeout(5)
        client.connect((address, port))
        client.sendall(data)
        received = b""
        while len(received) < len(data):
            received += client.recv(65536)
        return int(client.getsockname()[1])


def ping(source: Namespace, address: str, count: int = 1) -> bool:
    """True if every echo request was answered."""
    command = ["ping", "-n", "-q", "-i", "0.05", "-W", "2", "-c", str(count), address]
    return ", 0% packet loss" in source.run(*command, check=False)


@dataclass(frozen=True)
class Seen:
    """A packet of ours on an interface: its number, and when the kernel took its timestamp (wall clock)."""

    number: int
    wall_ns: int


class Capture:
    """Takes timestamps of numbered datagrams on one interface, by a packet socket."""

    def __init__(self, namespace: Namespace, interface: str, tag: bytes = PAYLOAD_TAG) -> None:
        self._tag = tag
        self._socket = namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._socket.bind((interface, 0))
        self._socket.setblocking(False)

    def close(self) -> None:
        """Stop capturing."""
        self._socket.close()

    def frame(self, timeout_s: float = 5.0) -> bytes:
        """The first frame captured that has the tag in it. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                frame = self._socket.recv(2048)
            except BlockingIOError:
                time.sleep(0.02)
            else:
                if self._tag in frame:
                    return frame
        raise TimeoutError(f"no frame with {self._tag!r} within {timeout_s} s")

    def seen(self) -> dict[int, int]:
        """Wall-clock nanoseconds by number, of all datagrams captured so far."""
        times: dict[int, int] = {}
        while True:
            try:
                frame, control, _, _ = self._socket.recvmsg(2048, 64)
            except BlockingIOError:
                return times
            at = frame.find(self._tag)
            if at < 0:
                continue
            number = struct.unpack_from("!I", frame, at + len(self._tag))[0]
            for level, kind, value in control:
                if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
                    seconds, rest = struct.unpack("=qq", value)
                    times.setdefault(number, seconds * 10**9 + rest)


@contextmanager
def tapped(namespace: Namespace, interface: str) -> Iterator[None]:
    """Have a packet socket on an interface, as tcpdump would: every packet is cloned for it."""
    capture = Capture(namespace, interface)
    try:
        yield
    finally:
        capture.close()
