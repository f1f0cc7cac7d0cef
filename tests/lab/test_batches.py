# SPDX-License-Identifier: Apache-2.0
"""Packets that a device hands over in batches are all in the node at once, and every one of them keeps its slot."""

import shutil

import pytest

from hostint_agent import classifier, loader
from tests.bench import measure, rule_sets
from tests.bench.generator import traffic
from tests.bench.node import NO_NEWS, WATCHLIST, node

pytestmark = pytest.mark.lab
PACKETS = 1_000_000
RUN = 50_000


@pytest.fixture
def one_first_slot(tmp_path, monkeypatch):
    """The programs with the same first slot for every packet: all of a batch but one need their second."""
    sources = tmp_path / "bpf"
    shutil.copytree(loader.default_bpf_dir(), sources)
    text = (sources / "slot.h").read_text()
    patched = text.replace("number ^ (number >> 16)", "0")
    assert patched != text
    (sources / "slot.h").write_text(patched)
    monkeypatch.setenv("HOSTINT_BPF_DIR", str(sources))


def unresolved_share(packets: int) -> float:
    """Watched packets of batches that lost their slot before they left."""
    rules = rule_sets.pods_and_services(64)
    variant = measure.Variant(
        "watched",
        traffic(rule_sets.watched(rules, 16)),
        image=classifier.compile_rules(rules),
        policy=NO_NEWS,
        outcome=measure.ANY,
    )
    with node() as made:
        measure.make_ready(made, variant)
        before = made.datapath.counters.watchlist(WATCHLIST)
        for _ in range(packets // RUN):
            made.run(RUN)
        found = made.datapath.identity(WATCHLIST)
    assert found.watched_difference == 0, found
    assert found.counters["watched"] - before["watched"] == packets
    return (found.counters["unresolved"] - before["unresolved"]) / packets


def test_no_packet_of_a_batch_loses_its_slot():
    assert unresolved_share(PACKETS) <= 1e-4


def test_packets_that_share_their_first_slot_have_another_to_go_to(one_first_slot):
    """Those who meet again in the second are one in a thousand, if the addresses are like random ones."""
    assert unresolved_share(200_000) <= 0.01
