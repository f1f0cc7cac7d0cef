# SPDX-License-Identifier: Apache-2.0
"""What a status says, and what the tools that read it make of it."""

import datetime
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostint_operator import compile as compiler
from hostint_operator import desired_state, endpoints, status
from tests.operator import build

NOW = datetime.datetime(2026, 11, 24, 12, 0, 0, tzinfo=datetime.UTC)
GOOD = compiler.Verdict(True, "Valid", "the watchlist is valid")
LATER = NOW + datetime.timedelta(seconds=status.GRACE_S + 1)

READY = status.NodeView("n1", "ready")
PENDING = status.NodeView("n2", "pending", changes_in_s=7.0)
FAILED = status.NodeView("n3", "failed", "AttachFailed", "no room in the chain")


def kstatus(told: dict[str, Any], generation: int) -> str:
    """Judge as Flux and Helm do (sigs.k8s.io/cli-utils/pkg/kstatus)."""
    by_type = {c["type"]: c for c in told.get("conditions", [])}
    if told.get("observedGeneration") != generation:
        return "InProgress"
    if by_type.get("Reconciling", {}).get("status") == "True":
        return "InProgress"
    if by_type.get("Stalled", {}).get("status") == "True":
        return "Failed"
    if "Ready" in by_type:
        return "Current" if by_type["Ready"]["status"] == "True" else "InProgress"
    return "Current"


def told(
    nodes: list[status.NodeView],
    verdict: compiler.Verdict = GOOD,
    before: dict[str, Any] | None = None,
    now: datetime.datetime = NOW,
    **watchlist: Any,
) -> status.Told:
    known = build.watchlist("w", "a", "b", generation=3, status=before, **watchlist)
    return status.watchlist_status(known, verdict, nodes, now)


def condition(told_status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(c for c in told_status["conditions"] if c["type"] == kind)


REFUSED = compiler.Verdict(False, "Invalid", "spec.rules[0]: bad")
MISSING = compiler.Verdict(False, "CollectorNotFound", "IntCollector 'x' does not exist")
NOWHERE = compiler.Verdict(True, "Valid", "the watchlist is valid", "nowhere to send to")


@pytest.mark.parametrize(
    ("nodes", "verdict", "accepted", "ready", "soon", "late"),
    [
        ([READY], GOOD, "Valid", "Programmed", "Current", "Current"),
        ([READY, PENDING], GOOD, "Valid", "Progressing", "InProgress", "InProgress"),
        ([READY, FAILED], GOOD, "Valid", "NodesFailed", "InProgress", "Failed"),
        ([FAILED, PENDING], GOOD, "Valid", "NodesFailed", "InProgress", "Failed"),
        ([], GOOD, "Valid", "NoMatchingNodes", "InProgress", "Failed"),
        ([READY], NOWHERE, "Valid", "CollectorUnreachable", "InProgress", "Failed"),
        ([READY], MISSING, "CollectorNotFound", "Rejected", "InProgress", "Failed"),
        ([READY], REFUSED, "Invalid", "Rejected", "Failed", "Failed"),
    ],
    ids=["ready", "rolling", "failed", "both", "no nodes", "nowhere", "missing", "refused"],
)
def test_conditions_say_what_is_and_tools_read_them_right(
    nodes: list[status.NodeView],
    verdict: compiler.Verdict,
    accepted: str,
    ready: str,
    soon: str,
    late: str,
) -> None:
    first = told(nodes, verdict).status
    assert condition(first, "Accepted")["reason"] == accepted
    assert condition(first, "Ready")["reason"] == ready
    assert condition(first, "Ready")["status"] == str(ready == "Programmed")
    assert kstatus(first, 3) == soon
    assert kstatus(told(nodes, verdict, first, LATER).status, 3) == late
    assert kstatus(first, 4) == "InProgress"


def test_numbers_and_names_are_those_of_the_nodes() -> None:
    many = [status.NodeView(f"f{i:02}", "failed", "AgentMissing", "m" * 300) for i in range(12)]
    said = told([READY, PENDING, *reversed(many)]).status
    assert said["rules"] == 2
    assert said["nodes"] == {"desired": 14, "ready": 1, "failed": 12, "summary": "1/14"}
    assert [f["node"] for f in said["failures"]] == [f"f{i:02}" for i in range(10)]
    assert max(len(f["message"]) for f in said["failures"]) == 256
    assert condition(said, "Ready")["message"].startswith("12 of 14 nodes failed: f00: mmm")


def test_a_watchlist_that_is_not_sent_counts_no_node_as_ready() -> None:
    assert told([READY, FAILED], NOWHERE).status["nodes"] == {
        "desired": 2,
        "ready": 0,
        "failed": 0,
        "summary": "0/2",
    }
    assert told([READY], REFUSED).status["nodes"]["desired"] == 0


def test_it_asks_to_be_looked_at_again_when_time_alone_will_change_it() -> None:
    assert told([READY]).look_again_s is None
    assert told([READY, PENDING]).look_again_s == 7.0
    failing = told([FAILED])
    assert failing.look_again_s == status.GRACE_S
    halfway = told([FAILED], before=failing.status, now=NOW + datetime.timedelta(seconds=100))
    assert halfway.look_again_s == pytest.approx(20)
    assert told([FAILED], before=failing.status, now=LATER).look_again_s is None


def test_trouble_after_a_long_good_time_is_reconciling_first() -> None:
    """The grace begins when it stopped to be ready, not when it became ready."""
    ready = told([READY]).status
    failing = told([FAILED], before=ready, now=LATER)
    assert kstatus(failing.status, 3) == "InProgress"
    assert failing.look_again_s == status.GRACE_S


def test_more_failing_nodes_than_are_named_are_counted() -> None:
    def words(count: int) -> str:
        nodes = [status.NodeView(f"f{i}", "failed", "R", "m") for i in range(count)]
        return str(condition(told(nodes).status, "Ready")["message"])

    assert words(3) == "3 of 3 nodes failed: f0: m; f1: m; f2: m"
    assert words(5) == "5 of 5 nodes failed: f0: m; f1: m; f2: m; and 2 more"


def test_no_node_is_told_apart_from_no_matching_node() -> None:
    known = build.watchlist("w", labels={"a": "b"})
    selecting = status.watchlist_status(known, GOOD, [], NOW).status
    assert condition(selecting, "Ready")["message"] == "the nodeSelector matches no node"
    assert condition(told([]).status, "Ready")["message"] == "the cluster has no node"


def test_the_same_state_gives_the_same_status_whenever_it_is_asked() -> None:
    for nodes in ([READY], [READY, FAILED], [READY, PENDING], []):
        first = told(nodes)
        later = NOW + datetime.timedelta(seconds=50)
        assert told(nodes, before=first.status, now=later).status == first.status


@given(
    st.lists(st.sampled_from([READY, PENDING, FAILED]), max_size=4),
    st.sampled_from([GOOD, REFUSED, MISSING, NOWHERE]),
    st.lists(st.tuples(st.sampled_from([[READY], [FAILED], []]), st.integers(0, 200)), max_size=4),
)
def test_reconciling_and_stalled_are_never_there_together_and_one_is_unless_ready(
    nodes: list[status.NodeView],
    verdict: compiler.Verdict,
    history: list[tuple[list[status.NodeView], int]],
) -> None:
    before: dict[str, Any] = {}
    now = NOW
    for past, seconds in history:
        before = told(past, before=before, now=now).status
        now += datetime.timedelta(seconds=seconds)
    said = told(nodes, verdict, before, now).status
    kinds = {c["type"] for c in said["conditions"]}
    assert len(kinds & {"Reconciling", "Stalled"}) == (
        0 if condition(said, "Ready")["status"] == "True" else 1
    )
    assert all(c["observedGeneration"] == 3 for c in said["conditions"])
    assert all(c["reason"] and c["message"] for c in said["conditions"])


def config(
    observed: str, generation: int = 3, ready: bool = True, name: str = "w"
) -> desired_state.NodeConfig:
    said = desired_state.WatchlistOnNode(generation, ready, "" if ready else "Broken", "words")
    return desired_state.NodeConfig("uid", 1, "owner", "d2", observed, {name: said}, {})


VIEWS = [
    # config, agent, outdated for, expected state, reason
    (config("d2"), True, 0.0, "ready", ""),
    (config("d2"), False, 0.0, "failed", "AgentMissing"),
    (config("d2", ready=False), True, 0.0, "failed", "Broken"),
    (config("d2", name="other"), True, 0.0, "failed", "NotReported"),
    (config("d2", generation=2), True, 0.0, "failed", "NotReported"),
    (config("d1"), True, 1.0, "ready", ""),
    (config("d1"), True, 10.0, "pending", ""),
    (config("d1", generation=2), True, 1.0, "pending", ""),
    (config("d1", generation=2), True, 40.0, "failed", "NoAnswer"),
    (None, True, 1.0, "pending", ""),
    (None, True, 40.0, "failed", "NoAnswer"),
    (None, False, 1.0, "failed", "AgentMissing"),
]


@pytest.mark.parametrize(("observed", "agent", "outdated_s", "state", "reason"), VIEWS)
def test_a_node_is_judged_by_its_agents_words_about_this_generation(
    observed: desired_state.NodeConfig | None,
    agent: bool,
    outdated_s: float,
    state: str,
    reason: str,
) -> None:
    view = status.node_view(
        "n1",
        build.watchlist("w", generation=3),
        wanted_digest="d2",
        config=observed,
        has_agent=agent,
        outdated_s=outdated_s,
    )
    assert (view.state, view.reason) == (state, reason)
    moves = state == "pending" or (state == "ready" and outdated_s > 0)
    assert (view.changes_in_s is not None) == moves


UP = desired_state.CollectorOnNode(True, "", "")
DOWN = desired_state.CollectorOnNode(False, "NoRoute", "no route to host")
FOUND = endpoints.Resolution(
    True,
    "Resolved",
    "reports go to 192.0.2.9:1",
    (endpoints.Endpoint(None, 1),),  # type: ignore[arg-type]
)


@pytest.mark.parametrize(
    ("resolution", "nodes", "accepted", "ready", "reachable", "judged"),
    [
        (FOUND, {"n1": UP}, "True", "True", ("True", "Resolved"), "Current"),
        (FOUND, {}, "True", "True", ("True", "Resolved"), "Current"),
        (FOUND, {"n1": UP, "n2": DOWN}, "True", "False", ("False", "NoRoute"), "InProgress"),
        (
            endpoints.Resolution(True, "NoEndpoints", "none"),
            {},
            "True",
            "False",
            ("False", "NoEndpoints"),
            "InProgress",
        ),
        (
            endpoints.Resolution(False, "ClusterIPAddress", "use service"),
            {},
            "False",
            "False",
            ("False", "Rejected"),
            "Failed",
        ),
    ],
)
def test_a_collector_is_ready_when_it_is_accepted_and_every_node_reaches_it(
    resolution: endpoints.Resolution,
    nodes: dict[str, desired_state.CollectorOnNode],
    accepted: str,
    ready: str,
    reachable: tuple[str, str],
    judged: str,
) -> None:
    said = status.collector_status(build.collector(), resolution, nodes, NOW).status
    assert condition(said, "Accepted")["status"] == accepted
    assert condition(said, "Ready")["status"] == ready
    found = condition(said, "CollectorReachable")
    assert (found["status"], found["reason"]) == reachable
    assert kstatus(said, 1) == judged


def test_a_collector_names_the_node_that_does_not_reach_it() -> None:
    said = status.collector_status(build.collector(), FOUND, {"n1": UP, "n2": DOWN}, NOW).status
    words = condition(said, "CollectorReachable")["message"]
    assert words == "not reachable from 1 of 2 nodes; n2: no route to host"


@pytest.mark.parametrize("reason", ["", "no reason at all", "Ends_", "9th", "ä"])
def test_a_reason_that_the_api_server_would_refuse_does_not_block_the_status(reason: str) -> None:
    down = desired_state.CollectorOnNode(False, reason, "m" * 5000)
    said = status.collector_status(build.collector(), FOUND, {"n1": down}, NOW).status
    allowed = "Ends_" if reason == "Ends_" else "Unreachable"
    found = condition(said, "CollectorReachable")
    assert found["reason"] == allowed
    assert len(found["message"]) == status.MAX_MESSAGE
    failed = told([status.NodeView("n1", "failed", reason, "m")]).status["failures"]
    assert failed[0]["reason"] == allowed.replace("Unreachable", "Failed")


def test_transition_times_move_only_when_a_condition_turns() -> None:
    times = itertools.count()

    def at() -> datetime.datetime:
        return NOW + datetime.timedelta(seconds=10 * next(times))

    first = told([PENDING], now=at()).status
    second = told([FAILED], before=first, now=at()).status
    third = told([READY], before=second, now=at()).status
    stamps = [condition(s, "Ready")["lastTransitionTime"] for s in (first, second, third)]
    assert stamps == ["2026-11-24T12:00:00Z", "2026-11-24T12:00:00Z", "2026-11-24T12:00:20Z"]
    accepted = {condition(s, "Accepted")["lastTransitionTime"] for s in (first, second, third)}
    assert accepted == {"2026-11-24T12:00:00Z"}
