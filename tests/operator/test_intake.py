# SPDX-License-Identifier: Apache-2.0
"""How the users' objects come in: in any order, valid or not, and without a trace on them."""

import asyncio
import itertools
import json
from collections.abc import Mapping
from typing import Any

import kopf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostint_operator import desired_state, intake
from hostint_operator.kube import client

RULES = {"rules": [{"name": "all"}]}


def body(version: int, uid: str = "u1", generation: int = 1, **more: Any) -> dict[str, Any]:
    metadata = {"name": "w", "uid": uid, "generation": generation, "resourceVersion": str(version)}
    return {"metadata": metadata, "spec": RULES, **more}


class Fixture:
    def __init__(self) -> None:
        self.state = desired_state.State()
        self.changes: list[tuple[str, str, bool]] = []
        self.intake = intake.Intake(self.state, lambda *change: self.changes.append(change))


class Lists:
    """Answers every list with these objects."""

    def __init__(self, version: int, *items: Mapping[str, Any]) -> None:
        self._answer = {"metadata": {"resourceVersion": str(version)}, "items": items}

    async def request(self, method: str, path: str, **_: Any) -> bytes:
        assert (method, path) == ("GET", "/apis/hostint.dev/v1alpha1/intwatchlists")
        return json.dumps(self._answer).encode()


def sweep(to: Fixture, lists: Lists) -> None:
    asyncio.run(to.intake.sweep(lists, "watchlist"))  # type: ignore[arg-type]


def test_a_change_of_status_alone_is_told_as_such() -> None:
    f = Fixture()
    f.intake.put("watchlist", body(5))
    f.intake.put("watchlist", body(6, status={"rules": 1}))
    f.intake.put("watchlist", body(7, generation=2))
    assert f.changes == [
        ("watchlist", "w", True),
        ("watchlist", "w", False),
        ("watchlist", "w", True),
    ]
    assert f.state.watchlists["w"].generation == 2


def test_an_object_made_again_is_a_change() -> None:
    """Its generation is the same, and no event told of the deletion."""
    f = Fixture()
    f.intake.put("watchlist", body(5, uid="u1"))
    f.intake.put("watchlist", body(9, uid="u2"))
    sweep(f, Lists(12, body(11, uid="u3")))
    assert f.changes == [("watchlist", "w", True)] * 3
    assert f.state.watchlists["w"].uid == "u3"


def test_an_invalid_object_is_kept_with_its_problem_in_words() -> None:
    f = Fixture()
    wrong = body(5) | {
        "spec": {"rules": [{"name": "a", "destination": {"ports": [{"port": 99999}]}}]}
    }
    f.intake.put("watchlist", wrong)
    f.intake.put("collector", body(5) | {"spec": {"port": 1}})
    seen = f.state.watchlists["w"]
    assert seen.spec is None
    assert "spec.rules[0].destination.ports[0].port: Invalid value: 99999" in seen.problem
    assert "exactly one of address and service" in f.state.collectors["w"].problem


@pytest.mark.parametrize("spec", [None, [], "text", {"rules": None}, {}])
def test_no_spec_whatsoever_makes_it_raise(spec: Any) -> None:
    f = Fixture()
    f.intake.put("watchlist", body(5) | {"spec": spec})
    assert f.state.watchlists["w"].spec is None
    assert f.state.watchlists["w"].problem.startswith("spec")


def test_a_late_event_of_a_deleted_object_does_not_bring_it_back() -> None:
    f = Fixture()
    f.intake.put("watchlist", body(5))
    f.intake.drop("watchlist", "w", 7)
    f.intake.put("watchlist", body(6))
    assert f.state.watchlists == {}
    f.intake.put("watchlist", body(8, uid="u2"))
    f.intake.drop("watchlist", "w", 7)  # told twice, the second time late
    assert f.state.watchlists["w"].uid == "u2"


def test_a_sweep_finds_what_no_event_told() -> None:
    f = Fixture()
    f.intake.put("watchlist", body(5))
    sweep(f, Lists(9))
    assert f.state.watchlists == {}
    sweep(f, Lists(12, body(10)))
    assert f.state.watchlists["w"].version == 10


def test_a_sweep_that_is_older_than_the_events_changes_nothing() -> None:
    f = Fixture()
    f.intake.put("watchlist", body(20))
    sweep(f, Lists(15))
    assert f.state.watchlists["w"].version == 20
    f.intake.drop("watchlist", "w", 30)
    sweep(f, Lists(25, body(20)))
    assert f.state.watchlists == {}


@given(st.permutations(range(6)), st.integers(0, 5))
def test_whatever_the_order_of_events_the_newest_wins(order: list[int], deleted: int) -> None:
    f = Fixture()
    for version in order:
        if version == deleted:
            f.intake.drop("watchlist", "w", version)
        else:
            f.intake.put("watchlist", body(version))
    if deleted == 5:
        assert f.state.watchlists == {}
    else:
        assert f.state.watchlists["w"].version == 5


async def login() -> Any:
    raise AssertionError


def test_kopf_has_two_event_handlers_and_nothing_that_would_write() -> None:
    registry = intake.register(Fixture().intake, login)
    watching = list(registry._watching.get_all_handlers())
    assert sorted(str(handler.id) for handler in watching) == ["see-collector", "see-watchlist"]
    for writing in (registry._changing, registry._spawning, registry._indexing, registry._webhooks):
        assert list(writing.get_all_handlers()) == []


def test_kopf_keeps_nothing_on_objects() -> None:
    chosen = intake.settings()
    patch = kopf.Patch()
    chosen.persistence.diffbase_storage.store(body={}, patch=patch, essence={})  # type: ignore[arg-type]
    chosen.persistence.progress_storage.touch(body={}, patch=patch, value="x")  # type: ignore[arg-type]
    assert not patch
    assert not chosen.posting.enabled
    assert chosen.peering.standalone


def test_kopf_does_not_watch_what_it_is_not_asked_to() -> None:
    """Scanning would have it read every CRD of the cluster."""
    assert intake.settings().scanning.disabled


def test_kopf_retries_for_ever_and_waits_half_a_minute_at_most() -> None:
    """After the last pause of a finite list it would end the operator."""
    pauses = list(itertools.islice(iter(intake.settings().networking.error_backoffs), 1000))
    assert pauses[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert set(pauses[6:]) == {30.0}


@pytest.mark.parametrize(
    ("kind", "expected"), [("DELETED", []), ("MODIFIED", ["w"]), (None, ["w"])]
)
def test_kopf_event_is_taken_as_what_it_is(kind: str | None, expected: list[str]) -> None:
    """None: of the list that a watch begins with."""
    f = Fixture()
    f.intake.put("watchlist", body(5))
    registry = intake.register(f.intake, login)
    handlers = {str(h.id): h.fn for h in registry._watching.get_all_handlers()}
    event = {"type": kind, "object": body(7, generation=2)}
    asyncio.run(handlers["see-watchlist"](event=event))  # type: ignore[arg-type]
    assert list(f.state.watchlists) == expected
    assert all(w.generation == 2 for w in f.state.watchlists.values())


def test_kopf_logs_in_with_the_operators_credentials() -> None:
    found = client.Credentials("https://s", "/ca", "/cert", "/key", "token", verify=True)

    async def give() -> client.Credentials:
        return found

    registry = intake.register(Fixture().intake, give)
    (handler,) = registry._activities.get_all_handlers()
    info = asyncio.run(handler.fn())  # type: ignore[call-arg, arg-type]
    assert (info.server, info.ca_path, info.token) == ("https://s", "/ca", "token")
    assert (info.certificate_path, info.private_key_path) == ("/cert", "/key")
    assert info.insecure is False


def test_deletions_older_than_a_sweep_are_forgotten() -> None:
    """Or the operator would grow with every object that there ever was."""
    f = Fixture()
    f.intake.put("watchlist", body(5))
    f.intake.drop("watchlist", "w", 7)
    sweep(f, Lists(6))
    assert f.intake._deleted == {("watchlist", "w"): 7}
    sweep(f, Lists(9))
    assert f.intake._deleted == {}
