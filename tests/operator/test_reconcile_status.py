# SPDX-License-Identifier: Apache-2.0
"""When the status of the users' objects is written: for the right object, not too often, and when time alone changes it."""

import asyncio
import ipaddress
from dataclasses import replace
from typing import Any

import pytest

from hostint_api import names
from hostint_operator import desired_state, observe, reconcile, status
from hostint_operator.kube import client
from tests.operator import build
from tests.operator.test_reconcile import CONFIGS, Fixture, cluster, running, until

WATCHLIST = f"/apis/{names.API_VERSION}/{names.WATCHLISTS}/w/status"
COLLECTOR = f"/apis/{names.API_VERSION}/{names.COLLECTORS}/default/status"


def written(fixture: Fixture, path: str = WATCHLIST) -> dict[str, Any]:
    """The conditions that were written last, by type."""
    conditions = fixture.api.objects.get(path, {}).get("status", {}).get("conditions", [])
    return {entry["type"]: entry for entry in conditions}


def reason(fixture: Fixture, path: str = WATCHLIST, kind: str = "Ready") -> str:
    return str(written(fixture, path).get(kind, {}).get("reason", ""))


def agents(fixture: Fixture) -> None:
    """An agent on every node, which has not answered yet."""
    for name in ("n1", "n2"):
        node = desired_state.NodeName(name)
        fixture.state.agents[f"agent-{name}"] = desired_state.AgentPod(node, True)


def answer(fixture: Fixture, reachable: bool = True) -> None:
    """Do what agents do once they run their configuration."""
    for name, known in list(fixture.state.node_configs.items()):
        spec = fixture.api.objects[CONFIGS + name]["spec"]
        said = {
            w["name"]: desired_state.WatchlistOnNode(w["generation"], True, "", "")
            for w in spec["watchlists"]
        }
        collector = desired_state.CollectorOnNode(reachable, "NoRoute", "no route")
        fixture.state.node_configs[name] = replace(
            known,
            observed_digest=spec["digest"],
            watchlists=said,
            collectors={"default": collector},
        )
        fixture.reconciler.node_changed(name)


def test_status_is_not_written_to_an_object_made_again() -> None:
    """The API server refuses by uid; that is not tried again, and the new object gets its own status."""

    async def work() -> None:
        async with running() as fixture:
            fixture.api.uids[WATCHLIST] = "uid-new"
            cluster(fixture)
            await until(lambda: WATCHLIST in fixture.api.times)
            await asyncio.sleep(1.2)  # a failure would have been repeated by now
            assert WATCHLIST not in fixture.api.objects
            assert len(fixture.api.times[WATCHLIST]) < 3
            known = fixture.state.watchlists["w"]
            fixture.state.watchlists["w"] = replace(known, uid="uid-new", version=9)
            fixture.reconciler.object_changed("watchlist", "w", True)
            await until(lambda: reason(fixture) != "")
            assert fixture.api.objects[WATCHLIST]["metadata"]["uid"] == "uid-new"

    asyncio.run(work())


def test_status_is_written_twice_a_second_at_most() -> None:
    """Thousands of agents may answer one after the other."""

    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            agents(fixture)
            await fixture.settled()
            for i in range(60):
                answer(fixture, reachable=i % 2 == 0)
                await asyncio.sleep(0.02)
            times = fixture.api.times[COLLECTOR]
            assert len(times) >= 2
            assert min(b - a for a, b in zip(times, times[1:], strict=False)) > 0.45

    asyncio.run(work())


def test_node_that_does_not_answer_fails_without_any_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(status, "ANSWER_S", 2.0)

    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            agents(fixture)
            await until(lambda: reason(fixture) == "Progressing")
            await until(lambda: reason(fixture) == "NodesFailed")
            assert (
                "n1: the agent has not confirmed generation 1"
                in (written(fixture)["Ready"]["message"])
            )

    asyncio.run(work())


def test_node_has_as_long_to_answer_the_next_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(status, "ANSWER_S", 2.5)
    monkeypatch.setattr(status, "LAG_S", 0.0)

    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            agents(fixture)
            await until(lambda: reason(fixture) == "Progressing")
            answer(fixture)
            await until(lambda: reason(fixture) == "Programmed")
            await asyncio.sleep(2.5)
            fixture.state.watchlists["w"] = build.watchlist("w", generation=2)
            fixture.reconciler.inputs_changed()
            await until(lambda: reason(fixture) in ("Progressing", "NodesFailed"))
            assert reason(fixture) == "Progressing"

    asyncio.run(work())


def test_answers_of_agents_are_told_at_once() -> None:
    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            agents(fixture)
            await until(lambda: reason(fixture) == "Progressing")
            await asyncio.sleep(reconcile.STATUS_INTERVAL_S)
            answer(fixture)
            async with asyncio.timeout(5):  # time alone would tell after 30 s
                await until(lambda: reason(fixture) == "Programmed")

    asyncio.run(work())


def test_newer_object_stays_when_an_older_answer_comes() -> None:
    """The watch can tell of a change before the answer to our own write is here."""

    async def work() -> None:
        async with running() as fixture:
            newer = replace(build.watchlist("w", generation=2), version=5000)

            def overtake(path: str) -> None:
                if path == WATCHLIST and fixture.state.watchlists["w"].generation == 1:
                    fixture.state.watchlists["w"] = newer

            fixture.api.before_answer = overtake
            cluster(fixture)
            await until(lambda: WATCHLIST in fixture.api.objects)
            await asyncio.sleep(0.05)
            assert fixture.state.watchlists["w"] is newer

    asyncio.run(work())


def test_newer_config_stays_when_an_older_answer_comes() -> None:
    async def work() -> None:
        async with running() as fixture:
            name = desired_state.NodeName("n1")

            def overtake(path: str) -> None:
                if path == CONFIGS + name:
                    stored = fixture.api.objects[path]
                    seen = observe.WireNodeConfig.model_validate(stored)
                    _, known = observe.read_node_config(seen)
                    fixture.state.node_configs[name] = replace(known, version=9000)

            fixture.api.before_answer = overtake
            cluster(fixture)
            await until(lambda: len({path for path, _ in fixture.api.writes}) == 4)
            assert fixture.state.node_configs[name].version == 9000

    asyncio.run(work())


@pytest.mark.parametrize(("version", "generation"), [(5000, 1), (5, 2)])
def test_own_answer_is_taken_only_where_it_is_newer(version: int, generation: int) -> None:
    async def work() -> None:
        fixture = Fixture()
        known = replace(build.watchlist("w", generation=generation), version=version)
        fixture.state.watchlists["w"] = known
        metadata = {"uid": known.uid, "generation": 1, "resourceVersion": "1000"}
        key = reconcile.Key("watchlist", "w")
        fixture.reconciler._remember_status(key, {"metadata": metadata, "status": {"rules": 7}})
        assert fixture.state.watchlists["w"] is known

    asyncio.run(work())


def test_what_the_agent_of_a_deleted_node_said_counts_no_more() -> None:
    """Its config is there until the garbage collector has been."""

    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            await fixture.settled()
            answer(fixture, reachable=False)
            await until(lambda: reason(fixture, COLLECTOR) == "NoRoute")
            fixture.state.nodes.clear()
            fixture.reconciler.inputs_changed()
            await until(lambda: reason(fixture, COLLECTOR) == "Resolved")
            assert len(fixture.state.node_configs) == 2

    asyncio.run(work())


def test_status_of_every_kind_has_its_own_field_manager() -> None:
    """One that two places share would have each undo the fields of the other."""

    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            await until(lambda: len({path for path, _ in fixture.api.writes}) == 4)
            assert set(fixture.api.writes) == {
                (CONFIGS + "n1", names.OPERATOR_MANAGER),
                (CONFIGS + "n2", names.OPERATOR_MANAGER),
                (WATCHLIST, names.OPERATOR_STATUS_MANAGER),
                (COLLECTOR, names.OPERATOR_STATUS_MANAGER),
            }

    asyncio.run(work())


def test_retry_after_is_obeyed_and_refusals_are_counted() -> None:
    async def work() -> None:
        async with running() as fixture:
            fixture.api.failures = 4
            fixture.api.failure = client.ApiError(429, "slow down", retry_after_s=1.5)
            cluster(fixture)
            await fixture.settled()
            first, second, *_ = fixture.api.times[CONFIGS + "n1"]
            assert second - first >= 1.5
            text = fixture.metrics.render().decode()
            counter = 'hostint_operator_applies_total{kind="node_config",result="429"} 2.0'
            assert counter in text.splitlines()

    asyncio.run(work())


class LookedUp:
    """Takes the place of the observers and the resolver; nothing is found before the test says so."""

    def __init__(self) -> None:
        self.services: set[str] = set()

    def follow(self, names: object) -> None:
        list(names)  # type: ignore[call-overload]

    follow_services = follow

    def services_synced(self, key: str) -> bool:
        return key in self.services


SERVICE = {"namespace": "ns", "name": "svc", "port": 4000}


@pytest.mark.parametrize("by", ["service", "name"])
def test_collector_keeps_its_endpoints_during_a_lookup(
    monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """But not for long: what cannot be looked up is told, and reports stop to go where nobody wants them."""
    monkeypatch.setattr(reconcile, "LOOKUP_GRACE_S", 2.0)

    async def work() -> None:
        async with running() as fixture:
            looked_up = LookedUp()
            fixture.reconciler.attach(looked_up, looked_up)  # type: ignore[arg-type]
            cluster(fixture)
            await until(lambda: to(fixture) == ["192.0.2.9"])
            target = {"service": SERVICE} if by == "service" else {"address": "c.example"}
            fixture.state.collectors["default"] = build.collector(**target)
            fixture.reconciler.inputs_changed()
            await asyncio.sleep(0.5)
            assert to(fixture) == ["192.0.2.9"]
            await until(lambda: to(fixture) == [])
            looked_up.services.add("ns/svc")
            new = ipaddress.ip_address("192.0.2.77")
            fixture.state.dns["c.example"] = desired_state.DnsAnswer((new,), 0, "")
            fixture.state.services["ns/svc"] = build.service(4000)
            fixture.state.slices["ns/a"] = build.endpoint_slice(
                "ns/svc", 4000, 5000, ["192.0.2.77"]
            )
            fixture.reconciler.inputs_changed()
            await until(lambda: to(fixture) == ["192.0.2.77"])

    asyncio.run(work())


def to(fixture: Fixture) -> list[str]:
    """Where the first node is told to send."""
    spec = fixture.api.objects.get(CONFIGS + "n1", {}).get("spec", {})
    return [collector["address"] for collector in spec.get("collectors", [])]
