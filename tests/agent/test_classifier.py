# SPDX-License-Identifier: Apache-2.0
"""The classifier in the kernel says of every packet what a plain walk over the rules says, however the rules came about."""

import ipaddress
import os

import pytest

from hostint_agent import address_tables, classifier, classifier_sizes
from tests.agent import classifier_probe, reference_classifier
from tests.agent.classifier_probe import MAY_MATCH_LATER, rule

pytestmark = pytest.mark.bpf
# (rules, packet) of a test; HOSTINT_FUZZ_CASES=50000000 for a long run
CASES = int(os.environ.get("HOSTINT_FUZZ_CASES", "1000000"))
# of a list, and of every tenth list: frames on the wire, and shown to the walk in Python
PACKETS, FRAMES = 2500, 500
SIZES = (1, 2, 3, 10, 20, 70, 200)
VERSIONS = 100


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    with classifier_probe.loaded("classifier_probe.c", tmp_path_factory.mktemp("probe")) as pinned:
        yield classifier_probe.Probe(pinned)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return reference_classifier.Walk(tmp_path_factory.mktemp("walk"))


@pytest.fixture
def judge(probe, walk):
    return classifier_probe.Judge(probe, walk)


def packet(source: str, destination: str, protocol=6, sport=1234, dport=80):
    return reference_classifier.Packet(
        ipaddress.ip_address(source), ipaddress.ip_address(destination), protocol, sport, dport
    )


def nets(*texts: str) -> tuple[classifier.Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


def test_random_packets_get_the_verdict_of_a_plain_walk(probe, judge):
    seed = 0
    while judge.compared < CASES:
        rules = reference_classifier.World(seed).rules(SIZES[seed % len(SIZES)])
        probe.commit(rules)
        judge.judge(rules, seed, PACKETS)
        if seed % 10 == 0:
            judge.judge_slowly(rules, seed, FRAMES)
        seed += 1
    assert judge.matched > judge.compared // 5


@pytest.mark.parametrize("count", [1000, 4000, classifier.NR_RULES])
def test_long_lists_get_the_verdict_of_a_plain_walk(probe, judge, count):
    rules = reference_classifier.World(count).rules(count)
    probe.commit(rules)
    judge.judge(rules, count, 8192)
    judge.judge_slowly(rules, count, 50)
    assert judge.matched > judge.compared // 5


def test_after_any_edits_packets_get_the_verdict_of_a_plain_walk(probe, judge):
    """One compiler and one writer of tables follow each list through a hundred versions."""
    seed = 0
    while judge.compared < CASES:
        world = reference_classifier.World(seed)
        compiler = classifier.Compiler()
        rules = world.rules((5, 40, 300, 1500)[seed % 4])
        for version in range(VERSIONS):
            probe.tables.commit(compiler.compile(rules), {}, {})
            judge.judge(rules, seed * VERSIONS + version, PACKETS)
            rules = world.edited(rules)
        seed += 1
    assert judge.matched > judge.compared // 5


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


def test_a_rule_of_default_routes_takes_every_address_of_its_family(probe):
    probe.commit([rule(1, sources=nets("0.0.0.0/0")), rule(2, destinations=nets("::/0"))])
    assert probe.rule_of(packet("203.0.113.9", "255.255.255.255")) == 1
    assert probe.rule_of(packet("::", "ffff::ffff")) == 2


def colliding(count: int) -> list[str]:
    """Addresses whose prefixes begin in the same bucket of the IPv6 hash."""
    found: dict[int, list[str]] = {}
    for number in range(1 << 20):
        address = ipaddress.IPv6Address((0xFD00 << 112) + number)
        home = address_tables.hash_prefix6(int(address) >> 64, number, 128)
        same = found.setdefault(home % classifier_sizes.NR_BUCKETS6, [])
        same.append(str(address))
        if len(same) == count:
            return same
    raise AssertionError("no such addresses")


def test_ipv6_prefixes_that_share_a_bucket_are_all_found_whichever_come_and_go(probe):
    addresses = colliding(2 * classifier_sizes.MAX_PROBES6)
    rules = [rule(n, sources=nets(address)) for n, address in enumerate(addresses, start=1)]
    compiler = classifier.Compiler()
    for kept in (rules, rules[3:], rules[3:6], rules, rules[:1] + rules[7:], rules):
        # something of another bucket, so that the hash is never begun anew
        probe.tables.commit(compiler.compile([rule(99, sources=nets("fd99::/64")), *kept]), {}, {})
        said = [probe.rule_of(packet(address, "fd00::")) for address in addresses]
        assert said == [r.rule_id if r in kept else 0 for r in rules]
