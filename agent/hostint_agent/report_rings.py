# SPDX-License-Identifier: Apache-2.0
"""The report rings of one datapath in this process's memory: what waits in them, and where it lies.

The bytes of a ring are mapped when it is first used: mapped memory counts as the process's own, and most nodes' drop rings stay
empty. report_iovs is an iovec array as it is: the program writes lengths, we write addresses.
"""

import array
import ctypes
import mmap
import sys
import weakref
from pathlib import Path

from hostint_agent import bpf_calls, bpf_types

_MASK64 = (1 << 64) - 1
# of the sequence number in a record: big endian in every format there is
SEQUENCE_OFFSET = 4
_IOV_BYTES = 16


class Rings:
    """Maps the rings below `maps`. Records have an index: ring * size + position % size."""

    def __init__(self, maps: Path) -> None:
        """Map all but the records. Raises bpf_calls.BpfError."""
        self._kept: list[mmap.mmap] = []
        self._records = bpf_calls.Map.open(maps / "report_records")
        weakref.finalize(self, self._records.close)
        self.stride, total = self._records.stride, self._records.max_entries
        (self._heads,) = self._positions(maps / "ring_heads", "value")
        self._tails, self._asleep = self._positions(maps / "ring_tails", "value", "asleep")
        self.count = len(self._heads)
        self.size = total // self.count
        # by ring; 0: not mapped yet
        self._addresses = [0] * self.count
        self._numbers: dict[int, memoryview] = {}
        self._iovs = self._address(maps / "report_iovs")
        self._iov_words = _words(self._iovs, 2 * total)
        self._collectors = _words(self._address(maps / "report_collectors"), total)
        counters = self._address(maps / "export_counters")
        self.counters = (bpf_types.ExportCounter * bpf_types.MAX_COLLECTORS).from_address(counters)

    def _address(self, path: Path) -> int:
        opened = bpf_calls.Map.open(path)
        memory = opened.memory()
        opened.close()
        return self._keep(memory)

    def _keep(self, memory: mmap.mmap) -> int:
        self._kept.append(memory)
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def _positions(self, path: Path, *fields: str) -> list[memoryview]:
        """One word of each ring's position, for each of the fields."""
        opened = bpf_calls.Map.open(path)
        count = opened.max_entries
        opened.close()
        step = ctypes.sizeof(bpf_types.RingPosition) // 8
        words = _words(self._address(path), count * step)
        return [words[getattr(bpf_types.RingPosition, f).offset // 8 :: step] for f in fields]

    def set_asleep(self, asleep: bool) -> None:
        """Have the programs ring the bell with the next report of each ring, or not."""
        for ring in range(self.count):
            self._asleep[ring] = int(asleep)

    def waiting(self) -> list[int]:
        """Records that wait, by ring. Safe to ask from any thread."""
        # in this order: the tail follows the head, so that no difference is below zero
        tails = self._tails.tolist()
        heads = self._heads.tolist()
        if heads == tails:
            return [0] * self.count
        return [(head - tail) & _MASK64 for head, tail in zip(heads, tails, strict=True)]

    def index(self, ring: int) -> int:
        """Where the first record that waits in a ring is; its bytes are mapped from now on."""
        if not self._addresses[ring]:
            self._map(ring)
        return ring * self.size + int(self._tails[ring]) % self.size

    def advance(self, ring: int, count: int) -> None:
        """Give records back to the program."""
        self._tails[ring] = (int(self._tails[ring]) + count) & _MASK64

    def _map(self, ring: int) -> None:
        begin, size = ring * self.size * self.stride, self.size * self.stride
        before = begin % mmap.PAGESIZE
        pages = -(-(before + size) // mmap.PAGESIZE)
        memory = mmap.mmap(self._records.fd, pages * mmap.PAGESIZE, offset=begin - before)
        address = self._keep(memory) + before
        bases = array.array("Q", range(address, address + size, self.stride))
        first = 2 * ring * self.size
        self._iov_words[first : first + 2 * self.size : 2] = memoryview(bases)
        words = memoryview((ctypes.c_uint32 * (size // 4)).from_address(address)).cast("B")
        self._numbers[ring] = words.cast("I")[SEQUENCE_OFFSET // 4 :: self.stride // 4]
        self._addresses[ring] = address

    def iov(self, index: int) -> int:
        """Address of the iovec array from a record on."""
        return self._iovs + _IOV_BYTES * index

    def address(self, index: int) -> int:
        """Address of a record."""
        return int(self._iov_words[2 * index])

    def addresses(self, index: int, count: int) -> list[int]:
        """Addresses of records."""
        return self._iov_words[2 * index : 2 * (index + count) : 2].tolist()

    def lengths(self, index: int, count: int) -> list[int]:
        """Lengths of reports."""
        return self._iov_words[2 * index + 1 : 2 * (index + count) : 2].tolist()

    def numbers(self, index: int, count: int) -> "array.array[int]":
        """Sequence numbers of reports of one ring, as the program wrote them."""
        ring, first = divmod(index, self.size)
        return swapped(array.array("I", self._numbers[ring][first : first + count].tobytes()))

    def collectors(self, index: int, count: int) -> list[int]:
        """Collector indexes of reports."""
        return self._collectors[index : index + count].tolist()

    def alike(self, index: int, count: int) -> bool:
        """Whether reports are all as long as the first and go to the same collector; without a Python object for each."""
        lengths = self._iov_words[2 * index + 1 : 2 * (index + count) : 2].tobytes()
        collectors = self._collectors[index : index + count].tobytes()
        return lengths == lengths[:8] * count and collectors == collectors[:8] * count


def swapped(numbers: "array.array[int]") -> "array.array[int]":
    """Between network order and this machine's."""
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _words(address: int, count: int) -> memoryview:
    """Memory as 64-bit words of this machine's byte order."""
    words = (ctypes.c_uint64 * count).from_address(address)
    return memoryview(words).cast("B").cast("Q")
