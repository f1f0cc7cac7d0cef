# SPDX-License-Identifier: Apache-2.0
"""Drain the report rings and send what is in them: batches of equal length by UDP_SEGMENT, in a thread of its own.

A record is finished wire bytes, and report_iovs is an iovec array already, so that a batch is one system call and no byte is
touched here. The consumer position is in a pinned map: another process goes on where this one stops. One that was killed may have
sent up to 64 records whose position it did not write any more: these are sent twice, with the same sequence numbers.
"""

import ctypes
import mmap
import struct
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from hostint_agent import bpf_calls, bpf_types, senders
from hostint_agent.node_rules import Destination

_CHUNK = 1024
_MIN_WAIT_S, _MAX_WAIT_S = 0.002, 0.05
_STOP_S = 1.5
# with more CPUs several rings share a hw id, and only we can number its reports
HW_IDS_PER_KIND = 32
# longer than a program needs from taking a sequence number to handing over the record
_SETTLE_S = 0.002
_MASK32 = (1 << 32) - 1
# of the sequence number in a record: big endian in every format there is
_SEQUENCE_OFFSET = 4

log = structlog.get_logger()


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


class _Numbering:
    """Sequence numbers where several rings share a hw id.

    The shared number is the sum of the rings' own numbers, so that a gap in one of them is a gap in it, and so that another
    process finds the same numbers: they follow from the maps alone. Records are numbered in a copy.
    """

    def __init__(self, maps: Path, rings: _Rings) -> None:
        self._rings = rings
        opened = bpf_calls.Map.open(maps / "sequences")
        data = opened.values()
        opened.close()
        taken = struct.unpack(f"={len(data) // 8}Q", data)
        time.sleep(_SETTLE_S)
        # the last number that was sent, by (ring, collector)
        self._last = {
            divmod(index, bpf_types.MAX_COLLECTORS): number & _MASK32
            for index, number in enumerate(taken)
            if number
        }
        for ring in range(rings.count):
            self._before_what_waits(ring)
        self._total: dict[tuple[int, int], int] = {}
        for (ring, collector), number in self._last.items():
            key = (_shared(ring), collector)
            self._total[key] = self._total.get(key, 0) + number
        self._copies = ctypes.create_string_buffer(rings.stride * _CHUNK)
        self._iov = (ctypes.c_uint64 * (2 * _CHUNK))()
        for index in range(_CHUNK):
            self._iov[2 * index] = ctypes.addressof(self._copies) + rings.stride * index

    def _before_what_waits(self, ring: int) -> None:
        tail, head = self._rings.tails[ring].value, self._rings.heads[ring].value
        seen = set()
        for position in range(tail, head):
            index = ring * self._rings.size + position % self._rings.size
            collector = int(self._rings.collectors[index])
            if collector not in seen:
                seen.add(collector)
                self._last[ring, collector] = (self._own_number(index) - 1) & _MASK32

    def _own_number(self, index: int) -> int:
        address = self._rings.records + self._rings.stride * index + _SEQUENCE_OFFSET
        return int.from_bytes(ctypes.string_at(address, 4), "big")

    def copy(self, first: int, count: int, length: int, collector: int) -> int:
        """Number a run of one ring's records; the address of the iovec of the copies."""
        ring, stride = first // self._rings.size, self._rings.stride
        key = (_shared(ring), collector)
        last, total = self._last.get((ring, collector), 0), self._total.get(key, 0)
        for place in range(count):
            own = self._own_number(first + place)
            total += (own - last) & _MASK32
            last = own
            copy = ctypes.addressof(self._copies) + stride * place
            ctypes.memmove(copy, self._rings.records + stride * (first + place), length)
            ctypes.memmove(copy + _SEQUENCE_OFFSET, struct.pack("!I", total & _MASK32), 4)
            self._iov[2 * place + 1] = length
        self._last[ring, collector], self._total[key] = last, total
        return ctypes.addressof(self._iov)


def _shared(ring: int) -> int:
    """The hw id that a ring writes under."""
    cpu, kind = divmod(ring, bpf_types.RINGS_PER_CPU)
    return cpu % HW_IDS_PER_KIND + HW_IDS_PER_KIND * kind


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
        renumber = cpus > HW_IDS_PER_KIND if renumber is None else renumber
        self._numbering = _Numbering(maps, self._rings) if renumber else None
        self._clock = clock
        self._lock = threading.Lock()
        self._wanted: Mapping[int, Destination] = {}
        # those that were wanted once, as long as their index is nobody else's: what waits for them still goes there
        self._known: dict[int, Destination] = {}
        self._senders: dict[int, senders.Sender] = {}
        self._connect_errors: dict[int, tuple[float, str]] = {}
        self._stopping = threading.Event()
        self._started = False
        self._thread = threading.Thread(target=self._run, name="export", daemon=True)

    def start(self) -> None:
        """Begin to send; once is enough, and not before the destinations are known."""
        if not self._started:
            self._started = True
            self._thread.start()

    @property
    def alive(self) -> bool:
        """False when the thread has ended though nobody stopped it."""
        return not self._started or self._thread.is_alive()

    def stop(self) -> None:
        """Stop, and send what is in the rings now; of use without `start` as well."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)
        with self._lock:
            # without any destination what waits is left for the process that will know one
            if self._known:
                self._drain_present()
            for sender in self._senders.values():
                sender.close()
            self._senders.clear()

    def set_destinations(self, wanted: Mapping[int, Destination]) -> None:
        """Where reports go from now on, by collector index.

        What waits in the rings still goes where its index led before; so do later reports for an index that is wanted no more.
        """
        with self._lock:
            if any(self._known.get(i, new) != new for i, new in wanted.items()):
                self._drain_present()
            for index, sender in list(self._senders.items()):
                if wanted.get(index, sender.destination) != sender.destination:
                    sender.close()
                    del self._senders[index]
            self._wanted = dict(wanted)
            self._known |= wanted
            self._connect_errors.clear()

    def health(self) -> dict[str, senders.Health]:
        """How each collector is doing, by name."""
        with self._lock:
            told = {}
            for index, destination in self._wanted.items():
                sender = self._senders.get(index)
                if index in self._connect_errors:
                    told[destination.name] = senders.Health(
                        False, "NoRoute", self._connect_errors[index][1]
                    )
                elif sender:
                    told[destination.name] = sender.health()
                else:
                    where = f"{destination.address}:{destination.port}"
                    told[destination.name] = senders.Health(
                        True, "Idle", f"no report for {where} yet"
                    )
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

    def poll(self) -> int:
        """Send what waits, at most one chunk of each ring; how many records were taken."""
        with self._lock:
            return sum([self._drain(ring) for ring in range(self._rings.count)])

    def _drain_present(self) -> None:
        """Send what waits now, not what comes meanwhile: traffic need not end for this to."""
        for ring, head in enumerate(self._rings.heads):
            end = head.value
            while self._rings.tails[ring].value < end:
                self._drain(ring)

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
            # only now: a process that dies before this sends again rather than not at all
            rings.tails[ring].value = tail + end
            begin = end
        return count

    def _send(self, first: int, count: int, length: int, collector: int) -> None:
        sound = 0 < length <= self._rings.stride
        iov = self._rings.iov + 16 * first
        if self._numbering and sound:
            iov = self._numbering.copy(first, count, length, collector)
        sender = self._sender(collector) if sound else None
        failed = count if sender is None else sender.send(iov, count, length)
        counter = self._rings.counters[collector % bpf_types.MAX_COLLECTORS]
        counter.sent += count - failed
        counter.failed += failed

    def _sender(self, collector: int) -> senders.Sender | None:
        """The socket of a collector, made when first needed; None while there is no way to it."""
        sender = self._senders.get(collector)
        if sender is not None:
            return sender
        destination = self._known.get(collector)
        if destination is None:
            return None
        error = self._connect_errors.get(collector)
        if error and self._clock() - error[0] < 1.0:
            return None
        try:
            sender = senders.Sender(destination, self._clock)
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
    """End of the run of at most 64 records from `begin` on that go to one collector and are equally long."""
    length, collector = lengths[begin], collectors[begin]
    end = begin + 1
    limit = min(begin + senders.MAX_SEGMENTS, len(lengths))
    while end < limit and lengths[end] == length and collectors[end] == collector:
        end += 1
    return end
