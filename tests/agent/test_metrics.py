# SPDX-License-Identifier: Apache-2.0
"""Whatever the programs and the exporter count is a metric that says what it means."""

import dataclasses
import re

import pytest
from prometheus_client import core

from hostint_agent import bpf_types, loader, metrics
from tests.agent.snapshots import DATAPATH, NOW, WATCHLIST

FAMILIES = {family.name: family for family in metrics.families(NOW)}


def values(name: str) -> list[tuple[dict[str, str], float]]:
    return [(sample.labels, sample.value) for sample in FAMILIES[name].samples]


def counter(name: str) -> list[tuple[dict[str, str], float]]:
    assert isinstance(FAMILIES[name], core.CounterMetricFamily)
    return values(name)


@pytest.mark.parametrize("field", [name for name, *_ in bpf_types.WatchlistCounters._fields_])
def test_every_counter_of_a_watchlist_is_a_metric(field):
    assert counter(f"hostint_{field}") == [({"watchlist": "web"}, WATCHLIST[field])]


@pytest.mark.parametrize("field", [c.name.lower() for c in bpf_types.DatapathCounter])
def test_every_counter_of_the_datapath_is_a_metric(field):
    assert counter(f"hostint_{field}") == [({}, DATAPATH[field])]


def test_every_counter_of_the_exporter_is_a_metric():
    names = [name for name, *_ in bpf_types.ExportCounter._fields_]
    assert [counter(f"hostint_reports_{name}") for name in names] == [
        [({"collector": "default"}, 3002)],
        [({"collector": "default"}, 3003)],
    ]


def test_what_waits_in_every_ring_is_a_metric():
    assert values("hostint_ring_records") == [({"ring": "0"}, 3004), ({"ring": "1"}, 3005)]


def test_drops_by_reason_and_those_that_the_drop_program_did_not_see_are_metrics():
    assert counter("hostint_drops_by_reason") == [({"reason": "NO_SOCKET"}, 3000)]
    assert counter("hostint_drop_recursion_misses") == [({}, 3001)]


def test_drops_by_function_are_a_metric_with_their_reason():
    labels = {"function": "ip_error", "reason": "NOT_SPECIFIED"}
    assert counter("hostint_drops_by_function") == [(labels, 3011)]


def test_there_is_no_map_of_counters_but_those_whose_counters_are_compared_here():
    """What an older datapath had counted is in maps of its own, and part of the same counters."""
    maps = loader.read_source(loader.default_bpf_dir()).maps
    counted = {name.removeprefix("carried_") for name in maps if name.endswith("_counters")}
    compared = {"watchlist_counters", "datapath_counters", "drop_counters", "export_counters"}
    assert counted == compared


@pytest.mark.parametrize("name", FAMILIES)
def test_every_metric_says_what_it_is(name):
    words = FAMILIES[name].documentation
    assert re.fullmatch(r"[A-Z].{9,}[^.]", words), words
    assert [f.documentation for f in FAMILIES.values()].count(words) == 1


def test_no_family_is_there_twice_and_every_family_has_a_value():
    assert len(metrics.families(NOW)) == len(FAMILIES)
    assert all(family.samples for family in FAMILIES.values())


def test_no_number_of_a_snapshot_is_left_out():
    shown = {sample.value for family in FAMILIES.values() for sample in family.samples}
    assert shown >= {*WATCHLIST.values(), *DATAPATH.values(), *range(3000, 3012)}


def test_a_counter_that_is_read_while_cpus_count_is_never_below_zero():
    below = dataclasses.replace(NOW, watchlists={"web": WATCHLIST | {"unresolved": -1}})
    families = {family.name: family for family in metrics.families(below)}
    assert families["hostint_unresolved"].samples[0].value == 0
