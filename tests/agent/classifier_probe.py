# SPDX-License-Identifier: Apache-2.0
"""The classifier in the kernel with a main program of the tests in place of the datapath's."""

import contextlib
import mmap
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from hostint_agent import bpf_calls, bpf_types, classifier, loader, tables
from tests.agent import reference_classifier
from tests.pins import pin_directory

MAY_MATCH_LATER = reference_classifier.MAY_MATCH_LATER


@contextlib.contextmanager
def loaded(program: str, directory: Path) -> Iterator[Path]:
    """The classifier with this main program, pinned until left."""
    sources = directory / "bpf"
    shutil.copytree(loader.default_bpf_dir(), sources)
    shutil.copy(Path(__file__).with_name(program), sources / loader.MAIN_SOURCE)
    with pin_directory("classifier") as pins:
        yield loader.load(pins, sources)


def memory_of(maps: Path, name: str) -> mmap.mmap:
    """The memory of a pinned map."""
    opened = bpf_calls.Map.open(maps / name)
    memory = opened.memory()
    opened.close()
    return memory


def rule(rule_id: int, **fields) -> classifier.Rule:
    """A rule that reports to watchlist 1."""
    return classifier.Rule(rule_id, 1, bpf_types.RuleAction.REPORT, **fields)


class Probe:
    """classifier_probe.c."""

    def __init__(self, directory: Path) -> None:
        self.maps = directory / "maps"
        self.tables = tables.Tables(self.maps)
        self._one = bpf_calls.obj_get(directory / "programs" / "ingress")
        self._many = bpf_calls.obj_get(directory / "programs" / "egress")
        self._packets = memory_of(self.maps, "probe_packets")
        self._next = memory_of(self.maps, "probe_next")
        self._results = memory_of(self.maps, "probe_results")

    def commit(self, rules: Sequence[classifier.Rule]) -> None:
        self.tables.commit(classifier.compile_rules(rules), {}, {})

    def raw(self, packet: reference_classifier.Packet) -> int:
        """What is said of a frame: the id of the rule, or MAY_MATCH_LATER, or 0."""
        return bpf_calls.test_run(self._one, packet.frame())[0] & 0xFFFFFFFF

    def rule_of(self, packet: reference_classifier.Packet) -> int:
        """The id of the rule that takes a frame, or 0."""
        verdict = self.raw(packet)
        return 0 if verdict == MAY_MATCH_LATER else verdict

    def classify(self, packets: reference_classifier.Packets) -> tuple[bytes, bytes]:
        """A verdict a packet: (with the verdict cache, without)."""
        half = len(self._results) // 2
        self._packets[: len(packets.content)] = bytes(packets.content)
        self._results[:] = b"\xff" * 2 * half
        self._next[:8] = bytes(8)
        bpf_calls.test_run(self._many, bytes(64), repeat=len(packets))
        size = 8 * len(packets)
        return self._results[:size], self._results[half : half + size]


class Judge:
    """Compares what the kernel says of packets close to the rules with what a plain walk says."""

    def __init__(self, probe: Probe, walk: reference_classifier.Walk) -> None:
        self._probe = probe
        self._walk = walk
        self.compared = 0
        self.matched = 0

    def judge(self, rules: Sequence[classifier.Rule], seed: int, count: int) -> None:
        """Any difference is a failed assertion that names the first packet of it."""
        flat = reference_classifier.Flat(rules)
        packets = self._walk.make_packets(flat, count, seed)
        expected = self._walk.classify(flat, packets)
        # a second time: what was found by intersection comes from the verdict cache then
        for said in (*self._probe.classify(packets), *self._probe.classify(packets)):
            assert said == expected, _first_difference(rules, seed, packets, said, expected)
        self.compared += count
        self.matched += sum(number not in (0, MAY_MATCH_LATER) for number in numbers(expected))

    def judge_slowly(self, rules: Sequence[classifier.Rule], seed: int, count: int) -> None:
        """The walk in C against the one in Python, and frames on the wire against both."""
        flat = reference_classifier.Flat(rules)
        packets = self._walk.make_packets(flat, count, seed)
        expected = numbers(self._walk.classify(flat, packets))
        for index in range(count):
            packet = packets[index]
            assert reference_classifier.classify(rules, packet) == expected[index], (seed, packet)
            assert self._probe.raw(packet) == expected[index] & 0xFFFFFFFF, (seed, packet)


def numbers(verdicts: bytes) -> list[int]:
    """Verdicts as numbers."""
    return list(memoryview(verdicts).cast("Q"))


def _first_difference(rules, seed: int, packets, said: bytes, expected: bytes) -> str:
    pairs = zip(numbers(said), numbers(expected), strict=True)
    index, (got, wanted) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
    truth = reference_classifier.classify(rules, packets[index])
    return f"seed {seed}: {packets[index]}: {got:#x}, not {wanted:#x} (in Python {truth:#x})"
