# SPDX-License-Identifier: Apache-2.0
"""Sequence numbers where several rings share a hw id: more CPUs than hw ids, so that only the sender can number the reports.

The shared number is the sum of the rings' own numbers, so that a gap in one of them is a gap in it, and so that another process
finds the same numbers: they follow from the maps alone. Records are numbered in a copy.
"""

import array
import ctypes
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from hostint_agent import bpf_calls, bpf_types, report_rings

HW_IDS_PER_KIND = 32
# longer than a program needs from taking a sequence number to handing over the record
_SETTLE_S = 0.002
_MASK32 = (1 << 32) - 1


class Numbering:
    """The numbers that were given, by hw id and collector."""

    def __init__(self, maps: Path, rings: report_rings.Rings, most: int) -> None:
        """Go on where another process stopped; `most`: records that are numbered at once. Raises bpf_calls.BpfError."""
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
        for ring, waiting in enumerate(rings.waiting()):
            self._before_what_waits(ring, waiting)
        self._total: dict[tuple[int, int], int] = {}
        for (ring, collector), number in self._last.items():
            key = (_shared(ring), collector)
            self._total[key] = (self._total.get(key, 0) + number) & _MASK32
        self._copies = ctypes.create_string_buffer(rings.stride * most)
        self._address = ctypes.addressof(self._copies)
        self._words = memoryview(self._copies).cast("B").cast("I")

    def _before_what_waits(self, ring: int, waiting: int) -> None:
        if not waiting:
            return
        first = self._rings.index(ring)
        begin = ring * self._rings.size
        seen = set()
        for step in range(waiting):
            index = begin + (first - begin + step) % self._rings.size
            collector = self._rings.collectors(index, 1)[0]
            if collector not in seen:
                seen.add(collector)
                self._last[ring, collector] = self._rings.numbers(index, 1)[0] - 1 & _MASK32

    def copy(self, ring: int, index: int, collectors: Sequence[int]) -> list[int]:
        """Number the reports of a ring from `index` on; the addresses of the copies."""
        count, stride = len(collectors), self._rings.stride
        ctypes.memmove(self._address, self._rings.address(index), count * stride)
        own = self._rings.numbers(index, count)
        # a run of one ring's own numbers is shifted as a whole
        hw_id = _shared(ring)
        shift = {
            collector: self._total.get((hw_id, collector), 0) - self._last.get((ring, collector), 0)
            for collector in set(collectors)
        }
        numbers = [
            (number + shift[collector]) & _MASK32
            for number, collector in zip(own, collectors, strict=True)
        ]
        for collector, number in dict(zip(collectors, own, strict=True)).items():
            self._last[ring, collector] = number
            self._total[hw_id, collector] = (number + shift[collector]) & _MASK32
        begin, end = report_rings.SEQUENCE_OFFSET // 4, count * stride // 4
        places = self._words[begin : begin + end : stride // 4]
        places[:] = memoryview(report_rings.swapped(array.array("I", numbers)))
        return list(range(self._address, self._address + count * stride, stride))


def _shared(ring: int) -> int:
    """The hw id that a ring writes under."""
    cpu, kind = divmod(ring, bpf_types.RINGS_PER_CPU)
    return cpu % HW_IDS_PER_KIND + HW_IDS_PER_KIND * kind
