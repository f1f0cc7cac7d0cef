# SPDX-License-Identifier: Apache-2.0
"""Report rings in real BPF arrays, written as the programs write them, and a UDP socket to receive what they hold."""

import contextlib
import ctypes
import mmap
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from hostint_agent import bpf_calls, bpf_types
from hostint_agent.node_rules import Destination
from tests.pins import pin_directory

_ARRAY, _RINGBUF = 2, 27
_MMAPABLE = 1024
_SO_RCVBUFFORCE = 33
RING_SIZE = 128


def make_map(
    path: Path, kind: int, value_bytes: int, entries: int, flags: int = 0, key_bytes: int = 4
) -> bpf_calls.Map:
    """Make and pin a map."""
    attr = struct.pack("=IIIII", kind, key_bytes, value_bytes, entries, flags)
    fd = bpf_calls.bpf(bpf_calls.MAP_CREATE, attr, f"create {path.name}")
    bpf_calls.obj_pin(fd, path)
    return bpf_calls.Map(fd)


def _create(path: Path, value_bytes: int, entries: int) -> bpf_calls.Map:
    return make_map(path, _ARRAY, value_bytes, entries, _MMAPABLE)


class Rings:
    """`count` rings of `size` records below the directory `maps`."""

    def __init__(self, maps: Path, count: int, size: int = RING_SIZE) -> None:
        self.maps = maps
        self.count = count
        self.size = size
        self.written = 0
        records = count * size
        self._records = _create(maps / "report_records", bpf_types.REPORT_BYTES, records)
        self._iovs = _create(maps / "report_iovs", 16, records).memory()
        self._collectors = _create(maps / "report_collectors", 8, records)
        position = ctypes.sizeof(bpf_types.RingPosition)
        self._heads = _create(maps / "ring_heads", position, count).memory()
        self._tails = _create(maps / "ring_tails", position, count).memory()
        self._sequences = _create(maps / "sequences", 8, count * bpf_types.MAX_COLLECTORS)
        _create(maps / "export_counters", 16, bpf_types.MAX_COLLECTORS)
        attr = struct.pack("=IIIII", _RINGBUF, 0, 0, mmap.PAGESIZE, 0)
        fd = bpf_calls.bpf(bpf_calls.MAP_CREATE, attr, "create bell")
        bpf_calls.obj_pin(fd, maps / "bell")
        os.close(fd)

    def _position(self, memory: object, ring: int) -> ctypes.c_uint64:
        offset = ring * ctypes.sizeof(bpf_types.RingPosition)
        return ctypes.c_uint64.from_buffer(memory, offset)  # type: ignore[arg-type]

    def head(self, ring: int) -> int:
        return self._position(self._heads, ring).value

    def tail(self, ring: int) -> int:
        return self._position(self._tails, ring).value

    def waiting(self, ring: int) -> int:
        """Records of a ring that no exporter took yet."""
        return (self.head(ring) - self.tail(ring)) % (1 << 64)

    def begin_at(self, ring: int, position: int) -> None:
        """Pretend that so many records came and went."""
        self._position(self._heads, ring).value = position
        self._position(self._tails, ring).value = position

    def lose(self, ring: int, collector: int) -> int:
        """Take a sequence number for a report that finds no room."""
        key = struct.pack("=I", ring * bpf_types.MAX_COLLECTORS + collector)
        number = struct.unpack("=Q", self._sequences.lookup(key)[:8])[0] + 1
        self._sequences.update(key, struct.pack("=Q", number))
        return number

    def write(self, ring: int, collector: int, length: int = 40) -> bytes:
        """Append a report; its bytes: ring, collector, sequence number, filling."""
        number = self.lose(ring, collector)
        head = self._position(self._heads, ring)
        assert self.waiting(ring) < self.size, "the ring is full"
        index = ring * self.size + head.value % self.size
        report = struct.pack("!HHI", ring, collector, number & 0xFFFFFFFF)
        report += bytes((number + i) & 255 for i in range(length - len(report)))
        self._records.update(
            struct.pack("=I", index), report.ljust(bpf_types.REPORT_BYTES, b"\xee")
        )
        self._collectors.update(struct.pack("=I", index), struct.pack("=Q", collector))
        struct.pack_into("=Q", self._iovs, 16 * index + 8, length)
        head.value += 1
        self.written += 1
        return report


@contextlib.contextmanager
def rings(count: int = 2, size: int = RING_SIZE) -> Iterator[Rings]:
    """Make rings of our own in the bpffs, and take them away again."""
    with pin_directory("rings") as directory:
        yield Rings(directory, count, size)


class Receiver:
    """A collector on the loopback, as far as UDP goes."""

    def __init__(self, name: str = "here", address: str = "127.0.0.1", dscp: int = 0) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
        if family == socket.AF_INET:
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
        self.socket.bind((address, 0))
        self.socket.settimeout(5)
        port = self.socket.getsockname()[1]
        self.destination = Destination(name, address, port, dscp)

    def __enter__(self) -> "Receiver":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def take(self, count: int) -> list[bytes]:
        """The next `count` datagrams."""
        return [self.socket.recv(65536) for _ in range(count)]

    def is_empty(self) -> bool:
        """True if nothing comes for a moment."""
        self.socket.settimeout(0.05)
        try:
            self.socket.recv(65536)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(5)
        return False


def closed_destination(name: str = "nobody") -> Destination:
    """A port of the loopback where nobody listens."""
    with Receiver(name) as receiver:
        return receiver.destination


def eventually(check: object, timeout_s: float = 10.0) -> None:
    """Wait until `check()` is true."""
    deadline = time.monotonic() + timeout_s
    while not check():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.01)
