# SPDX-License-Identifier: Apache-2.0
"""Drain the report rings and send what is in them: batches of equal length by UDP_SEGMENT, in a thread of its own.

A record is finished wire bytes, and report_iovs is an iovec array already, so that a batch is one system call and no byte is
touched here. The consumer position is in a pinned map: another process goes on where this one stops.
"""

import ctypes
import errno
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from hostint_agent import bpf_calls, bpf_types
from hostint_agent.node_rules import Destination

_LIBC = ctypes.CDLL(None, use_errno=True)
_SOL_UDP = 17
_UDP_SEGMENT = 103
_SO_SNDBUFFORCE = 32
_SEND_BUFFER_BYTES = 8 << 20
_MAX_SEGMENTS = 64
_MAX_BATCH_BYTES = 65_000
_CHUNK = 1024
_MIN_WAIT_S, _MAX_WAIT_S = 0.002, 0.05
# with more CPUs several rings share a hw id, and only we can number its reports
HW_IDS_PER_KIND = 32
# how long an error colours what we say of a collector
_ERROR_MEMORY_S = 10.0
_NO_SEGMENTS = (errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.EMSGSIZE)

log = structlog.get_logger()


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

    def __init__(self, destination: Destination) -> None:
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
        self.last_error: tuple[float, int] | None = None

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
        most = min(_MAX_SEGMENTS, _MAX_BATCH_BYTES // length) if self._segments else 1
        failed = sent = 0
        while sent < count:
            batch = min(most, count - sent)
            code = self._send_batch(iov + 16 * sent, batch, length)
            if code in _NO_SEGMENTS and batch > 1:
                # a route without segmentation offload (IPsec, for one): one by one from now on
                self._segments, most = False, 1
                continue
            if code:
                failed += batch
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
            if code not in _NO_SEGMENTS:
                self.last_error = (time.monotonic(), code)
            if code != errno.ECONNREFUSED:
                return code
        return code

    def health(self, now: float) -> Health:
        """Reachable, unless there was an error lately."""
        where = f"{self.destination.address}:{self.destination.port}"
        if self.last_error is None or now - self.last_error[0] > _ERROR_MEMORY_S:
            return Health(True, "Sending", f"reports go to {where}")
        code = self.last_error[1]
        reason = "PortUnreachable" if code == errno.ECONNREFUSED else "SendFailed"
        words = os.strerror(code).lower()
        if code == errno.ECONNREFUSED:
            words = "port unreachable: nothing listens there"
        return Health(False, reason, f"{where}: {words}")


class _Rings:
    """The mapped rings of one datapath."""

    def __init__(self, maps: Path) -> None:
        self._kept: list[mmap.mmap] = []
        self.records = self._address(maps / "report_records")
        opened = bpf_calls.Map.open(maps / "report_records")
        self.stride, total = opened.stride, opened.max_entries
        opened.close()
        self.heads = self._positions(maps / "ring_heads")
        self.tails = self._positions(maps / "ring_tails")
        self.count = len(self.heads)
        self.size = total // self.count
        self.iov = self._address(maps / "report_iovs")
        self.iov_words = (ctypes.c_uint64 * (2 * total)).from_address(self.iov)
        for index in range(total):
            self.iov_words[2 * index] = self.records + self.stride * index
        self.words = memoryview(self.iov_words).cast("B").cast("Q")
        collectors = self._address(maps / "report_collectors")
        array = (ctypes.c_uint64 * total).from_address(collectors)
        self.collectors = memoryview(array).cast("B").cast("Q")
        counters = self._address(maps / "export_counters")
        self.counters = (bpf_types.ExportCounter * bpf_types.MAX_COLLECTORS).from_address(counters)

    def _address(self, path: Path) -> int:
        opened = bpf_calls.Map.open(path)
        memory = opened.memory()
        opened.close()
        self._kept.append(memory)
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def _positions(self, path: Path) -> list[ctypes.c_uint64]:
        opened = bpf_calls.Map.open(path)
        count = opened.max_entries
        opened.close()
        address = self._address(path)
        stride = ctypes.sizeof(bpf_types.RingPosition)
        return [ctypes.c_uint64.from_address(address + stride * i) for i in range(count)]


class Exporter:
    """Sends until stopped; `set_destinations` may be called at any time from any thread."""

    def __init__(
        self,
        maps: Path,
        *,
        renumber: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Map the rings below `maps`. `renumber` None: by the number of CPUs. Raises bpf_calls.BpfError."""
        self._rings = _Rings(maps)
        cpus = bpf_calls.possible_cpus()
        self._renumber = cpus > HW_IDS_PER_KIND if renumber is None else renumber
        self._sequences: dict[tuple[int, int], int] = {}
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted: Mapping[int, Destination] = {}
        self._senders: dict[int, Sender] = {}
        self._connect_errors: dict[int, tuple[float, str]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="export", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Send what is in the rings now, then stop."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5)
        with self._lock:
            for sender in self._senders.values():
                sender.close()
            self._senders.clear()

    def set_destinations(self, wanted: Mapping[int, Destination]) -> None:
        """Where the reports of each collector index go from now on, those that wait in the rings included."""
        with self._lock:
            for index, sender in list(self._senders.items()):
                if wanted.get(index) != sender.destination:
                    sender.close()
                    del self._senders[index]
            self._wanted = dict(wanted)
            self._connect_errors.clear()

    def health(self) -> dict[str, Health]:
        """How each collector is doing, by name."""
        now = self._clock()
        with self._lock:
            told = {}
            for index, destination in self._wanted.items():
                sender = self._senders.get(index)
                if index in self._connect_errors:
                    told[destination.name] = Health(
                        False, "NoRoute", self._connect_errors[index][1]
                    )
                elif sender:
                    told[destination.name] = sender.health(now)
                else:
                    where = f"{destination.address}:{destination.port}"
                    told[destination.name] = Health(True, "Idle", f"no report for {where} yet")
            return told

    def fill(self) -> list[int]:
        """Records that wait, by ring."""
        pairs = zip(self._rings.heads, self._rings.tails, strict=True)
        return [head.value - tail.value for head, tail in pairs]

    def counters(self) -> dict[int, tuple[int, int]]:
        """(sent, failed) by collector index, since the maps were made."""
        return {
            i: (c.sent, c.failed) for i, c in enumerate(self._rings.counters) if c.sent or c.failed
        }

    def _run(self) -> None:
        wait = _MIN_WAIT_S
        while not self._stopping.is_set():
            if self.poll():
                wait = _MIN_WAIT_S
            else:
                self._stopping.wait(wait)
                wait = min(wait * 2, _MAX_WAIT_S)
        while self.poll():
            pass

    def poll(self) -> int:
        """Send what waits, at most one chunk of each ring; how many records were taken."""
        with self._lock:
            return sum([self._drain(ring) for ring in range(self._rings.count)])

    def _drain(self, ring: int) -> int:
        rings = self._rings
        tail = int(rings.tails[ring].value)
        waiting = int(rings.heads[ring].value) - tail
        if not waiting:
            return 0
        offset = tail % rings.size
        count = min(waiting, rings.size - offset, _CHUNK)
        first = ring * rings.size + offset
        lengths = rings.words[2 * first + 1 : 2 * (first + count) : 2].tolist()
        collectors = rings.collectors[first : first + count].tolist()
        begin = 0
        while begin < count:
            end = _run_end(lengths, collectors, begin)
            self._send(first + begin, end - begin, lengths[begin], collectors[begin])
            begin = end
        # only now: a process that dies before this sends again rather than not at all
        rings.tails[ring].value = tail + count
        return count

    def _send(self, first: int, count: int, length: int, collector: int) -> None:
        if self._renumber:
            self._number(first, count, collector)
        sender = self._sender(collector)
        failed = (
            count if sender is None else sender.send(self._rings.iov + 16 * first, count, length)
        )
        counter = self._rings.counters[collector % bpf_types.MAX_COLLECTORS]
        counter.sent += count - failed
        counter.failed += failed

    def _number(self, first: int, count: int, collector: int) -> None:
        """Write the sequence numbers of several rings that share a hw id (v0.5: byte 3 and bytes 4 to 7)."""
        for index in range(first, first + count):
            record = self._rings.records + self._rings.stride * index
            hw_id = ctypes.c_uint8.from_address(record + 3).value & 63
            number = (self._sequences.get((hw_id, collector), 0) + 1) & 0xFFFFFFFF
            self._sequences[hw_id, collector] = number
            ctypes.memmove(record + 4, struct.pack("!I", number), 4)

    def _sender(self, collector: int) -> Sender | None:
        """The socket of a collector, made when first needed; None while there is no way to it."""
        sender = self._senders.get(collector)
        if sender is not None:
            return sender
        destination = self._wanted.get(collector)
        if destination is None:
            return None
        error = self._connect_errors.get(collector)
        if error and self._clock() - error[0] < 1.0:
            return None
        try:
            sender = Sender(destination)
        except OSError as failure:
            where = f"{destination.address}:{destination.port}"
            words = f"{where}: {(failure.strerror or str(failure)).lower()}"
            if collector not in self._connect_errors:
                log.warning("no way to the collector", collector=destination.name, error=words)
            self._connect_errors[collector] = (self._clock(), words)
            return None
        if self._connect_errors.pop(collector, None):
            log.info("collector reachable again", collector=destination.name)
        self._senders[collector] = sender
        return sender


def _run_end(lengths: list[int], collectors: list[int], begin: int) -> int:
    """End of the run of records from `begin` on that go to one collector and are equally long."""
    length, collector, count = lengths[begin], collectors[begin], len(lengths)
    if begin == 0 and lengths.count(length) == count and collectors.count(collector) == count:
        return count
    end = begin + 1
    while end < count and lengths[end] == length and collectors[end] == collector:
        end += 1
    return end
