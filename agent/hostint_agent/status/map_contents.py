# SPDX-License-Identifier: Apache-2.0
"""What is in the maps of a loaded datapath, read for people: the live side of the tables, and the flows."""

import collections
import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hostint_agent import bpf_calls, bpf_types

_FLOW_WORDS = ctypes.sizeof(bpf_types.Flow) // 8

T = TypeVar("T", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class Live:
    """What the programs judge by now. `policies` and `collectors` by place, `rules` by place of their watchlist."""

    generation: int
    policies: Mapping[int, bpf_types.Policy]
    collectors: Mapping[int, bpf_types.Collector]
    rules: Mapping[int, int]


def live(maps: Path) -> Live:
    """All of one generation. Raises bpf_calls.BpfError."""
    word = bpf_calls.Map.open(maps / "classifier_generation")
    while True:
        read = word.lookup(bytes(4))
        generation = struct.unpack("=Q", read)[0]
        side = generation & 1
        policies = _side(maps / "policies", side, bpf_types.Policy)
        collectors = _side(maps / "collectors", side, bpf_types.Collector)
        verdicts = _side(maps / "classifier_rules", side, bpf_types.Verdict)
        rules = collections.Counter(verdict.watchlist for verdict in verdicts.values())
        # else this side may be the one that is being written by now
        if word.lookup(bytes(4)) == read:
            return Live(generation, policies, collectors, rules)


def _side(path: Path, side: int, kind: type[T]) -> dict[int, T]:
    """The elements of one half of a map that are not all zero, by index."""
    data = bpf_calls.Map.open(path).values()
    half, size = len(data) // 2, ctypes.sizeof(kind)
    begin, found = side * half, {}
    for index in range(half // size):
        element = data[begin + index * size : begin + (index + 1) * size]
        if element.strip(b"\0"):
            found[index] = kind.from_buffer_copy(element)
    return found


def flows(maps: Path) -> int:
    """Flows, and flows with a drop, that the table remembers. Raises bpf_calls.BpfError."""
    words = memoryview(bpf_calls.Map.open(maps / "flows").values()).cast("Q")
    return sum(map(bool, words[::_FLOW_WORDS].tolist()))
