# SPDX-License-Identifier: Apache-2.0
"""A node's spec means these rules, in this order, and names keep their places."""

import pytest

from hostint_agent import bpf_types, classifier, node_rules
from hostint_api import NodeConfigSpec

COLLECTOR = {
    "name": "default",
    "address": "192.0.2.9",
    "port": 32766,
    "format": "TelemetryReportV05",
    "snapLength": 128,
    "dscp": 8,
    "reportsPerSecond": 500,
}
WATCHLIST = {
    "name": "shop",
    "generation": 4,
    "collector": "default",
    "events": ["Flow", "Queue"],
    "intervalNs": 10**9,
    "latencyChangeNs": 0,
    "congestionLatencyNs": 10**6,
    "sample": 8,
}
RULE = {
    "id": 77,
    "watchlist": "shop",
    "name": "web",
    "action": "Report",
    "protocol": "TCP",
    "source": {"cidrs": ["10.0.0.0/8"]},
    "destination": {
        "cidrs": ["192.0.2.0/24"],
        "ports": [{"port": 80}, {"port": 90, "endPort": 99}],
    },
    "bidirectional": True,
}


def spec(**changes) -> NodeConfigSpec:
    whole = {"nodeID": 1, "collectors": [COLLECTOR], "watchlists": [WATCHLIST], "rules": [RULE]}
    return NodeConfigSpec.model_validate(whole | changes)


def test_reports_to_collectors_of_any_node_are_ignored_first():
    built = node_rules.build(spec(ignored=[{"address": "2001:db8::1", "port": 5000}]))
    ignored = [rule for rule in built.rules if rule.action == bpf_types.RuleAction.IGNORE]
    assert list(built.rules[:2]) == ignored
    told = {(str(r.destinations[0]), r.destination_ports) for r in ignored}
    assert told == {
        ("2001:db8::1/128", ((5000, 5000),)),
        ("192.0.2.9/32", ((32766, 32766),)),
    }
    assert {rule.protocol for rule in ignored} == {17}


def test_a_bidirectional_rule_is_two_rules_with_one_id():
    _, there, back = node_rules.build(spec()).rules
    assert there.rule_id == back.rule_id == 77
    assert (there.sources, there.destinations) == (back.destinations, back.sources)
    assert there.destination_ports == back.source_ports == ((80, 80), (90, 99))
    assert there.source_ports == back.destination_ports == ()


def test_report_settings_become_the_policy_of_the_watchlist():
    built = node_rules.build(spec())
    place = built.watchlist_indexes.names["shop"]
    policy = built.policies[place]
    assert place >= 1
    assert (policy.interval_ns, policy.latency_change_ns) == (10**9, 0)
    assert (policy.congestion_latency_ns, policy.sample) == (10**6, 8)
    assert policy.events == bpf_types.ReportEvent.FLOW | bpf_types.ReportEvent.QUEUE
    assert built.rules[-1].watchlist == place


def test_a_collector_becomes_a_destination_and_its_settings():
    built = node_rules.build(spec())
    place = built.collector_indexes.names["default"]
    assert built.destinations[place] == node_rules.Destination("default", "192.0.2.9", 32766, 8)
    assert built.collectors[place].reports_per_second == 500
    assert built.collectors[place].snap_length == 128


def test_a_watchlist_whose_collector_is_missing_has_no_rules():
    built = node_rules.build(spec(collectors=[]))
    assert built.rules == ()
    assert built.policies == {}


def test_names_keep_their_places_while_others_come_and_go():
    first = node_rules.Indexes().follow(["b", "d"], 1, 256)
    second = first.follow(["a", "b", "c", "d"], 1, 256)
    assert {name: second.names[name] for name in "bd"} == first.names
    assert len(set(second.names.values())) == 4
    third = second.follow(["c", "d", "e"], 1, 256)
    assert {name: third.names[name] for name in "cd"} == {n: second.names[n] for n in "cd"}
    assert third.names["e"] not in second.names.values()


def test_a_place_that_became_free_is_the_last_to_be_used_again():
    indexes = node_rules.Indexes().follow(["old"], 0, 3)
    place = indexes.names["old"]
    indexes = indexes.follow(["one", "two"], 0, 3)
    assert place not in indexes.names.values()
    indexes = indexes.follow(["one", "two", "three"], 0, 3)
    assert indexes.names["three"] == place


def test_index_that_became_free_last_is_used_last():
    """One that was never used is first, then the one that has been free for longest."""
    indexes = node_rules.Indexes().follow(["a"], 0, 5)
    places = [indexes.names["a"]]
    for name in "bcd":
        indexes = indexes.follow([name], 0, 5)
        places.append(indexes.names[name])
    assert len(set(places)) == 4
    indexes = indexes.follow("defgh", 0, 5)
    never_used = ({*range(5)} - {*places}).pop()
    assert [indexes.names[name] for name in "efgh"] == [never_used, *places[:3]]


def test_a_new_name_in_an_old_place_begins_at_zero():
    before = node_rules.build(spec())
    same = node_rules.build(spec(), before.watchlist_indexes, before.collector_indexes)
    assert before.fresh_watchlists == (before.watchlist_indexes.names["shop"],)
    assert same.fresh_watchlists == ()


def test_more_names_than_places_are_refused():
    names = [str(i) for i in range(256)]
    assert sorted(node_rules.Indexes().follow(names[:255], 1, 256).names.values()) == [
        *range(1, 256)
    ]
    for count, first, limit in ((17, 0, 16), (256, 1, 256)):
        with pytest.raises(classifier.LimitExceeded):
            node_rules.Indexes().follow(names[:count], first, limit)


def rules_of(built: node_rules.Program) -> list[classifier.Rule]:
    """Without the agent's own."""
    return [r for r in built.rules if r.watchlist]


def test_a_rule_that_did_not_change_is_the_same_object_in_the_next_program():
    """The compiler finds in this way what did not change, without a look inside."""
    other = RULE | {"id": 78, "destination": {"cidrs": ["198.51.100.0/24"]}}
    first = node_rules.build(spec(rules=[RULE, other]))
    moved = other | {"name": "renamed", "source": {"cidrs": ["10.1.0.0/16"]}}
    # the same spec in other objects, with one rule changed
    second = node_rules.build(
        spec(rules=[moved, RULE]), first.watchlist_indexes, first.collector_indexes, first.made
    )
    assert [str(r.sources[0]) for r in rules_of(second)[:2]] == ["10.1.0.0/16", "198.51.100.0/24"]
    assert rules_of(second)[2] is rules_of(first)[0]
    assert rules_of(second)[3] is rules_of(first)[1]


@pytest.mark.parametrize(
    "change",
    [
        {"action": "Ignore"},
        {"protocol": "UDP"},
        {"bidirectional": False},
        {"source": None},
        {"source": {"cidrs": ["10.0.0.0/9"]}},
        {"source": {"cidrs": ["10.0.0.0/8"], "ports": [{"port": 1}]}},
        {"destination": {"cidrs": ["192.0.2.0/24"], "ports": [{"port": 80}]}},
        {"watchlist": "store"},
    ],
    ids=str,
)
def test_a_program_is_the_same_whatever_was_made_before(change):
    watchlists = [WATCHLIST, WATCHLIST | {"name": "store"}]
    first = node_rules.build(spec(watchlists=watchlists))
    changed = spec(watchlists=watchlists, rules=[RULE | change])
    known = node_rules.build(changed, first.watchlist_indexes, first.collector_indexes, first.made)
    assert rules_of(known) == rules_of(node_rules.build(changed))
    assert rules_of(known) != rules_of(first)


def test_a_watchlist_that_has_another_place_now_takes_its_rules_along():
    first = node_rules.build(spec())
    places = node_rules.Indexes({"shop": 9})
    second = node_rules.build(spec(), places, first.collector_indexes, first.made)
    assert {r.watchlist for r in rules_of(second)} == {9}


def test_two_rules_of_one_id_stay_two_rules():
    twin = RULE | {"name": "twin", "protocol": "UDP"}
    twins = spec(rules=[RULE, twin])
    first = node_rules.build(twins)
    second = node_rules.build(twins, first.watchlist_indexes, first.collector_indexes, first.made)
    assert [r.protocol for r in rules_of(second)] == [6, 6, 17, 17]
    assert rules_of(second) == rules_of(first)
