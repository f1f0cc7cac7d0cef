# SPDX-License-Identifier: Apache-2.0
"""The classifier in the kernel says of every packet what a plain walk over the rules says."""

import ipaddress
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, bpf_types, classifier, loader, tables
from tests.agent import reference_classifier

pytestmark = pytest.mark.bpf
# HOSTINT_FUZZ_CASES=1000000 for a long run
CASES = int(os.environ.get("HOSTINT_FUZZ_CASES", "24000"))
RULES_PER_LIST = (1, 3, 20, 70, 200)
PACKETS_PER_LIST = 400
MAY_MATCH_LATER = 0xFFFFFFFE


class Probe:
    """The classifier loaded with a program that returns what it says."""

    def __init__(self, directory: Path) -> None:
        self.tables = tables.Tables(directory / "maps")
        self._program = bpf_calls.obj_get(directory / "programs" / "ingress")

    def commit(self, rules: list[classifier.Rule]) -> None:
        self.tables.commit(classifier.compile_rules(rules), {}, {})

    def raw(self, packet: reference_classifier.Packet) -> int:
        return bpf_calls.test_run(self._program, packet.frame())[0] & 0xFFFFFFFF

    def rule_of(self, packet: reference_classifier.Packet) -> int:
        verdict = self.raw(packet)
        return 0 if verdict == MAY_MATCH_LATER else verdict


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    sources = tmp_path_factory.mktemp("bpf") / "bpf"
    shutil.copytree(loader.default_bpf_dir(), sources)
    shutil.copy(Path(__file__).with_name("classifier_probe.c"), sources / loader.MAIN_SOURCE)
    pins = Path(f"/sys/fs/bpf/hostint-test-{os.getpid()}-classifier")
    pins.mkdir()
    try:
        yield Probe(loader.load(pins, sources))
    finally:
        shutil.rmtree(pins)


def rule(rule_id: int, **fields) -> classifier.Rule:
    return classifier.Rule(rule_id, 1, bpf_types.RuleAction.REPORT, **fields)


def packet(source: str, destination: str, protocol=6, sport=1234, dport=80):
    return reference_classifier.Packet(
        ipaddress.ip_address(source), ipaddress.ip_address(destination), protocol, sport, dport
    )


def nets(*texts: str) -> tuple[classifier.Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


def test_random_packets_get_the_verdict_of_a_plain_walk(probe):
    compared, seed = 0, 0
    while compared < CASES:
        world = reference_classifier.World(seed)
        rules = world.rules(RULES_PER_LIST[seed % len(RULES_PER_LIST)])
        probe.commit(rules)
        for _ in range(PACKETS_PER_LIST):
            sent = world.packet(rules)
            expected = reference_classifier.classify(rules, sent)
            # twice: found by intersection, then in the cache
            assert [probe.rule_of(sent), probe.rule_of(sent)] == [expected] * 2, (seed, sent)
            compared += 1
        seed += 1


def test_the_first_rule_that_matches_wins(probe):
    probe.commit([rule(7, sources=nets("10.0.0.0/24")), rule(8, sources=nets("10.0.0.0/8"))])
    assert probe.rule_of(packet("10.0.0.1", "10.9.9.9")) == 7
    assert probe.rule_of(packet("10.0.1.1", "10.9.9.9")) == 8


def test_no_rules_match_nothing(probe):
    probe.commit([])
    assert probe.raw(packet("10.0.0.1", "10.9.9.9")) == 0


def test_a_packet_of_which_one_side_is_watched_may_match_after_nat(probe):
    probe.commit([rule(1, sources=nets("10.0.0.0/24"), destinations=nets("10.1.0.0/24"))])
    assert probe.raw(packet("10.0.0.1", "10.96.0.1")) == MAY_MATCH_LATER
    assert probe.raw(packet("10.96.0.1", "10.1.0.1")) == MAY_MATCH_LATER
    assert probe.raw(packet("10.96.0.1", "10.97.0.1")) == 0


def test_rules_beyond_the_limit_are_refused_with_both_numbers():
    many = [rule(number + 1) for number in range(classifier.NR_RULES + 1)]
    with pytest.raises(classifier.LimitExceeded, match=r"16385 needed, at most 16384 are possible"):
        classifier.compile_rules(many)


def test_ten_thousand_rules_compile_within_seconds(probe):
    many = [
        rule(
            number + 1,
            protocol=6,
            sources=nets(f"10.{number % 100}.{number // 100}.0/24"),
            destinations=nets(f"10.96.{number % 200}.0/24"),
            destination_ports=((80 + number % 50, 80 + number % 50),),
        )
        for number in range(10_000)
    ]
    started = time.monotonic()
    probe.commit(many)
    assert time.monotonic() - started < 20
    assert probe.rule_of(packet("10.99.99.1", "10.96.199.1", dport=129)) == 10_000


def test_a_flip_under_load_shows_old_rules_or_new_ones_never_a_mix(probe):
    """Two lists that disagree on everything: whatever a packet sees must be the verdict of one of them."""
    both = nets("10.0.0.0/16", "fd00::/16")
    lists = [
        [rule(1, sources=both, destinations=nets("10.1.0.0/16"), protocol=6)],
        [rule(2, sources=nets("10.0.0.0/8"), destinations=both + nets("10.1.0.0/24"))],
    ]
    sent = packet("10.0.0.1", "10.1.0.1")
    seen: set[int] = set()
    stop = threading.Event()
    probe.commit(lists[0])

    def look() -> None:
        while not stop.is_set():
            seen.add(probe.raw(sent))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for number in range(60):
            probe.commit(lists[number % 2])
    finally:
        stop.set()
        watcher.join()
    assert seen == {1, 2}
