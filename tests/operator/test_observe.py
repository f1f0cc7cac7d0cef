# SPDX-License-Identifier: Apache-2.0
"""What is read of the cluster's own kinds, and that State follows it."""

import asyncio
import contextlib
import ipaddress
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import pytest

from hostint_api import names
from hostint_operator import compile as compiler
from hostint_operator import desired_state, observe
from tests.operator import build
from tests.operator.test_compile import plan

NODES, SERVICES = "/api/v1/nodes", "/api/v1/services"
PODS = "/api/v1/namespaces/ns/pods"
CONFIGS = f"/apis/{names.API_VERSION}/{names.NODE_CONFIGS}"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices"


class Collections:
    """An API server with lists by path, and watches that say what a test has them say."""

    def __init__(self) -> None:
        self.items: dict[str, list[dict[str, Any]]] = {}
        self.asked: list[tuple[str, str]] = []  # path and label selector
        self._lines: dict[str, asyncio.Queue[bytes]] = {}

    async def request(
        self, method: str, path: str, *, query: Mapping[str, str], timeout_s: float
    ) -> bytes:
        assert method == "GET"
        self.asked.append((path, query.get("labelSelector", "")))
        listed = {"metadata": {"resourceVersion": "5"}, "items": self.items.get(path, [])}
        return json.dumps(listed).encode()

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, query: Mapping[str, str], timeout_s: float
    ) -> AsyncIterator["_Lines"]:
        yield _Lines(self._lines.setdefault(path, asyncio.Queue()))

    def tell(self, path: str, kind: str, item: dict[str, Any]) -> None:
        """Have the watch of a collection send an event."""
        line = json.dumps({"type": kind, "object": item}).encode() + b"\n"
        self._lines.setdefault(path, asyncio.Queue()).put_nowait(line)


class _Lines:
    def __init__(self, lines: asyncio.Queue[bytes]) -> None:
        self._lines = lines

    async def readline(self) -> bytes:
        return await self._lines.get()


class World:
    """Observers of such an API server; what they told."""

    def __init__(self, api: Collections) -> None:
        self.api = api
        self.state = desired_state.State()
        self.inputs = 0
        self.nodes: list[str] = []
        self.observers = observe.Observers(
            api,  # type: ignore[arg-type]
            self.state,
            "ns",
            self._inputs,
            self.nodes.append,
        )

    def _inputs(self) -> None:
        self.inputs += 1


def run(test: Callable[[World], Awaitable[None]], **items: Any) -> None:
    """Run a test on observers that have listed `items`, by path."""

    async def work() -> None:
        api = Collections()
        api.items = {globals()[name.upper()]: listed for name, listed in items.items()}
        world = World(api)
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            tasks = [group.create_task(r.run()) for r in world.observers.reflectors.values()]
            await world.observers.synced()
            await test(world)
            world.observers.follow_services([])
            for task in tasks:
                task.cancel()

    asyncio.run(work())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def metadata(name: str, version: int = 1, **more: Any) -> dict[str, Any]:
    return {"name": name, "uid": f"uid-{name}", "resourceVersion": str(version)} | more


def addresses(*texts: str) -> tuple[desired_state.Address, ...]:
    return tuple(ipaddress.ip_address(text) for text in texts)


def test_node_is_read_with_its_internal_addresses_only() -> None:
    found = [
        {"type": "Hostname", "address": "n1"},
        {"type": "ExternalIP", "address": "198.51.100.1"},
        {"type": "InternalIP", "address": "10.0.0.1"},
        {"type": "InternalIP", "address": "fd00::1"},
    ]
    node = {"metadata": metadata("n1", labels={"a": "b"}), "status": {"addresses": found}}

    async def test(world: World) -> None:
        seen = world.state.nodes[desired_state.NodeName("n1")]
        assert (seen.uid, seen.labels) == ("uid-n1", {"a": "b"})
        assert seen.internal_addresses == addresses("10.0.0.1", "fd00::1")
        assert world.inputs == 1

    run(test, nodes=[node])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00::7"]},
            ("10.96.0.7", "fd00::7"),
        ),
        ({"clusterIP": "10.96.0.7"}, ("10.96.0.7",)),
        ({"clusterIP": "None", "clusterIPs": ["None"]}, ()),
        ({"type": "ExternalName"}, ()),
    ],
)
def test_service_has_all_cluster_addresses_and_udp_ports(
    spec: dict[str, Any], expected: tuple[str, ...]
) -> None:
    ports = [
        {"name": "reports", "port": 4000, "protocol": "UDP"},
        {"name": "web", "port": 80, "protocol": "TCP"},
        {"port": 53},
    ]
    service = {"metadata": metadata("svc", namespace="ns"), "spec": spec | {"ports": ports}}

    async def test(world: World) -> None:
        assert world.state.services == {
            "ns/svc": desired_state.Service(
                addresses(*expected), (desired_state.ServicePort("reports", 4000),)
            )
        }

    run(test, services=[service])


def endpoint(address: str, **conditions: bool) -> dict[str, Any]:
    return {"addresses": [address], "conditions": conditions}


SLICE = {
    "metadata": metadata("svc-1", namespace="ns", labels={observe.SERVICE_LABEL: "svc"}),
    "endpoints": [
        endpoint("10.0.0.1", ready=True),
        endpoint("10.0.0.2"),
        endpoint("10.0.0.3", ready=False),
        endpoint("collector.example"),
    ],
    "ports": [
        {"name": "reports", "port": 5000, "protocol": "UDP"},
        {"name": "web", "port": 80, "protocol": "TCP"},
        {"name": "any", "protocol": "UDP"},
    ],
}


def test_endpoints_of_a_followed_service_are_read_and_forgotten() -> None:
    """Readiness that is not known counts as ready, as the API says."""

    async def test(world: World) -> None:
        world.observers.follow_services(["ns/svc", "ns/other"])
        await until(lambda: world.observers.services_synced("ns/svc"))
        assert world.state.slices["ns/svc-1"] == desired_state.EndpointSlice(
            "ns/svc",
            addresses("10.0.0.1", "10.0.0.2"),
            addresses("10.0.0.3"),
            (desired_state.ServicePort("reports", 5000),),
        )
        world.observers.follow_services(["ns/other"])
        assert world.state.slices == {}
        assert not world.observers.services_synced("ns/svc")

    run(test, slices=[SLICE])


def test_name_of_a_service_stays_a_name_in_a_request() -> None:
    """Users write it: it must lead to no other path, and select by no other label."""

    async def test(world: World) -> None:
        world.observers.follow_services(["a/b/c?d=e,f", "x y/z"])
        await until(lambda: len(world.api.asked) == 6)
        begin = "/apis/discovery.k8s.io/v1/namespaces"
        assert {asked for asked in world.api.asked if asked[0].startswith(begin)} == {
            (f"{begin}/a/endpointslices", f"{observe.SERVICE_LABEL}=b%2Fc%3Fd%3De%2Cf"),
            (f"{begin}/x%20y/endpointslices", f"{observe.SERVICE_LABEL}=z"),
        }

    run(test)


def pod(node: str, ready: str, version: int = 1) -> dict[str, Any]:
    conditions = [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": ready}]
    return {
        "metadata": metadata("agent", version),
        "spec": {"nodeName": node},
        "status": {"conditions": conditions},
    }


def test_agent_counts_while_its_pod_is_ready_on_its_node() -> None:
    async def test(world: World) -> None:
        assert (PODS, f"{names.AGENT_LABEL}={names.AGENT_NAME}") in world.api.asked
        assert world.state.nodes_with_agent() == set()
        world.nodes.clear()
        world.api.tell(PODS, "MODIFIED", pod("n1", "True", 6))
        await until(lambda: world.state.nodes_with_agent() == {"n1"})
        world.api.tell(PODS, "MODIFIED", pod("n2", "True", 7))
        await until(lambda: world.state.nodes_with_agent() == {"n2"})
        world.api.tell(PODS, "DELETED", pod("n2", "True", 8))
        await until(lambda: world.state.nodes_with_agent() == set())
        assert world.nodes == ["n1", "n1", "n1", "n2", "n2"]

    run(test, pods=[pod("n1", "False")])


N1 = build.node("n1", "10.0.0.1")
SPEC = compiler.node_spec(plan([build.watchlist("w")]), N1)
WRITTEN = SPEC.model_dump(mode="json", by_alias=True, exclude_none=True)
OWNERS = [{"kind": "Pod", "uid": "p"}, {"kind": "Node", "uid": "n"}]


def config(version: int = 1, spec: Mapping[str, Any] = WRITTEN, **more: Any) -> dict[str, Any]:
    return {"metadata": metadata("n1", version, ownerReferences=OWNERS), "spec": spec, **more}


@pytest.mark.parametrize(
    ("spec", "digest"),
    [
        (WRITTEN, SPEC.digest),
        (WRITTEN | {"nodeID": 1}, ""),
        (WRITTEN | {"digest": f"sha256:{0:064}"}, ""),
        (WRITTEN | {"rules": []}, ""),
        (WRITTEN | {"nodeID": -1}, ""),
        ({}, ""),
    ],
    ids=["as written", "node id", "digest", "rules", "not valid", "empty"],
)
def test_digest_of_a_config_is_that_of_what_is_there(spec: dict[str, Any], digest: str) -> None:
    async def test(world: World) -> None:
        seen = world.state.node_configs[N1.name]
        assert (seen.digest, seen.owner_uid) == (digest, "n")

    run(test, configs=[config(spec=spec)])


def test_what_an_agent_says_is_read() -> None:
    said = {
        "observedDigest": "d",
        "watchlists": [{"name": "w", "generation": 3, "ready": True, "reason": "R"}],
        "collectors": [{"name": "c", "reachable": False, "reason": "NoRoute", "message": "m"}],
    }

    async def test(world: World) -> None:
        seen = world.state.node_configs[N1.name]
        assert seen.observed_digest == "d"
        assert seen.watchlists == {"w": desired_state.WatchlistOnNode(3, True, "R", "")}
        assert seen.collectors == {"c": desired_state.CollectorOnNode(False, "NoRoute", "m")}

    run(test, configs=[config(status=said)])


def test_config_that_our_own_write_made_newer_is_not_set_back() -> None:
    """The answer to a write comes before the event of the write before it; another object is always taken."""

    async def test(world: World) -> None:
        name = N1.name
        _, newer = observe.read_node_config(observe.WireNodeConfig.model_validate(config(9)))
        world.state.node_configs[name] = newer
        world.nodes.clear()
        world.api.tell(CONFIGS, "MODIFIED", config(7, spec={}))
        await until(lambda: world.nodes == ["n1"])
        assert world.state.node_configs[name] is newer
        again = config(8)
        again["metadata"]["uid"] = "uid-again"
        world.api.tell(CONFIGS, "MODIFIED", again)
        await until(lambda: world.state.node_configs[name].uid == "uid-again")
        world.api.tell(CONFIGS, "DELETED", again)
        await until(lambda: world.state.node_configs == {})

    run(test, configs=[config()])
