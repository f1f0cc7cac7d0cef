# SPDX-License-Identifier: Apache-2.0
"""A commit exchanges all tables in one moment, writes what changed and no more, and holds no memory when it is done."""

import dataclasses
import ipaddress
import os
import random
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, bpf_types, classifier, tables
from tests.agent import classifier_probe, reference_classifier
from tests.agent.classifier_probe import rule

pytestmark = pytest.mark.bpf
LISTS = range(1, 8)
COMMITS = 150
VERDICTS = 20_000_000
# of flip_probe.c
PACKETS = 4096
OF_NO_LIST, NO_MATCH, COUNTED = 0, 8, 9
DEADLINE_S = 120


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    with classifier_probe.loaded("classifier_probe.c", tmp_path_factory.mktemp("tables")) as pinned:
        yield classifier_probe.Probe(pinned)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return reference_classifier.Walk(tmp_path_factory.mktemp("walk"))


@pytest.fixture
def judge(probe, walk):
    return classifier_probe.Judge(probe, walk)


@pytest.fixture(scope="module")
def load(tmp_path_factory, walk):
    with classifier_probe.loaded("flip_probe.c", tmp_path_factory.mktemp("flip")) as pinned:
        yield Load(pinned, walk)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Load:
    """Lists of rules that disagree, packets, and what every list says of every packet; two CPUs that judge them without end."""

    def __init__(self, directory: Path, walk: reference_classifier.Walk) -> None:
        self.maps = directory / "maps"
        self._programs = [
            bpf_calls.obj_get(directory / "programs" / name) for name in ("ingress", "egress")
        ]
        self._seen = bpf_calls.Map.open(self.maps / "flip_seen")
        self._stop = threading.Event()
        self._cpus: list[threading.Thread] = []
        worlds = [reference_classifier.World(seed) for seed in LISTS]
        # four lists that have nothing in common, and three that follow the last of them with a few edits each
        self.lists = {number: worlds[number - 1].rules(40 * number) for number in LISTS[:4]}
        for number in LISTS[4:]:
            self.lists[number] = worlds[3].edited(self.lists[number - 1])
        flats = {number: reference_classifier.Flat(rules) for number, rules in self.lists.items()}
        share = PACKETS // 4
        packets = reference_classifier.Packets(PACKETS)
        packets.content[:] = b"".join(
            walk.make_packets(flats[number], share, number).content for number in LISTS[:4]
        )
        classifier_probe.memory_of(self.maps, "flip_packets")[: len(packets.content)] = bytes(
            packets.content
        )
        expected = classifier_probe.memory_of(self.maps, "flip_expected")
        for number, flat in flats.items():
            said = memoryview(bytearray(walk.classify(flat, packets))).cast("Q")
            matched = [
                0 if verdict == classifier_probe.MAY_MATCH_LATER else verdict for verdict in said
            ]
            size = 8 * PACKETS
            expected[number * size : (number + 1) * size] = struct.pack(f"={PACKETS}Q", *matched)

    def seen(self) -> list[int]:
        """How often each list spoke; first what belonged to none, last that no rule matched."""
        keys = (struct.pack("=I", number) for number in range(COUNTED))
        return [sum(memoryview(self._seen.lookup(key)).cast("Q")) for key in keys]

    def commit(self, writer: tables.Tables, compiler: classifier.Compiler, number: int) -> None:
        """Rules, settings and collectors of a list, all of which bear its number."""
        policy = bpf_types.Policy(interval_ns=number, collector=number)
        writer.commit(
            compiler.compile(self.lists[number]),
            dict.fromkeys(range(bpf_types.MAX_WATCHLISTS), policy),
            {number: bpf_types.Collector(reports_per_second=number)},
        )

    def __enter__(self) -> "Load":
        self._stop.clear()
        cpus = sorted(os.sched_getaffinity(0))[:2]
        self._cpus = [threading.Thread(target=self._judge, args=(cpu,)) for cpu in cpus]
        for cpu in self._cpus:
            cpu.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for cpu in self._cpus:
            cpu.join()

    def _judge(self, cpu: int) -> None:
        os.sched_setaffinity(threading.get_native_id(), [cpu])
        while not self._stop.is_set():
            # with the verdict cache, and without
            for program in self._programs:
                bpf_calls.test_run(program, bytes(64), repeat=50_000)


def test_under_load_every_verdict_is_of_the_old_list_or_of_the_new_one(load):
    """And once programs that began before the flip have ended, of the new one alone."""
    writer, compiler, pick = tables.Tables(load.maps), classifier.Compiler(), random.Random(1)
    number, commits = 1, 0
    load.commit(writer, compiler, number)
    before = load.seen()
    with load:
        started = time.monotonic()
        while commits < COMMITS or sum(load.seen()) - sum(before) < VERDICTS:
            assert time.monotonic() < started + DEADLINE_S
            # half of the time a neighbour, which is a small change
            near = [n for n in (number - 1, number + 1) if n in LISTS[3:]]
            others = near if near and pick.random() < 0.7 else [n for n in LISTS if n != number]
            number = pick.choice(others)
            load.commit(writer, compiler, number)
            commits += 1
            bpf_calls.wait_for_programs()
            live = load.seen()
            eventually(lambda: load.seen()[number] > live[number] + 1000)  # noqa: B023
            now = load.seen()
            assert [n for n in LISTS if now[n] != live[n]] == [number]
    after = load.seen()
    assert after[OF_NO_LIST] == before[OF_NO_LIST]
    assert min(after[n] - before[n] for n in LISTS) > 1000


class WritesTheLiveSide(tables.Tables):
    """What the two sides are there for: this one writes where packets look."""

    def _write(self, name: str, side: int, *blocks: tables.Blocks) -> int:
        return super()._write(name, side ^ 1, *blocks)

    def _flip(self, generation: int) -> None:
        """Nothing to do: what was written is live already."""


def test_the_same_load_sees_a_mix_when_the_live_side_is_written(load):
    """The control: what the test above asserts is not true of any writer."""
    writer, compiler, pick = WritesTheLiveSide(load.maps), classifier.Compiler(), random.Random(1)
    before = load.seen()[OF_NO_LIST]

    def mixed_after_a_commit() -> bool:
        load.commit(writer, compiler, pick.choice(LISTS))
        return load.seen()[OF_NO_LIST] > before

    with load:
        eventually(mixed_after_a_commit)


def many_rules(count: int = 10_000) -> list[classifier.Rule]:
    def net(text: str) -> tuple[classifier.Network]:
        return (ipaddress.ip_network(text),)

    return [
        rule(
            number + 1,
            protocol=6,
            sources=net(f"10.{number % 100}.{number // 100}.0/24"),
            destinations=net(f"10.96.{number % 200}.0/24"),
            destination_ports=((80 + number % 50, 80 + number % 50),),
        )
        for number in range(count)
    ]


def with_other_source(rules: list[classifier.Rule], index: int, text: str) -> list[classifier.Rule]:
    changed = dataclasses.replace(rules[index], sources=(ipaddress.ip_network(text),))
    return [*rules[:index], changed, *rules[index + 1 :]]


def test_a_change_of_one_cidr_writes_kilobytes(probe, judge):
    compiler, rules = classifier.Compiler(), many_rules()
    # whole on either side, and nothing then but the generation
    for _ in range(3):
        probe.tables.commit(compiler.compile(rules), {}, {})
    assert probe.tables.written_bytes < 1024
    # twice: a side is always one change behind
    for number, text in enumerate(("10.200.3.0/24", "10.201.0.0/16", "192.0.2.1/32")):
        rules = with_other_source(rules, 4000 + number, text)
        probe.tables.commit(compiler.compile(rules), {}, {})
        assert 0 < probe.tables.written_bytes < 50_000
        judge.judge(rules, number, 2500)


def test_a_new_process_goes_on_where_the_last_one_stopped(probe, judge):
    worlds = [reference_classifier.World(seed) for seed in range(3)]
    for seed, world in enumerate(worlds):
        writer, compiler = tables.Tables(probe.maps), classifier.Compiler()
        rules = world.rules(100)
        for version in range(5):
            writer.commit(compiler.compile(rules), {}, {})
            judge.judge(rules, 10 * seed + version, 2500)
            rules = world.edited(rules)


def test_a_writer_notices_that_another_one_wrote(probe, judge):
    writers = [(tables.Tables(probe.maps), classifier.Compiler()) for _ in range(2)]
    world = reference_classifier.World(5)
    rules = world.rules(100)
    for seed, pick in enumerate((0, 0, 1, 0, 1, 1, 1, 0, 0, 0)):
        writer, compiler = writers[pick]
        writer.commit(compiler.compile(rules), {}, {})
        judge.judge(rules, seed, 2500)
        rules = world.edited(rules)


class Failing(tables.Tables):
    """Fails at one table of a commit."""

    failing = ""

    def _write(self, name: str, side: int, *blocks: tables.Blocks) -> int:
        if name == self.failing:
            raise OSError("no memory to map")
        return super()._write(name, side, *blocks)


def test_a_commit_that_fails_leaves_the_old_rules_and_the_next_one_mends_it(probe, judge):
    writer, compiler, world = (
        Failing(probe.maps),
        classifier.Compiler(),
        reference_classifier.World(9),
    )
    rules = world.rules(100)
    writer.commit(compiler.compile(rules), {}, {})
    for seed, name in enumerate(("trie_roots", "class_words", "classifier_sides", "collectors")):
        edited = world.edited(rules)
        writer.failing = name
        with pytest.raises(OSError, match="no memory to map"):
            writer.commit(compiler.compile(edited), {}, {})
        judge.judge(rules, seed, 2500)
        writer.failing = ""
        writer.commit(compiler.compile(edited), {}, {})
        judge.judge(edited, seed, 2500)
        rules = edited


def test_bank_written_in_part_is_written_whole_next(probe, judge):
    """Also where the next rules are those that the bank held before."""
    writer, compiler = Failing(probe.maps), classifier.Compiler()
    world = reference_classifier.World(10)
    one, other, failing = (world.rules(100) for _ in range(3))
    images = [compiler.compile(rules) for rules in (one, other, failing)]
    writer.commit(images[0], {}, {})
    writer.commit(images[1], {}, {})
    writer.failing = "collectors"  # the last table of a commit
    with pytest.raises(OSError, match="no memory to map"):
        writer.commit(images[2], {}, {})
    writer.failing = ""
    writer.commit(images[0], {}, {})
    judge.judge(one, 10, 2500)


def mapped_bytes() -> int:
    """Memory of BPF maps in this process."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "bpf-map" in line:
            first, end = (int(text, 16) for text in line.split()[0].split("-"))
            total += end - first
    return total


def test_between_commits_one_page_of_the_maps_is_mapped(probe):
    before = mapped_bytes()
    writer = tables.Tables(probe.maps)
    for _ in range(2):
        writer.commit(classifier.compile_rules(many_rules()), {}, {})
    assert mapped_bytes() - before <= os.sysconf("SC_PAGESIZE")


def test_tables_larger_than_a_side_are_refused_and_nothing_is_live(probe):
    image = classifier.compile_rules([rule(1)])
    too_many = image.tables["classifier_rules"] * 2
    generation = probe.tables.generation
    with pytest.raises(ValueError, match="table classifier_rules: 262144 bytes, a side has 131072"):
        probe.tables.commit(
            dataclasses.replace(image, tables={**image.tables, "classifier_rules": too_many}),
            {},
            {},
        )
    assert probe.tables.generation == generation


def test_a_wait_that_failed_is_made_again(probe, judge, monkeypatch):
    outcomes = [OSError(12, "no memory"), None]

    def wait() -> None:
        outcome = outcomes.pop(0) if outcomes else None
        if outcome:
            raise outcome

    monkeypatch.setattr(bpf_calls, "wait_for_programs", wait)
    writer = tables.Tables(probe.maps)
    rules = reference_classifier.World(4).rules(20)
    image = classifier.compile_rules(rules)
    with pytest.raises(OSError, match="no memory"):
        writer.commit(image, {}, {})
    assert len(outcomes) < 2
    writer.commit(image, {}, {})
    judge.judge(rules, 4, 2500)


def test_nothing_is_written_before_programs_that_began_before_the_flip_have_ended(
    probe, monkeypatch
):
    """And the commit itself does not wait for them."""
    ended = threading.Semaphore(0)
    waits: list[str] = []

    def wait() -> None:
        waits.append("began")
        assert ended.acquire(timeout=DEADLINE_S)

    monkeypatch.setattr(bpf_calls, "wait_for_programs", wait)
    writer = tables.Tables(probe.maps)
    memory = classifier_probe.memory_of(probe.maps, "classifier_rules")
    images = [classifier.compile_rules([rule(number)]) for number in (1001, 1002)]
    for image in images:
        content = memory[:]
        commit = threading.Thread(target=writer.commit, args=(image, {}, {}))
        commit.start()
        eventually(lambda: waits == ["began"])
        commit.join(0.05)
        assert commit.is_alive()
        assert memory[:] == content
        waits.clear()
        ended.release()
        commit.join(DEADLINE_S)
        assert not commit.is_alive()
        assert memory[:] != content
    ended.release()
