# SPDX-License-Identifier: Apache-2.0
"""What every node is told, from what the users asked for."""

import ipaddress
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostint_api import NodeConfigSpec, WatchlistSpec, node_config
from hostint_operator import compile as compiler
from hostint_operator import desired_state, endpoints
from tests.operator import build


def plan(
    watchlists: Iterable[desired_state.Watchlist],
    collectors: Iterable[desired_state.Collector] = (build.collector(),),
    nodes: Iterable[desired_state.Node] = (build.node("n1", "10.0.0.1"),),
    **more: Any,
) -> compiler.Plan:
    """Plan for these objects; `more` is the rest of what is known."""
    known = build.by_name(collectors)
    state = desired_state.State(collectors=known, **more)
    resolutions = {name: endpoints.resolve(c, state) for name, c in known.items()}
    return compiler.plan(build.by_name(watchlists), known, build.by_name(nodes), resolutions)


def rule_names(spec: NodeConfigSpec) -> list[str]:
    return [f"{rule.watchlist}/{rule.name}" for rule in spec.rules]


N1 = build.node("n1", "10.0.0.1", rack="a")


def test_rules_come_by_priority_then_watchlist_name_then_their_own_order() -> None:
    decided = plan(
        [
            build.watchlist("b", "z", "a"),
            build.watchlist("a", "x"),
            build.watchlist("top", "t", priority=5),
            build.watchlist("last", "l", priority=-1),
        ]
    )
    spec = compiler.node_spec(decided, N1)
    assert rule_names(spec) == ["top/t", "a/x", "b/z", "b/a", "last/l"]


def test_a_node_gets_the_watchlists_that_select_it_and_their_collectors_only() -> None:
    decided = plan(
        [
            build.watchlist("mine", labels={"rack": "a"}),
            build.watchlist("other", labels={"rack": "b"}, collector="second"),
            build.watchlist("both", labels={"rack": "a", "disk": "ssd"}),
        ],
        [build.collector(), build.collector("second", address="2001:db8::9", port=5000)],
    )
    spec = compiler.node_spec(decided, N1)
    assert [w.name for w in spec.watchlists] == ["mine"]
    assert [c.name for c in spec.collectors] == ["default"]
    assert [(str(i.address), i.port) for i in spec.ignored] == [
        ("192.0.2.9", 4000),
        ("2001:db8::9", 5000),
    ]


def ignored(spec: NodeConfigSpec) -> list[str]:
    return [f"{entry.address}:{entry.port}" for entry in spec.ignored]


SERVICE = {"namespace": "ns", "name": "svc", "port": 4000}


def test_ignored_names_collectors_that_no_watchlist_uses() -> None:
    """Its reports may come from other nodes, or from before its watchlist was deleted."""
    collectors = [build.collector(), build.collector("unused", address="192.0.2.10", port=5000)]
    for watchlists in ([build.watchlist("w")], []):
        spec = compiler.node_spec(plan(watchlists, collectors), N1)
        assert ignored(spec) == ["192.0.2.10:5000", "192.0.2.9:4000"]


def test_ignored_names_endpoints_that_are_not_ready() -> None:
    """An endpoint that has just ceased to be ready still gets the reports of nodes that do not know it yet."""
    piece = build.endpoint_slice("ns/svc", 4000, 5000, ["10.0.0.5"], ["10.0.0.6"])
    decided = plan(
        [build.watchlist("w")],
        [build.collector(service=SERVICE)],
        services={"ns/svc": build.service(4000)},
        slices={"ns/a": piece},
    )
    spec = compiler.node_spec(decided, N1)
    assert [str(c.address) for c in spec.collectors] == ["10.0.0.5"]
    assert ignored(spec) == ["10.0.0.5:5000", "10.0.0.6:5000"]


def test_ignored_keeps_ready_endpoints_where_not_all_fit() -> None:
    """Addresses of those that are not ready sort first here: order alone would keep them."""
    waiting = [f"10.0.{i // 250}.{i % 250 + 1}" for i in range(compiler.MAX_IGNORED)]
    ready = [f"192.0.2.{i}" for i in range(1, 11)]
    decided = plan(
        [build.watchlist("w")],
        [build.collector(service=SERVICE)],
        services={"ns/svc": build.service(4000)},
        slices={"ns/a": build.endpoint_slice("ns/svc", 4000, 5000, ready, waiting)},
    )
    told = ignored(compiler.node_spec(decided, N1))
    assert len(told) == compiler.MAX_IGNORED
    assert {f"{address}:5000" for address in ready} <= set(told)


def test_settings_arrive_in_nanoseconds_and_numbers() -> None:
    wanted = build.watchlist("w").spec
    assert wanted is not None
    report = {"interval": "5s", "latencyChange": "0s", "congestionLatency": "1ms", "sample": 7}
    changed = wanted.model_validate(
        wanted.model_dump(by_alias=True, exclude_none=True) | {"report": report}
    )
    watchlist = desired_state.UserObject("w", "u", 4, 1, changed, "", {})
    settings = {"rateLimit": {"reportsPerSecond": 100}, "dscp": 8, "snapLength": 96}
    collectors = [build.collector(address="192.0.2.9", **settings)]
    spec = compiler.node_spec(plan([watchlist], collectors), N1)
    told = spec.model_dump(mode="json", by_alias=True)
    assert told["watchlists"] == [
        {
            "name": "w",
            "generation": 4,
            "collector": "default",
            "events": ["Flow", "Drop"],
            "intervalNs": 5_000_000_000,
            "latencyChangeNs": 0,
            "congestionLatencyNs": 1_000_000,
            "sample": 7,
        }
    ]
    assert told["collectors"] == [
        {
            "name": "default",
            "address": "192.0.2.9",
            "port": 32766,
            "format": "TelemetryReportV05",
            "snapLength": 96,
            "dscp": 8,
            "reportsPerSecond": 100,
        }
    ]


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["10.128.5.5"], 0x0A800505),
        (["2001:db8::1", "10.128.5.5"], 0x0A800505),
        (["2001:db8::1"], compiler.node_id(build.node("n1"))),
    ],
)
def test_the_node_id_is_the_ipv4_internal_address_else_a_hash_of_the_name(
    addresses: list[str], expected: int
) -> None:
    assert compiler.node_id(build.node("n1", *addresses)) == expected
    assert compiler.node_id(build.node("n1")) != compiler.node_id(build.node("n2"))


@pytest.mark.parametrize(
    ("watchlist", "reason", "words"),
    [
        (build.watchlist("w", collector="nope"), "CollectorNotFound", "IntCollector 'nope'"),
        (build.invalid_watchlist("w", "spec.rules[0]: bad"), "Invalid", "spec.rules[0]: bad"),
    ],
)
def test_a_watchlist_that_is_not_accepted_is_not_compiled_and_disturbs_no_other(
    watchlist: desired_state.Watchlist, reason: str, words: str
) -> None:
    alone = plan([build.watchlist("good")])
    decided = plan([watchlist, build.watchlist("good")])
    verdict = decided.verdicts["w"]
    assert (verdict.accepted, verdict.reason) == (False, reason)
    assert words in verdict.message
    assert compiler.node_spec(decided, N1) == compiler.node_spec(alone, N1)


def test_a_watchlist_without_anywhere_to_report_is_accepted_but_not_sent() -> None:
    service = {"namespace": "ns", "name": "svc"}
    decided = plan([build.watchlist("w")], [build.collector(service=service)])
    verdict = decided.verdicts["w"]
    assert verdict.accepted
    assert "Service ns/svc does not exist" in verdict.collector_problem
    assert compiler.node_spec(decided, N1).watchlists == ()


def test_the_256th_watchlist_of_a_node_is_refused_and_only_there() -> None:
    lists = [build.watchlist(f"w{i:03}") for i in range(256)]
    elsewhere = build.watchlist("zz", labels={"rack": "b"})
    b = build.node("n2", "10.0.0.2", rack="b")
    decided = plan([*lists, elsewhere], nodes=[N1, b])
    refused = [name for name, verdict in decided.verdicts.items() if not verdict.accepted]
    assert refused == ["w255", "zz"]
    assert decided.verdicts["w255"].reason == "TooManyRules"
    assert "255 watchlists" in decided.verdicts["w255"].message
    apart = plan([*lists[:255], build.watchlist("zz", labels={"rack": "b"})], nodes=[N1])
    assert all(verdict.accepted for verdict in apart.verdicts.values())


def test_the_watchlist_of_lowest_priority_that_does_not_fit_is_refused() -> None:
    rules = [f"r{i}" for i in range(250)]
    full = [build.watchlist(f"w{i:02}", *rules, bidirectional=True) for i in range(30)]
    small = build.watchlist("low", priority=-5)
    decided = plan([small, *full])
    assert decided.verdicts["low"].reason == "TooManyRules"
    assert "15000 rules" in decided.verdicts["low"].message
    assert "'n1'" in decided.verdicts["low"].message
    important = build.watchlist("low", priority=5)
    decided = plan([important, *full])
    assert decided.verdicts["low"].accepted
    assert [n for n, v in decided.verdicts.items() if not v.accepted] == ["w29"]
    assert len(compiler.node_spec(decided, N1).rules) == 29 * 250 + 1


def big_watchlist(name: str) -> desired_state.Watchlist:
    """Return one whose rules use every list to its limit, with the longest addresses there are."""
    cidrs = [f"2001:db8:1111:2222:3333:4444:{i:x}:ffff/128" for i in range(1000, 1064)]
    ports = [{"port": 60000 + 2 * i, "endPort": 60001 + 2 * i} for i in range(16)]
    peer = {"cidrs": cidrs, "ports": ports}
    rules = [
        {"name": f"r{i}", "protocol": "SCTP", "source": peer, "destination": peer}
        for i in range(100)
    ]
    spec = WatchlistSpec.model_validate({"rules": rules})
    return desired_state.UserObject(name, f"uid-{name}", 1, 1, spec, "", {})


def test_what_etcd_could_not_store_is_refused_instead_of_blocking_the_node() -> None:
    decided = plan([big_watchlist("a"), big_watchlist("b"), build.watchlist("c")])
    assert [n for n, v in decided.verdicts.items() if not v.accepted] == ["b"]
    assert "can take 1200000 bytes and would take" in decided.verdicts["b"].message
    sent = compiler.node_spec(decided, N1).model_dump_json(by_alias=True, exclude_none=True)
    assert len(sent) < compiler.MAX_RULE_BYTES


@pytest.mark.parametrize("make", [big_watchlist, lambda name: build.watchlist(name, "a", "b")])
def test_the_estimate_of_a_rules_size_is_never_too_small_nor_far_off(
    make: Callable[[str], desired_state.Watchlist],
) -> None:
    spec = compiler.node_spec(plan([make("w")]), N1)
    exact = sum(
        len(rule.model_dump_json(by_alias=True, exclude_none=True)) + 1 for rule in spec.rules
    )
    watchlist = make("w")
    assert watchlist.spec is not None
    entry = compiler.Entry("w", 1, watchlist.spec, "default")
    assert exact <= compiler.rule_bytes(entry) < 1.6 * exact


def test_a_17th_collector_on_a_node_is_refused() -> None:
    collectors = [build.collector(f"c{i:02}", address=f"192.0.2.{i + 1}") for i in range(17)]
    lists = [build.watchlist(f"w{i:02}", collector=f"c{i:02}") for i in range(17)]
    decided = plan([*lists, build.watchlist("x", collector="c03")], collectors)
    assert [n for n, v in decided.verdicts.items() if not v.accepted] == ["w16"]
    assert len(compiler.node_spec(decided, N1).collectors) == 16


def test_rule_ids_stay_when_other_rules_come_and_go() -> None:
    few = compiler.rule_ids([("w", "a"), ("v", "b")])
    many = compiler.rule_ids([("w", "a"), ("v", "b"), *(("x", f"r{i}") for i in range(1000))])
    assert few.items() <= many.items()


def test_two_rules_with_the_same_hash_get_different_ids() -> None:
    first, second = ("w", "r44167"), ("w", "r63585")  # found by search
    alone = compiler.rule_ids([second])[second]
    assert compiler.rule_ids([first])[first] == alone
    together = compiler.rule_ids([second, first])
    assert together[first] == alone
    assert together[second] not in (0, alone)


def test_no_rule_has_the_id_that_means_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_hash32", lambda text: len(text.split("/")) - 2)
    assert compiler.rule_ids([("w", "a")]) == {("w", "a"): 1}


def test_rule_ids_stay_when_another_watchlist_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two rules have the same hash, and the one that comes first loses its collector."""
    monkeypatch.setattr(compiler, "_hash32", lambda text: 7 + text.count("/"))
    later = build.watchlist("b")
    ids = [
        plan([build.watchlist("a", collector=name), later]).rule_ids["b", "all"]
        for name in ("default", "missing")
    ]
    assert ids == [9, 9]


names_ = st.text("abc", min_size=1, max_size=3)
watchlists_ = st.builds(
    lambda name, rules, priority, labels, collector, both: build.watchlist(
        name,
        *sorted(rules),
        priority=priority,
        labels=labels,
        collector=collector,
        bidirectional=both,
    ),
    names_,
    st.sets(names_, min_size=1, max_size=4),
    st.integers(-2, 2),
    st.dictionaries(st.sampled_from("kl"), st.sampled_from("xy"), max_size=2),
    st.sampled_from(["default", "second", "missing"]),
    st.booleans(),
)


@given(st.lists(watchlists_, unique_by=lambda w: w.name, max_size=6), st.randoms())
def test_the_result_does_not_depend_on_the_order_in_which_things_became_known(
    watchlists: list[desired_state.Watchlist], shuffle: random.Random
) -> None:
    collectors = [build.collector(), build.collector("second", address="192.0.2.10")]
    node = build.node("n1", "10.0.0.1", k="x", l="y")
    first = compiler.node_spec(plan(watchlists, collectors, [node]), node)
    shuffle.shuffle(watchlists)
    shuffle.shuffle(collectors)
    again = compiler.node_spec(plan(watchlists, collectors, [build.node("n0"), node]), node)
    assert again == first
    assert first.digest == node_config.digest(first)


@given(st.lists(watchlists_, unique_by=lambda w: w.name, max_size=6))
def test_every_rule_of_every_selected_watchlist_is_there_once_and_names_what_is_there(
    watchlists: list[desired_state.Watchlist],
) -> None:
    node = build.node("n1", "10.0.0.1", k="x", l="y")
    decided = plan(watchlists, nodes=[node])
    spec = compiler.node_spec(decided, node)
    expected = {
        f"{w.name}/{rule.name}"
        for w in watchlists
        if w.spec and w.spec.collector_name == "default" and compiler.selects(w.spec, node)
        for rule in w.spec.rules
    }
    assert sorted(rule_names(spec)) == sorted(expected)
    assert len({rule.id for rule in spec.rules}) == len(spec.rules)
    assert {w.collector for w in spec.watchlists} == {c.name for c in spec.collectors}
    assert NodeConfigSpec.model_validate_json(spec.model_dump_json(by_alias=True)) == spec


def test_digest_changes_with_the_content_and_with_nothing_else() -> None:
    a = compiler.node_spec(plan([build.watchlist("w")]), N1)
    same = compiler.node_spec(plan([build.watchlist("w")]), N1)
    other = compiler.node_spec(plan([build.watchlist("w", generation=2)]), N1)
    assert a.digest == same.digest != other.digest
    assert ipaddress.ip_address(a.node_id) == ipaddress.ip_address("10.0.0.1")
