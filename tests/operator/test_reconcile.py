# SPDX-License-Identifier: Apache-2.0
"""The loop: whatever happens and in whatever order, the cluster ends up as a full compile of what is known says."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hostint_api import names
from hostint_operator import compile as compiler
from hostint_operator import desired_state, endpoints, http, observe, reconcile
from hostint_operator.kube import client
from tests.operator import build


class MemoryApi:
    """Takes applies as an API server does: the whole intent replaces what was there, versions grow."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.writes: list[tuple[str, str]] = []
        self.times: dict[str, list[float]] = {}  # of all attempts, by path
        self.failures = 0  # so many of the next writes fail
        self.failure = client.ApiError(503, "try later")
        self.uids: dict[str, str] = {}  # of what is there, where it is not what the caller knows
        self.before_answer: Callable[[str], None] = lambda path: None
        self._version = 1000

    async def apply(self, path: str, intent: dict[str, Any], manager: str) -> dict[str, Any]:
        self.times.setdefault(path, []).append(asyncio.get_running_loop().time())
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise self.failure
        wanted = intent["metadata"].get("uid")
        if path in self.uids and wanted not in (None, self.uids[path]):
            raise client.ApiError(409, "the uid in the precondition does not match")
        self.writes.append((path, manager))
        self._version += 1
        known = self.objects.get(path, {"metadata": {"uid": f"uid-{path}", "generation": 1}})
        metadata = {"resourceVersion": str(self._version)} | known["metadata"] | intent["metadata"]
        metadata["resourceVersion"] = str(self._version)
        self.objects[path] = {**intent, "metadata": metadata}
        self.before_answer(path)
        return self.objects[path]


CONFIGS = f"/apis/{names.API_VERSION}/{names.NODE_CONFIGS}/"


class Fixture:
    def __init__(self) -> None:
        self.api = MemoryApi()
        self.state = desired_state.State()
        self.leads = True
        self.metrics = http.Metrics()
        self.reconciler = reconcile.Reconciler(
            self.api,  # type: ignore[arg-type]
            self.state,
            self.metrics,
            may_write=lambda: self.leads,
        )

    def expected(self) -> dict[str, dict[str, Any]]:
        state = self.state
        resolutions = {n: endpoints.resolve(c, state) for n, c in state.collectors.items()}
        plan = compiler.plan(state.watchlists, state.collectors, state.nodes, resolutions)
        return {
            name: compiler.node_spec(plan, node).model_dump(
                mode="json", by_alias=True, exclude_none=True
            )
            for name, node in state.nodes.items()
        }

    def actual(self) -> dict[str, dict[str, Any]]:
        return {
            name: self.api.objects.get(CONFIGS + name, {}).get("spec", {})
            for name in self.state.nodes
        }

    def edit(self, name: desired_state.NodeName) -> None:
        """Do what a person with kubectl does to a config; the watch tells."""
        stored = self.api.objects[CONFIGS + name]
        stored["spec"] = {**stored["spec"], "nodeID": 1}
        _, seen = observe.read_node_config(observe.WireNodeConfig.model_validate(stored))
        self.state.node_configs[name] = seen
        self.reconciler.node_changed(name)

    async def settled(self) -> None:
        await until(lambda: self.actual() == self.expected())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while True:
            if condition():
                return
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Fixture]:
    fixture = Fixture()
    fixture.reconciler.plan()
    task = asyncio.create_task(fixture.reconciler.run())
    try:
        yield fixture
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def cluster(fixture: Fixture) -> None:
    state = fixture.state
    state.watchlists["w"] = build.watchlist("w")
    state.collectors["default"] = build.collector()
    for name in ("n1", "n2"):
        node = build.node(name, f"10.0.0.{name[1]}")
        state.nodes[node.name] = node
    fixture.reconciler.inputs_changed()


def test_every_node_gets_its_config_once_and_nothing_is_written_again_without_need() -> None:
    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            await fixture.settled()
            await until(lambda: len(fixture.api.writes) >= 4)
            before = list(fixture.api.writes)
            for _ in range(3):
                fixture.reconciler.inputs_changed()
                await asyncio.sleep(0.4)  # a status is written every 0.5 s at most
            after = fixture.api.writes
            configs = [path for path, _ in after if path.startswith(CONFIGS)]
            assert sorted(configs) == [CONFIGS + "n1", CONFIGS + "n2"]
            assert {p for p, _ in before} == {p for p, _ in after}
            status_paths = [path for path, _ in after if path.endswith("/status")]
            assert len(status_paths) == len(set(status_paths))

    asyncio.run(work())


def test_a_config_edited_by_hand_is_put_right() -> None:
    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            await fixture.settled()
            fixture.edit(desired_state.NodeName("n1"))
            assert fixture.actual() != fixture.expected()
            await fixture.settled()

    asyncio.run(work())


def test_a_change_after_everything_was_written_is_written_too() -> None:
    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            await fixture.settled()
            await until(lambda: len(fixture.api.writes) >= 4)  # both configs, both statuses
            fixture.state.watchlists["w"] = build.watchlist("w", generation=2)
            fixture.reconciler.inputs_changed()
            assert fixture.actual() != fixture.expected()
            await fixture.settled()

    asyncio.run(work())


def test_a_write_that_fails_is_repeated() -> None:
    async def work() -> None:
        async with running() as fixture:
            fixture.api.failures = 3
            cluster(fixture)
            await fixture.settled()

    asyncio.run(work())


def test_nothing_is_written_without_the_lease() -> None:
    """It can be lost between two writes, and what was not written is written once it is held again."""

    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            await fixture.settled()
            await until(lambda: len(fixture.api.writes) >= 4)  # both configs, both statuses
            fixture.leads = False
            before = list(fixture.api.writes)
            fixture.state.watchlists["w"] = build.watchlist("w", generation=2)
            fixture.reconciler.inputs_changed()
            await asyncio.sleep(0.7)  # longer than any write waits
            assert fixture.api.writes == before
            fixture.leads = True
            await fixture.settled()

    asyncio.run(work())


def test_a_config_owned_by_a_node_that_was_replaced_is_applied_anew() -> None:
    async def work() -> None:
        async with running() as fixture:
            cluster(fixture)
            await fixture.settled()
            new = build.node("n1", "10.0.0.1")
            new = desired_state.Node(new.name, "uid-new", new.labels, new.internal_addresses)
            fixture.state.nodes[new.name] = new
            fixture.reconciler.inputs_changed()

            def owner() -> str:
                return fixture.api.objects[CONFIGS + "n1"]["metadata"]["ownerReferences"][0]["uid"]

            await until(lambda: owner() == "uid-new")

    asyncio.run(work())


NAMES = st.sampled_from(["a", "b", "c"])
COLLECTORS = st.sampled_from(["default", "second"])
NODES = st.sampled_from(["n1", "n2", "n3"])
LABELS = st.dictionaries(st.sampled_from("kl"), st.sampled_from("xy"), max_size=2)
EVENTS = st.one_of(
    st.tuples(
        st.just("watchlist"),
        NAMES,
        st.sets(NAMES, min_size=1),
        LABELS,
        COLLECTORS,
        st.integers(0, 2),
    ),
    st.tuples(st.just("no watchlist"), NAMES),
    st.tuples(st.just("invalid"), NAMES),
    st.tuples(st.just("collector"), COLLECTORS, st.sampled_from(["192.0.2.1", "192.0.2.2"])),
    st.tuples(st.just("no collector"), COLLECTORS),
    st.tuples(st.just("node"), NODES, LABELS),
    st.tuples(st.just("no node"), NODES),
    st.tuples(st.just("edit"), NODES),
    st.tuples(st.just("fail")),
    st.tuples(st.just("pause"), st.sampled_from([0.0, 0.01, 0.15])),
)


def to_objects(state: desired_state.State, event: tuple[Any, ...]) -> None:
    match event:
        case ("watchlist", name, rules, labels, collector, priority):
            made = build.watchlist(
                name, *sorted(rules), labels=labels, collector=collector, priority=priority
            )
            state.watchlists[name] = made
        case ("no watchlist", name):
            state.watchlists.pop(name, None)
        case ("invalid", name):
            state.watchlists[name] = build.invalid_watchlist(name, "spec: bad")
        case ("collector", name, address):
            state.collectors[name] = build.collector(name, address=address)
        case ("no collector", name):
            state.collectors.pop(name, None)


async def to_cluster(fixture: Fixture, event: tuple[Any, ...]) -> None:
    match event:
        case ("node", name, labels):
            fixture.state.nodes[name] = build.node(name, f"10.0.0.{name[1]}", **labels)
        case ("no node", name):
            fixture.state.nodes.pop(name, None)
        case ("edit", name) if CONFIGS + name in fixture.api.objects:
            fixture.edit(name)
        case ("fail",):
            fixture.api.failures = 1
        case ("pause", seconds):
            await asyncio.sleep(seconds)


@settings(max_examples=30, deadline=None)
@given(st.lists(EVENTS, max_size=20))
def test_any_sequence_of_events_ends_in_a_full_compile_of_the_last_state(
    events: list[tuple[Any, ...]],
) -> None:
    async def work() -> None:
        async with running() as fixture:
            for event in events:
                to_objects(fixture.state, event)
                await to_cluster(fixture, event)
                fixture.reconciler.inputs_changed()
            await fixture.settled()
            managers = {
                (path.rsplit("/", 1)[-1] == "status", manager)
                for path, manager in fixture.api.writes
            }
            assert managers <= {
                (False, names.OPERATOR_MANAGER),
                (True, names.OPERATOR_STATUS_MANAGER),
            }

    asyncio.run(work())
