# SPDX-License-Identifier: Apache-2.0
"""Write compiled tables to the side that no packet reads, and make it live with one store."""

import ctypes
import mmap
import platform
import struct
from collections.abc import Mapping
from concurrent import futures
from pathlib import Path

from hostint_agent import bpf_calls, bpf_types, classifier, classifier_sizes

# first element of side 1, in elements, by map; side 0 begins at 0
_SIDE_ELEMENTS = {
    "trie_roots": 256,
    "trie_chunks": classifier_sizes.NR_TRIE_CHUNKS,
    "gates6": 1024,
    "buckets6": classifier_sizes.NR_BUCKETS6,
    "port_roots": 2 * classifier_sizes.NR_PORT_GROUPS,
    "port_pages": classifier_sizes.NR_PORT_PAGES,
    "class_rows": classifier_sizes.NR_CLASSES,
    "class_words": classifier_sizes.NR_CLASS_WORDS,
    "classifier_rules": classifier_sizes.NR_RULES,
    "classifier_sides": 1,
    "policies": bpf_types.MAX_WATCHLISTS,
    "collectors": bpf_types.MAX_COLLECTORS,
}
_STORES_ARE_ORDERED = platform.machine() == "x86_64"

Policies = Mapping[int, bpf_types.Policy]
Collectors = Mapping[int, bpf_types.Collector]
Blocks = tuple[bytes, ...]


class Tables:
    """The two-sided tables of a loaded datapath.

    What was written to a side is remembered, and what is the same is not written again. A new process remembers nothing:
    its first commit to a side writes all that can be reached from there, and so it goes on where the last one stopped.
    """

    def __init__(self, maps: Path) -> None:
        """Open the pinned maps below `maps`. Raises bpf_calls.BpfError."""
        self._maps = {name: bpf_calls.Map.open(maps / name) for name in _SIDE_ELEMENTS}
        self._generation_map = bpf_calls.Map.open(maps / "classifier_generation")
        self._generation_memory = self._generation_map.memory()
        self._generation = ctypes.c_uint64.from_buffer(self._generation_memory)
        self._left_at = self.generation
        # by the last commit
        self.written_bytes = 0
        self._held: list[Mapping[str, Blocks]] = [{}, {}]
        # programs that run now may still read the side that is not live; nobody waits for them before there is need to
        self._background = futures.ThreadPoolExecutor(max_workers=1)
        self._readers_left = self._background.submit(bpf_calls.wait_for_programs)

    @property
    def generation(self) -> int:
        """How many commits there were; bit 0 is the live side."""
        return int(self._generation.value)

    def commit(self, image: classifier.Image, policies: Policies, collectors: Collectors) -> int:
        """Make rules, report settings and collectors live, all at once; the new generation.

        Shortly after the commit before, waits for the programs that may still read the other side.
        """
        if self.generation != self._left_at:
            # someone else wrote meanwhile
            self._held = [{}, {}]
            self._readers_left = self._background.submit(bpf_calls.wait_for_programs)
        generation = self.generation + 1
        side = generation & 1
        wanted = {
            **image.tables,
            "classifier_sides": (image.side_of(generation),),
            "policies": (_array(policies, bpf_types.Policy, bpf_types.MAX_WATCHLISTS),),
            "collectors": (_array(collectors, bpf_types.Collector, bpf_types.MAX_COLLECTORS),),
        }
        self._wait()
        # what fails half-way is written whole the next time
        held = self._held[side]
        self._held[side] = {}
        self.written_bytes = sum(
            self._write(name, side, blocks, held.get(name, ())) for name, blocks in wanted.items()
        )
        self._held[side] = wanted
        self._flip(generation)
        self._left_at = generation
        self._readers_left = self._background.submit(bpf_calls.wait_for_programs)
        return generation

    def _wait(self) -> None:
        """Return when no program reads the side that is not live. Raises OSError, and tries again the next time."""
        try:
            self._readers_left.result()
        except OSError:
            self._readers_left = self._background.submit(bpf_calls.wait_for_programs)
            raise

    def _write(self, name: str, side: int, blocks: Blocks, held: Blocks) -> int:
        """Write what differs from what the side holds; how many bytes that were."""
        table = self._maps[name]
        size = len(blocks[0]) if blocks else 0
        side_bytes = table.stride * _SIDE_ELEMENTS[name]
        if len(blocks) * size > side_bytes:
            raise ValueError(f"table {name}: {len(blocks) * size} bytes, a side has {side_bytes}")
        runs = _runs(blocks, held)
        if not runs:
            return 0
        start = side * side_bytes
        base = (start + runs[0].start * size) // mmap.PAGESIZE * mmap.PAGESIZE
        end = start + runs[-1].stop * size
        # mapped pages count as this process's memory: only these, and only now
        with mmap.mmap(table.fd, end - base, offset=base) as memory:
            for run in runs:
                at = start + run.start * size - base
                memory[at : at + len(run) * size] = b"".join(blocks[run.start : run.stop])
        return size * sum(len(run) for run in runs)

    def _flip(self, generation: int) -> None:
        if _STORES_ARE_ORDERED:
            self._generation.value = generation
        else:
            self._generation_map.update(bytes(4), struct.pack("=Q", generation))


def _runs(blocks: Blocks, held: Blocks) -> list[range]:
    """Runs of blocks that are not as they are held."""
    if blocks is held:
        return []
    pairs = zip(blocks, held, strict=False)
    changed = [number for number, (block, old) in enumerate(pairs) if block != old]
    changed += range(len(held), len(blocks))
    runs: list[range] = []
    for number in changed:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def _array(
    entries: Mapping[int, ctypes.Structure], kind: type[ctypes.Structure], count: int
) -> bytes:
    """Elements by index, zeros between."""
    size = ctypes.sizeof(kind)
    content = bytearray(size * count)
    for index, entry in entries.items():
        content[index * size : (index + 1) * size] = bytes(entry)
    return bytes(content)
