# SPDX-License-Identifier: Apache-2.0
"""Write compiled tables to the side that no packet reads, and make it live with one store."""

import ctypes
import mmap
import platform
import struct
from collections.abc import Mapping
from pathlib import Path

from hostint_agent import bpf_calls, bpf_types, classifier

# first element of side 1, in elements, by map; side 0 begins at 0
_SIDE_ELEMENTS = {
    "trie_roots": 256,
    "trie_chunks": classifier.NR_TRIE_CHUNKS,
    "gates6": 1024,
    "buckets6": classifier.NR_BUCKETS6,
    "port_roots": 2 * classifier.NR_PORT_GROUPS,
    "port_pages": classifier.NR_PORT_PAGES,
    "class_rows": classifier.NR_CLASSES,
    "class_words": classifier.NR_CLASS_WORDS,
    "classifier_rules": classifier.NR_RULES,
    "classifier_sides": 1,
    "policies": bpf_types.MAX_WATCHLISTS,
    "collectors": bpf_types.MAX_COLLECTORS,
}
_LIBC = ctypes.CDLL(None, use_errno=True)
_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283}[platform.machine()]
_MEMBARRIER_CMD_GLOBAL = 1
_STORES_ARE_ORDERED = platform.machine() == "x86_64"

Policies = Mapping[int, bpf_types.Policy]
Collectors = Mapping[int, bpf_types.Collector]


class Tables:
    """The two-sided tables of a loaded datapath.

    Nothing is remembered between commits: what a side held before is either rewritten whole or out of reach of what is
    written, so that a new agent process goes on where the last one stopped.
    """

    def __init__(self, maps: Path) -> None:
        """Open the pinned maps below `maps`. Raises bpf_calls.BpfError."""
        self._memory: dict[str, mmap.mmap] = {}
        self._side_bytes: dict[str, int] = {}
        for name, elements in _SIDE_ELEMENTS.items():
            opened = bpf_calls.Map.open(maps / name)
            self._memory[name] = opened.memory()
            self._side_bytes[name] = opened.stride * elements
            opened.close()
        self._generation_map = bpf_calls.Map.open(maps / "classifier_generation")
        self._generation_memory = self._generation_map.memory()
        self._generation = ctypes.c_uint64.from_buffer(self._generation_memory)

    @property
    def generation(self) -> int:
        """How many commits there were; bit 0 is the live side."""
        return int(self._generation.value)

    def commit(self, image: classifier.Image, policies: Policies, collectors: Collectors) -> int:
        """Make rules, report settings and collectors live, all at once; the new generation.

        Waits for the programs that may still read the other side: some milliseconds, so not for the event loop.
        """
        generation = self.generation + 1
        side = generation & 1
        _wait_for_readers()
        for name, content in image.tables.items():
            self._write(name, side, content)
        self._write("classifier_sides", side, image.side_of(generation))
        self._write("policies", side, _array(policies, bpf_types.Policy, bpf_types.MAX_WATCHLISTS))
        self._write(
            "collectors", side, _array(collectors, bpf_types.Collector, bpf_types.MAX_COLLECTORS)
        )
        self._flip(generation)
        return generation

    def _write(self, name: str, side: int, content: bytes) -> None:
        start = side * self._side_bytes[name]
        if len(content) > self._side_bytes[name]:
            raise ValueError(
                f"table {name}: {len(content)} bytes, a side has {self._side_bytes[name]}"
            )
        self._memory[name][start : start + len(content)] = content

    def _flip(self, generation: int) -> None:
        if _STORES_ARE_ORDERED:
            self._generation.value = generation
        else:
            self._generation_map.update(bytes(4), struct.pack("=Q", generation))


def _array(
    entries: Mapping[int, ctypes.Structure], kind: type[ctypes.Structure], count: int
) -> bytes:
    """Elements by index, zeros between."""
    size = ctypes.sizeof(kind)
    content = bytearray(size * count)
    for index, entry in entries.items():
        content[index * size : (index + 1) * size] = bytes(entry)
    return bytes(content)


def _wait_for_readers() -> None:
    """Return when every program that runs now has ended: an RCU grace period (membarrier(2), MEMBARRIER_CMD_GLOBAL)."""
    if _LIBC.syscall(_MEMBARRIER, _MEMBARRIER_CMD_GLOBAL, 0, 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, "membarrier: cannot wait for running programs")
