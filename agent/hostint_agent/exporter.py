# SPDX-License-Identifier: Apache-2.0
"""Drain the report rings and send what is in them, in a thread of its own.

What waits in a ring is taken in chunks. Reports of one chunk that go to one collector and are equally long are sent together, so
that 64 or 128 of them are one system call; within a chunk (1024) reports may thus overtake others. A record is finished wire bytes
and no byte is touched here. The consumer position is in a pinned map: another process goes on where this one stops. One that was
killed may have sent a chunk whose position it did not write any more: that is sent twice, with the same sequence numbers.
"""

import array
import collections
import contextlib
import ctypes
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from hostint_agent import bell, bpf_calls, bpf_types, numbering, report_rings, senders
from hostint_agent.node_rules import Destination

# a collector that knows how to take late reports back must look this far
CHUNK = 1024
_MIN_PAUSE_MS, _MAX_PAUSE_MS = 2, 50
# when pauses have grown to the longest there is nothing to do, and the programs ring a bell when there is. They have read that
# they are to after so long, and should one ever not ring, this is how late its report is
_FALLING_ASLEEP_MS, _ASLEEP_MS = 2, 1000
# while reports come: a ring of 16,384 takes more than a million a second for so long
_BUSY_PAUSE_MS = 10
# a ring that was fuller than this share of it is looked after sooner
_BUSY_SHARE = 16
_STOP_S = 1.5
_MASK32 = (1 << 32) - 1

K = TypeVar("K")


class _Turns:
    """A lock that is passed on in turn: a loop that lets go and takes again does not starve the others."""

    def __init__(self) -> None:
        self._next = threading.Lock()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def mine(self) -> Iterator[None]:
        with self._next:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()


class _Waiter:
    """Waits for the bell, for who pokes, or for a time."""

    def __init__(self, rung: bell.Bell, wake: int) -> None:
        self._bell, self._wake = rung, wake
        self._poll = select.poll()
        for descriptor in (rung.fileno(), wake):
            self._poll.register(descriptor, select.POLLIN)

    def wait(self, timeout_ms: int) -> bool:
        """True if somebody rang or poked, which is forgotten with that: it ends one wait, not those to come."""
        ready = [descriptor for descriptor, _ in self._poll.poll(timeout_ms)]
        if self._wake in ready:
            os.eventfd_read(self._wake)
        if self._bell.fileno() in ready:
            self._bell.hush()
        return bool(ready)


class Exporter:
    """Sends until stopped; `set_destinations` may be called at any time from any thread."""

    def __init__(
        self,
        maps: Path,
        *,
        renumber: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        sockets: senders.SendingSockets | None = None,
    ) -> None:
        """Map the rings below `maps`. Raises bpf_calls.BpfError.

        `renumber` None: by the number of CPUs. `sockets`: where open sockets are announced.
        """
        self.sockets = sockets or senders.SendingSockets()
        self._rings = report_rings.Rings(maps)
        self._maps = maps
        cpus = bpf_calls.possible_cpus()
        renumber = cpus > numbering.HW_IDS_PER_KIND if renumber is None else renumber
        self._numbering = numbering.Numbering(maps, self._rings, CHUNK) if renumber else None
        scratch = (ctypes.c_uint64 * (2 * CHUNK))()
        self._iov = ctypes.addressof(scratch)
        self._iov_words = memoryview(scratch).cast("B").cast("Q")
        self._clock = clock
        self._turns = _Turns()
        self._wanted: Mapping[int, Destination] = {}
        # those that were wanted once, as long as their index is nobody else's: what waits for them still goes there
        self._known: dict[int, Destination] = {}
        self._senders: dict[int, senders.Sender] = {}
        self._open_errors: dict[int, tuple[float, str]] = {}
        self._stopping = False
        self._wake = os.eventfd(0)
        weakref.finalize(self, os.close, self._wake)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to send; once is enough, and not before the destinations are known. Raises bpf_calls.BpfError."""
        if self._thread is None:
            # only here: what an older version left is sent without a thread, and may have none
            rung = bell.Bell(self._maps)
            self._thread = threading.Thread(
                target=self._run, args=(rung,), name="export", daemon=True
            )
            self._thread.start()

    @property
    def alive(self) -> bool:
        """False when the thread has ended though nobody stopped it."""
        return self._thread is None or self._thread.is_alive()

    def stop(self) -> None:
        """Stop, and send what is in the rings now; of use without `start` as well."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread:
            self._thread.join(_STOP_S)
        with self._turns.mine():
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
        with self._turns.mine():
            if any(self._known.get(i, new) != new for i, new in wanted.items()):
                self._drain_present()
            for index, sender in list(self._senders.items()):
                if wanted.get(index, sender.destination) != sender.destination:
                    sender.close()
                    del self._senders[index]
            self._wanted = dict(wanted)
            self._known |= wanted
            self._open_errors.clear()

    def health(self) -> dict[str, senders.Health]:
        """How each collector is doing, by name. Does not wait for what is being sent."""
        return {to.name: self._health(index, to) for index, to in self._wanted.items()}

    def recheck(self) -> None:
        """Try unreachable collectors again, without a report; to be called about once a second."""
        for index in self._wanted:
            if index in self._open_errors:
                with self._turns.mine():
                    self._sender(index)
            elif sender := self._senders.get(index):
                # closed meanwhile: its index leads elsewhere now
                with contextlib.suppress(OSError):
                    sender.recheck()

    def _health(self, index: int, destination: Destination) -> senders.Health:
        error, sender = self._open_errors.get(index), self._senders.get(index)
        if error:
            return senders.Health(False, "NoSocket", error[1])
        if sender:
            # closed meanwhile: its index leads elsewhere now
            with contextlib.suppress(OSError):
                return sender.health()
        where = f"{destination.address}:{destination.port}"
        return senders.Health(True, "Idle", f"no report for {where} yet")

    def fill(self) -> list[int]:
        """Records that wait, by ring."""
        return self._rings.waiting()

    def counters(self) -> dict[int, tuple[int, int]]:
        """(sent, failed) by collector index, since the maps were made."""
        return {
            i: (c.sent, c.failed) for i, c in enumerate(self._rings.counters) if c.sent or c.failed
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is sent, and nothing counted, as long as this is entered."""
        with self._turns.mine():
            yield

    def empty(self) -> None:
        """Send what waits now; what cannot be sent has failed, and no other process will try it again."""
        with self._turns.mine():
            self._drain_present()

    def _run(self, rung: bell.Bell) -> None:
        waiter = _Waiter(rung, self._wake)
        pause_ms = _MIN_PAUSE_MS
        while not self._stopping:
            taken, waiting = self._round()
            # what a round left waits for no pause
            if taken < sum(waiting):
                continue
            if pause_ms == _MAX_PAUSE_MS and not taken:
                self._sleep(waiter)
                pause_ms = _MIN_PAUSE_MS
                continue
            pause_ms = _next_pause(pause_ms, max(waiting), self._rings.size)
            waiter.wait(pause_ms)
        self._rings.set_asleep(False)

    def _sleep(self, waiter: "_Waiter") -> None:
        """Return when there is something to do, or somebody wants this thread."""
        self._rings.set_asleep(True)
        woken = waiter.wait(_FALLING_ASLEEP_MS)
        while not (woken or self._stopping or any(self._rings.waiting())):
            woken = waiter.wait(_ASLEEP_MS)
        self._rings.set_asleep(False)

    def poke(self) -> None:
        """Have the thread look at the rings now."""
        os.eventfd_write(self._wake, 1)

    def poll(self) -> int:
        """Send what waits, at most one chunk of each ring; how many records were taken."""
        return self._round()[0]

    def _round(self) -> tuple[int, list[int]]:
        """Send a chunk of each ring: (records that were taken, records that waited by ring)."""
        waiting = self._rings.waiting()
        if not any(waiting):
            return 0, waiting
        with self._turns.mine():
            # again: another thread may have sent some while this one waited for its turn
            waiting = self._rings.waiting()
            taken = [self._drain(ring, count) for ring, count in enumerate(waiting) if count]
        return sum(taken), waiting

    def _drain_present(self) -> None:
        """Send what waits now, not what comes meanwhile: traffic need not end for this to."""
        for ring, waiting in enumerate(self._rings.waiting()):
            left = waiting
            while left:
                left -= self._drain(ring, left)

    def _drain(self, ring: int, waiting: int) -> int:
        """Send up to a chunk of the records that wait in a ring; how many."""
        rings = self._rings
        index = rings.index(ring)
        count = min(waiting, CHUNK, (ring + 1) * rings.size - index)
        if self._numbering is None and rings.alike(index, count):
            length, collector = rings.lengths(index, 1)[0], rings.collectors(index, 1)[0]
            self._send(rings.iov(index), count, length, collector)
        else:
            to = rings.collectors(index, count)
            count = _before_gap(to, rings.numbers(index, count))
            self._send_mixed(ring, index, to[:count])
        # only now: a process that dies before this sends again rather than not at all
        rings.advance(ring, count)
        return count

    def _send_mixed(self, ring: int, index: int, to: Sequence[int]) -> None:
        """Send records by collector and length."""
        count = len(to)
        lengths = self._rings.lengths(index, count)
        if self._numbering:
            records = self._numbering.copy(ring, index, to)
        else:
            records = self._rings.addresses(index, count)
        for (collector, length), group in _groups(to, lengths, records).items():
            end = 2 * len(group)
            self._iov_words[0:end:2] = memoryview(array.array("Q", group))
            self._iov_words[1:end:2] = memoryview(array.array("Q", (length,)) * len(group))
            self._send(self._iov, len(group), length, collector)

    def _send(self, iov: int, count: int, length: int, collector: int) -> None:
        sound = 0 < length <= self._rings.stride
        sender = self._sender(collector) if sound else None
        failed = count if sender is None else sender.send(iov, count, length)
        counter = self._rings.counters[collector % bpf_types.MAX_COLLECTORS]
        counter.sent += count - failed
        counter.failed += failed

    def _sender(self, collector: int) -> senders.Sender | None:
        """Return the socket of a collector, opened when first needed; None if it cannot be."""
        sender = self._senders.get(collector)
        if sender is not None:
            return sender
        destination = self._known.get(collector)
        if destination is None:
            return None
        error = self._open_errors.get(collector)
        if error and self._clock() - error[0] < 1.0:
            return None
        try:
            sender = senders.Sender(destination, self._clock, self.sockets)
        except OSError as failure:
            where = f"{destination.address}:{destination.port}"
            words = f"{where}: {(failure.strerror or str(failure)).lower()}"
            self._open_errors[collector] = (self._clock(), words)
            return None
        self._open_errors.pop(collector, None)
        self._senders[collector] = sender
        return sender


def _next_pause(pause_ms: int, fullest: int, size: int) -> int:
    """How long to sleep after a round in which so many records waited in the fullest ring."""
    if not fullest:
        return min(2 * pause_ms, _MAX_PAUSE_MS)
    if fullest > size // _BUSY_SHARE:
        return max(pause_ms // 2, _MIN_PAUSE_MS)
    return min(2 * pause_ms, _BUSY_PAUSE_MS)


def _before_gap(to: Sequence[int], numbers: Sequence[int]) -> int:
    """How many reports there are before the first whose predecessor (of the same collector) is missing.

    Only these may overtake each other: a receiver could not tell a report that is late from one of those that are lost.
    """
    if (numbers[-1] - numbers[0]) & _MASK32 == len(to) - 1 and to.count(to[0]) == len(to):
        return len(to)
    expected: dict[int, int] = {}
    for place, (collector, number) in enumerate(zip(to, numbers, strict=True)):
        if expected.get(collector, number) != number:
            return place
        expected[collector] = (number + 1) & _MASK32
    return len(to)


def _groups(
    to: Sequence[int], lengths: Sequence[int], records: Sequence[int]
) -> dict[tuple[int, int], list[int]]:
    """Records by (collector, length), in order within each."""
    if to.count(to[0]) == len(to):
        return {(to[0], length): group for length, group in _by(lengths, records).items()}
    return _by(zip(to, lengths, strict=True), records)


def _by(keys: Iterable[K], values: Iterable[int]) -> dict[K, list[int]]:
    found: dict[K, list[int]] = collections.defaultdict(list)
    for key, value in zip(keys, values, strict=True):
        found[key].append(value)
    return found
