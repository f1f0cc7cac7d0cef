# SPDX-License-Identifier: Apache-2.0
"""Drops whose reason does not say why are counted by function, on all CPUs, with few rights."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from hostint_agent import bpf_calls, bpf_types, kernel
from hostint_collector.embedded import CollectorThread
from tests.lab import deaths, traffic
from tests.lab import scene as scenes
from tests.lab.agent import LabAgent
from tests.lab.deaths import Outcome, Stage
from tests.lab.scene import Scene
from tests.lab.test_status import CONTAINER
from tests.lab.topology import Lab

pytestmark = pytest.mark.lab
COUNT = 3
NETWORK, NOWHERE = "10.201.0.0/16", "10.201.0.1"
UNSPECIFIED = "NOT_SPECIFIED"
WAIT_S = 10.0


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with deaths.stage("routed") as built:
        with built.commands(
            (f"ip route add blackhole {NETWORK}", f"ip route del blackhole {NETWORK}")
        ):
            yield built


@pytest.fixture
def functions(stage: Stage) -> Iterator[bpf_calls.Map]:
    """The map of functions, which is empty."""
    opened = bpf_calls.Map.open(stage.datapath.maps / "drop_functions")
    clear(opened)
    yield opened
    clear(opened)
    opened.close()


def clear(functions: bpf_calls.Map) -> None:
    for key in list(functions.keys()):
        functions.delete(key)


def index_of(reason: str) -> int:
    return {name: index for index, name in kernel.drop_reason_names().items()}[reason]


def put(functions: bpf_calls.Map, location: int, *by_cpu: tuple[int, bytes]) -> None:
    """Set (drops, symbol) of the first CPUs at a place that drops without a reason."""
    values = [bytes(bpf_types.DropFunction(count=n, name=name)) for n, name in by_cpu]
    site = bpf_types.DropSite(location=location, reason=index_of(UNSPECIFIED))
    value = b"".join(values).ljust(functions.stride * functions.cpus, b"\0")
    functions.update(bytes(site), value)


def blackhole(stage: Stage) -> Outcome:
    """Have the black-hole route drop packets."""
    return stage.outcome(lambda: stage.send(stage.client.namespace, NOWHERE, COUNT), COUNT)


def unknown(stage: Stage) -> int:
    return stage.datapath.counters.datapath()["drop_function_unknown"]


def test_full_map_counts_what_has_no_place(stage, functions):
    for number in range(bpf_types.MAX_DROP_FUNCTIONS):
        put(functions, 8 * number, (0, b"some_function+0x1/0x2"))
    before = unknown(stage)
    outcome = blackhole(stage)
    assert unknown(stage) - before == COUNT
    assert outcome.functions == {}
    assert outcome.reasons == {UNSPECIFIED: COUNT}
    assert len(outcome.reports) == 1


def test_full_map_takes_a_function_once_there_is_room(stage, functions):
    for number in range(bpf_types.MAX_DROP_FUNCTIONS):
        put(functions, 8 * number, (0, b"some_function+0x1/0x2"))
    functions.delete(next(functions.keys()))
    before = unknown(stage)
    assert blackhole(stage).functions == {(UNSPECIFIED, "ip_error"): COUNT}
    assert unknown(stage) == before


def test_only_the_first_drop_looks_the_name_up(stage, functions):
    blackhole(stage)
    (key,) = functions.keys()
    put(functions, bpf_types.DropSite.from_buffer_copy(key).location, (0, b"kept+0x1/0x2"))
    assert blackhole(stage).functions == {(UNSPECIFIED, "kept"): COUNT}


def test_drops_of_all_cpus_and_places_of_a_function_are_one_sum(stage, functions):
    if functions.cpus < 2:
        pytest.skip("needs two CPUs")
    put(functions, 8, (5, b""), (7, b"some_function+0x1/0x2"))
    put(functions, 16, (100, b"some_function+0x9/0x2"))
    put(functions, 24, (1, b"0xffffffff8148c3a2"))
    found = stage.datapath.counters.drop_functions(kernel.drop_reason_names())
    assert found == {UNSPECIFIED: {"some_function": 112, "unknown": 1}}


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """A node whose agent has the rights of its container from the start, and a black-hole route."""
    with Lab(nodes=1, mode="routed") as lab:
        collector = lab.collector.inside(lambda: CollectorThread(lab.collector_address))
        lab.on_exit(collector.stop)
        built = Scene(lab, [], collector)
        objects = built.objects(scenes.watchlist("protocol: UDP, source: {cidrs: [10.244.0.0/16]}"))
        command = (*CONTAINER, sys.executable, "-m", "hostint_agent")
        built.agents.append(LabAgent(lab, lab.nodes[0], objects, command=command).start())
        lab.nodes[0].namespace.run("ip", "route", "add", "blackhole", NETWORK)
        traffic.send_udp(lab.nodes[0].pods[0].namespace, NOWHERE, 4000, count=COUNT)
        yield built


def eventually(good: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not good() and time.monotonic() < deadline:
        time.sleep(0.1)


def run(agent: LabAgent, command: str, *more: str) -> str:
    """Run a command of the agent with the rights of its container."""
    whole = [*CONTAINER, sys.executable, "-m", "hostint_agent", command]
    return agent.node.namespace.run(*whole, "--pin-dir", str(agent.pin_dir), *more)


def logged(agent: LabAgent) -> list[dict[str, object]]:
    entries = []
    for line in agent.log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if entry.get("function")]


def test_function_is_in_the_metrics_of_an_agent_with_few_rights(scene):
    sample = f'hostint_drops_by_function_total{{function="ip_error",reason="{UNSPECIFIED}"}} '
    eventually(lambda: sample in scene.agents[0].get("/metrics"))
    assert f"{sample}{COUNT}.0" in scene.agents[0].get("/metrics")


def test_function_is_in_the_log_of_an_agent_with_few_rights(scene):
    eventually(lambda: bool(logged(scene.agents[0])))
    (entry,) = logged(scene.agents[0])
    assert entry["event"] == "packets dropped, kernel gives no reason"
    assert (entry["function"], entry["reason"]) == ("ip_error", UNSPECIFIED)
    assert 0 < entry["count"] <= COUNT


def test_function_is_in_status_and_counters(scene):
    agent = scene.agents[0]
    assert f"DROPS       {COUNT} {UNSPECIFIED} in ip_error\n" in run(
        agent, "status", "--interval", "0"
    )
    told = json.loads(run(agent, "counters"))
    assert told["drop_functions"] == {UNSPECIFIED: {"ip_error": COUNT}}
