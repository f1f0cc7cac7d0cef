# SPDX-License-Identifier: Apache-2.0
"""The agent on a real datapath: what goes live, what is refused, and what its status says of both."""

import asyncio
import errno
import ipaddress
import json
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import structlog

from hostint_agent import (
    agent,
    attach,
    bpf_calls,
    bpf_types,
    exporter,
    interfaces,
    kernel,
    loader,
    senders,
    settings,
    tables,
    unload,
)
from hostint_agent.loader import default_bpf_dir
from hostint_api import WatchlistState
from tests.agent import node_shapes
from tests.agent.test_node_rules import COLLECTOR, RULE, WATCHLIST, spec
from tests.agent.test_succession import put, words
from tests.lab import test_upgrade as upgrades
from tests.lab.namespace import Namespace, ip
from tests.pins import pin_directory

pytestmark = pytest.mark.bpf


@pytest.fixture(scope="module")
def pin_dir():
    with pin_directory("agent") as directory:
        yield directory
        unload.unload(directory)


# no interface: nothing of this machine is touched
NO_INTERFACES = interfaces.Patterns((), ("*",))


@pytest.fixture
def node() -> Iterator[Namespace]:
    """A network namespace with one interface, eth0."""
    namespace = Namespace(f"hostint-ag-{os.getpid()}")
    ip(f"netns add {namespace.name}")
    try:
        ip(f"-n {namespace.name} link add eth0 type ifb", f"-n {namespace.name} link set eth0 up")
        yield namespace
    finally:
        ip(f"netns del {namespace.name}")


def chosen(
    pin_dir: Path,
    state_dir: Path,
    bpf_dir: Path | None = None,
    patterns: interfaces.Patterns = NO_INTERFACES,
) -> settings.Settings:
    return settings.Settings(
        node="node-a",
        pin_dir=pin_dir,
        bpf_dir=bpf_dir or default_bpf_dir(),
        state_dir=state_dir,
        cgroup_root=Path(settings.DEFAULT_CGROUP_ROOT),
        http=None,
        patterns=patterns,
        mode="auto",
        log_level="info",
        log_format="auto",
    )


def with_agent(
    pin_dir: Path,
    state_dir: Path,
    scenario: Callable[[agent.Agent], Awaitable[None]],
    first: agent.Wanted | None = None,
    bpf_dir: Path | None = None,
    patterns: interfaces.Patterns = NO_INTERFACES,
) -> None:
    async def whole() -> None:
        process = agent.Agent(chosen(pin_dir, state_dir, bpf_dir, patterns), first)
        await asyncio.to_thread(process.start)
        try:
            await scenario(process)
        finally:
            await asyncio.to_thread(process.stop)

    asyncio.run(whole())


def datapath_config(pin_dir: Path, bpf_dir: Path | None = None) -> bpf_types.Config:
    """What the programs are told."""
    maps = loader.current(pin_dir, bpf_dir or default_bpf_dir()) / "maps"
    opened = bpf_calls.Map.open(maps / "config")
    try:
        return bpf_types.Config.from_buffer_copy(opened.lookup(bytes(4)))
    finally:
        opened.close()


def too_many() -> list[dict]:
    return [RULE | {"id": i + 1, "name": f"r{i}"} for i in range(15_000)]


def test_before_any_configuration_it_is_not_ready_and_has_no_status(pin_dir, tmp_path):
    async def scenario(process: agent.Agent) -> None:
        assert process.not_ready() == "no configuration yet"
        assert process.status() is None

    with_agent(pin_dir, tmp_path, scenario)


def test_a_configuration_goes_live_and_the_status_names_its_digest(pin_dir, tmp_path):
    async def scenario(process: agent.Agent) -> None:
        assert await process.apply(agent.Wanted(spec(digest="sha256:1"), 3))
        assert process.not_ready() is None
        assert process.not_alive() is None
        status = process.status()
        assert status
        assert (status.observed_generation, status.observed_digest) == (3, "sha256:1")
        assert [w.name for w in status.watchlists] == ["shop"]
        config = datapath_config(pin_dir)
        assert (config.node_id, config.enabled) == (1, 1)
        assert [(c.name, c.reachable) for c in status.collectors] == [("default", True)]

    with_agent(pin_dir, tmp_path, scenario)


def test_a_node_without_interfaces_is_not_ready_for_a_watchlist(pin_dir, tmp_path):
    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        (state,) = process.status().watchlists
        assert (state.ready, state.reason) == (False, "NoInterfaces")

    with_agent(pin_dir, tmp_path, scenario)


@pytest.fixture
def no_hooks(monkeypatch):
    """Nothing is attached: the interfaces are not those of this machine."""
    monkeypatch.setattr(attach.TcxHooks, "ensure", lambda *_: None)
    monkeypatch.setattr(attach.TcxHooks, "in_place", lambda _: True)


def on_node(monkeypatch, shape: node_shapes.Shape) -> None:
    network = node_shapes.read(shape)
    monkeypatch.setattr(interfaces, "read_network", lambda: network)


def state_of(process: agent.Agent) -> WatchlistState:
    (state,) = process.status().watchlists
    return state


ALL_INTERFACES = interfaces.Patterns()
WG0 = "the node's address 10.6.0.2 is on wg0, which is not watched: wg0 (kind wireguard) has no"


@pytest.mark.parametrize(
    ("patterns", "ready", "reason", "message"),
    [
        (ALL_INTERFACES, False, "UplinkNotWatched", WG0),
        # accepted
        (interfaces.Patterns(exclude=("wg*",)), True, "Programmed", ""),
    ],
    ids=["found", "excluded"],
)
def test_a_node_address_that_no_interface_sees_is_told(
    pin_dir, tmp_path, monkeypatch, no_hooks, patterns, ready, reason, message
):
    on_node(monkeypatch, node_shapes.WIREGUARD)

    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(nodeID=int(ipaddress.ip_address("10.6.0.2"))), 1))
        # the node's address was not known when the interfaces were looked at

        def is_told() -> bool:
            state = state_of(process)
            found = (state.ready, state.reason, state.message[: len(WG0)])
            looked = not process._attacher._look_wanted.is_set()
            return looked and found == (ready, reason, message)

        await becomes(is_told)

    with_agent(pin_dir, tmp_path, scenario, patterns=patterns)


def test_a_default_route_that_moves_out_of_sight_is_told(pin_dir, tmp_path, monkeypatch, no_hooks):
    later = node_shapes.read(node_shapes.FULL_TUNNEL)
    on_node(monkeypatch, node_shapes.NETKIT)

    async def scenario(process: agent.Agent) -> None:
        changed = asyncio.Event()
        await process.apply(agent.Wanted(spec(), 1))
        assert state_of(process).ready
        process.on_status = changed.set
        monkeypatch.setattr(interfaces, "read_network", lambda: later)
        await asyncio.to_thread(process._attacher.reconcile)
        await asyncio.wait_for(changed.wait(), 5)
        state = state_of(process)
        assert (state.ready, state.reason) == (False, "UplinkNotWatched")
        assert state.message.startswith("the default route is on tun0")

    with_agent(pin_dir, tmp_path, scenario, patterns=ALL_INTERFACES)


def test_a_name_that_is_not_utf_8_stops_no_status(pin_dir, tmp_path, monkeypatch, no_hooks):
    """The kernel takes any bytes for the name of an interface, JSON does not."""
    devices = [node_shapes.pod(4, "p\udcf6d")]
    on_node(monkeypatch, node_shapes.Shape(devices, []))
    monkeypatch.setattr(attach.TcxHooks, "ensure", no_detaching)

    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        state = state_of(process)
        assert (state.reason, state.message) == (
            "AttachFailed",
            "interface p\\udcf6d: [Errno 1] no detaching here",
        )

    with_agent(pin_dir, tmp_path, scenario, patterns=ALL_INTERFACES)


def test_a_step_that_fails_is_told(pin_dir, tmp_path, monkeypatch, no_hooks):
    on_node(monkeypatch, node_shapes.NETKIT)

    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        state = state_of(process)
        assert (state.ready, state.reason) == (False, "DatapathIncomplete")
        assert state.message == "drop program: [Errno 1] no tracepoint here"

    def no_tracepoint(_: object) -> None:
        raise OSError(errno.EPERM, "no tracepoint here")

    monkeypatch.setattr(attach.DropLink, "ensure", no_tracepoint)
    with_agent(pin_dir, tmp_path, scenario, patterns=ALL_INTERFACES)


def told(process: agent.Agent) -> tuple[bool, str, str]:
    """What the status says of the only watchlist."""
    (state,) = process.status().watchlists
    return state.ready, state.reason, state.message


def value(process: agent.Agent, name: str) -> float:
    """The only sample of a metric."""
    (sample,) = next(m for m in process.metrics() if m.name == name).samples
    return sample.value


def no_interfaces() -> None:
    raise OSError(errno.EPERM, "no netlink here")


def no_room(*_: object) -> None:
    raise OSError(errno.E2BIG, "no room in the chain")


@pytest.mark.parametrize(
    ("at", "name", "fault", "expected", "ready"),
    [
        (
            attach.TcxHooks,
            "ensure",
            no_room,
            ("AttachFailed", "interface eth0: [Errno 7] no room in the chain"),
            None,
        ),
        (
            interfaces,
            "read_network",
            no_interfaces,
            ("InterfacesUnknown", "[Errno 1] no netlink here"),
            "interfaces: [Errno 1] no netlink here",
        ),
    ],
    ids=["attach failed", "interfaces unknown"],
)
def test_status_names_what_keeps_a_watchlist_from_ready(
    pin_dir, tmp_path, node, monkeypatch, at, name, fault, expected, ready
):
    """Both from the start and where it worked before, and it is ready again as soon as the cause is gone."""

    async def until(process: agent.Agent, expected: tuple[bool, str, str]) -> None:
        async with asyncio.timeout(10):
            while told(process) != expected:
                await asyncio.sleep(0.02)

    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        assert told(process) == (False, *expected)
        assert process.status().watchlists_ready == "0/1"
        assert process.not_ready() == ready
        assert value(process, "hostint_interfaces_attached") == 0
        assert value(process, "hostint_interfaces_failed") == (ready is None)
        monkeypatch.undo()
        await until(process, (True, "Programmed", ""))
        assert process.status().watchlists_ready == "1/1"
        assert value(process, "hostint_interfaces_attached") == 1
        assert value(process, "hostint_interfaces_failed") == 0
        assert process.not_ready() is None
        monkeypatch.setattr(at, name, fault)
        ip(f"-n {node.name} link set eth0 mtu 1400")  # a reason to look at the interfaces
        await until(process, (False, *expected))

    monkeypatch.setattr(at, name, fault)
    patterns = interfaces.Patterns(include=("eth0",))
    node.inside(lambda: with_agent(pin_dir, tmp_path, scenario, patterns=patterns))


def test_message_is_cut_to_what_the_crd_takes(pin_dir, tmp_path, monkeypatch):
    def fault() -> None:
        raise OSError(errno.EPERM, "x" * 1000)

    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        assert told(process)[2] == f"[Errno 1] {'x' * 246}"

    monkeypatch.setattr(interfaces, "read_network", fault)
    with_agent(pin_dir, tmp_path, scenario)


def test_status_follows_the_health_of_collectors(pin_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "_CLOCK_INTERVAL_S", 0.02)
    good = senders.Health(True, "Sending", "reports go there")
    bad = senders.Health(False, "HostUnreachable", "y" * 1000)
    health = {"default": good}

    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        monkeypatch.setattr(process._exporter, "health", lambda: dict(health))
        told: asyncio.Queue[tuple[bool, str, str]] = asyncio.Queue()

        def look() -> None:
            (state,) = process.status().collectors
            told.put_nowait((state.reachable, state.reason, state.message))

        process.on_status = look
        time = asyncio.create_task(process.keep_time())
        for now, expected in (
            (good, (True, "Reachable", "")),
            (bad, (False, "HostUnreachable", "y" * 256)),
            (good, (True, "Reachable", "")),
        ):
            health["default"] = now
            async with asyncio.timeout(5):
                assert await told.get() == expected
        await asyncio.sleep(0.1)
        assert told.empty()
        time.cancel()

    with_agent(pin_dir, tmp_path, scenario)


def test_rules_go_live_after_their_destinations_are_known(pin_dir, tmp_path, monkeypatch):
    """A report that is due as soon as rules are live has somewhere to go."""
    order: list[tuple[list[str], bool]] = []
    commit = tables.Tables.commit

    async def scenario(process: agent.Agent) -> None:
        def look_first(*arguments: object) -> int:
            sending = process._exporter._thread is not None
            order.append((sorted(process._exporter.health()), sending))
            return commit(*arguments)

        monkeypatch.setattr(tables.Tables, "commit", look_first)
        await process.apply(agent.Wanted(spec(), 1))
        both = [COLLECTOR, COLLECTOR | {"name": "second"}]
        await process.apply(agent.Wanted(spec(collectors=both), 2))
        assert order == [(["default"], True), (["default", "second"], True)]

    with_agent(pin_dir, tmp_path, scenario)


@pytest.mark.parametrize(
    ("state", "name", "expected"), [("kept", "shop", 1000), ("lost", "another", 0)]
)
def test_counters_of_an_index_are_of_one_watchlist_only(pin_dir, tmp_path, state, name, expected):
    """A node that has lost its last good configuration gives the index to another watchlist."""

    async def older(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        index = process._program.watchlist_indexes.names["shop"]
        maps = loader.current(pin_dir, default_bpf_dir()) / "maps"
        put(maps, "watchlist_counters", index, words(watched=1000, reported=1000))
        assert value(process, "hostint_watched") == 1000

    async def newer(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(watchlists=[WATCHLIST | {"name": name}]), 2))
        assert value(process, "hostint_watched") == expected
        assert value(process, "hostint_reported") == expected

    with_agent(pin_dir, tmp_path / "kept", older)
    with_agent(pin_dir, tmp_path / state, newer)


def test_a_refused_configuration_leaves_the_old_rules_and_says_why(pin_dir, tmp_path):
    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        before = process._tables.generation
        assert not await process.apply(agent.Wanted(spec(rules=too_many()), 2))
        assert process._tables.generation == before
        (state,) = process.status().watchlists
        assert (state.ready, state.reason) == (False, "TooManyRules")
        assert process.status().observed_generation == 2
        assert value(process, "hostint_config_errors") == 1
        assert await process.apply(agent.Wanted(spec(), 3))
        assert value(process, "hostint_config_errors") == 1
        assert process.status().watchlists[0].reason != "TooManyRules"

    with_agent(pin_dir, tmp_path, scenario)


def test_no_configuration_any_more_means_no_rules(pin_dir, tmp_path):
    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        before = value(process, "hostint_generation")
        assert value(process, "hostint_rules") == 3
        assert await process.apply(agent.Wanted(None, 0))
        assert value(process, "hostint_rules") == 0
        assert value(process, "hostint_generation") == before + 1
        assert process.not_ready() is None

    with_agent(pin_dir, tmp_path, scenario)


def test_the_last_good_configuration_is_live_after_a_restart(pin_dir, tmp_path):
    async def first(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(nodeID=99), 1))

    async def second(process: agent.Agent) -> None:
        assert process.not_ready() is None
        assert len(process._program.rules) == 3
        assert process.topology()["nodeID"] == 99

    with_agent(pin_dir, tmp_path, first)
    with_agent(pin_dir, tmp_path, second)


@pytest.mark.parametrize("index", [0, 256, "1"])
def test_kept_index_that_no_map_has_is_replaced(pin_dir, tmp_path, index):
    async def first(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))

    async def second(process: agent.Agent) -> None:
        assert process._program.watchlist_indexes.names == {"shop": 1}
        assert set(process._program.policies) == {1}
        assert [rule.watchlist for rule in process._program.rules] == [0, 1, 1]

    with_agent(pin_dir, tmp_path, first)
    (kept,) = tmp_path.glob("*.json")
    data = json.loads(kept.read_text())
    data["watchlists"]["names"]["shop"] = index
    kept.write_text(json.dumps(data))
    with_agent(pin_dir, tmp_path, second)


def test_what_it_began_with_is_answered_and_not_written_again(pin_dir, tmp_path):
    first = agent.Wanted(spec(), 1)

    async def scenario(process: agent.Agent) -> None:
        before = process._tables.generation
        assert process.status() is None
        assert await process.apply(first)
        assert process.status().observed_generation == 1
        assert process._tables.generation == before
        assert await process.apply(agent.Wanted(spec(), 2))
        assert process._tables.generation == before + 1

    with_agent(pin_dir, tmp_path, scenario, first)


def test_what_it_could_not_begin_with_is_refused_when_it_is_applied(pin_dir, tmp_path):
    first = agent.Wanted(spec(rules=too_many()), 1)

    async def scenario(process: agent.Agent) -> None:
        assert not await process.apply(first)
        assert process.status().watchlists[0].reason == "TooManyRules"

    with_agent(pin_dir, tmp_path, scenario, first)


def test_a_place_keeps_its_name_over_a_restart(pin_dir, tmp_path):
    later = [WATCHLIST | {"name": "a-later-one"}, WATCHLIST]
    places = []

    async def first(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        places.append(process._program.watchlist_indexes.names["shop"])

    async def second(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(watchlists=later), 2))
        places.append(process._program.watchlist_indexes.names["shop"])

    with_agent(pin_dir, tmp_path, first)
    with_agent(pin_dir, tmp_path, second)
    assert places[0] == places[1]


def test_a_watchlist_without_its_collector_is_not_said_to_work(pin_dir, tmp_path, node):
    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(collectors=[COLLECTOR | {"name": "other"}]), 1))
        words = "collector 'default' is not among this node's collectors"
        assert told(process) == (False, "CollectorNotFound", words)
        await process.apply(agent.Wanted(spec(), 2))
        assert told(process) == (True, "Programmed", "")

    patterns = interfaces.Patterns(include=("eth0",))
    node.inside(lambda: with_agent(pin_dir, tmp_path, scenario, patterns=patterns))


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        (attach.Attacher, "the attach thread has ended"),
        (exporter.Exporter, "the export thread has ended"),
    ],
    ids=["attach", "export"],
)
def test_agent_whose_thread_has_ended_is_not_alive(pin_dir, tmp_path, monkeypatch, at, reason):
    """Half an agent must not look like a whole one: the process ends, and says why."""

    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        async with asyncio.timeout(5):
            while process.not_alive() is None:
                await asyncio.sleep(0.01)
            assert process.not_alive() == reason
            with pytest.raises(RuntimeError, match=reason):
                await process.keep_time()

    monkeypatch.setattr(at, "_run", lambda *_: None)
    with_agent(pin_dir, tmp_path, scenario)


def test_metrics_carry_the_name_of_the_watchlist(pin_dir, tmp_path):
    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        watched = next(m for m in process.metrics() if m.name == "hostint_watched")
        assert [(s.labels, s.value) for s in watched.samples] == [({"watchlist": "shop"}, 0)]

    with_agent(pin_dir, tmp_path, scenario)


async def becomes(check: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not check():
            await asyncio.sleep(0.02)


def test_health_that_fails_once_ends_nothing(pin_dir, tmp_path, monkeypatch):
    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        faults = [OSError(errno.ENOMEM, "no memory"), ValueError("not thought of")]
        asked = []

        def health() -> dict[str, senders.Health]:
            asked.append(1)
            if faults:
                raise faults.pop()
            return {"default": senders.Health(False, "NoRoute", "network unreachable")}

        changed = []
        process.on_status = lambda: changed.append(1)
        monkeypatch.setattr(process._exporter, "health", health)
        keeping = asyncio.create_task(process.keep_time())
        with structlog.testing.capture_logs() as logs:
            await becomes(lambda: changed)
        assert not keeping.done()
        keeping.cancel()
        assert [entry["event"] for entry in logs] == [
            *["health of collectors or drops not known, retrying"] * 2,
            "collector not reachable",
        ]

    monkeypatch.setattr(agent, "_CLOCK_INTERVAL_S", 0.02)
    with_agent(pin_dir, tmp_path, scenario)


def drop_function(process: agent.Agent, location: int, reason: int, count: int) -> None:
    """Count drops as the drop program does."""
    functions = process._counters._functions
    site = bpf_types.DropSite(location=location, reason=reason)
    first = bytes(bpf_types.DropFunction(count=count, name=b"some_function+0x1/0x2"))
    functions.update(bytes(site), first.ljust(functions.stride * functions.cpus, b"\0"))


def test_each_function_that_drops_packets_is_logged_once(pin_dir, tmp_path, monkeypatch):
    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        unspecified = {name: i for i, name in process._names.items()}["NOT_SPECIFIED"]
        keeping = asyncio.create_task(process.keep_time())
        with structlog.testing.capture_logs() as logs:
            drop_function(process, 8, unspecified, 3)
            await becomes(lambda: logs)
            drop_function(process, 8, unspecified, 4)
            drop_function(process, 16, 255, 5)
            await becomes(lambda: len(logs) > 1)
            await asyncio.sleep(0.1)
        keeping.cancel()
        drops = [entry for entry in logs if entry["event"].startswith("packets dropped")]
        assert [(e["event"], e["reason"], e["function"], e["count"]) for e in drops] == [
            (
                "packets dropped, kernel gives no reason",
                *("NOT_SPECIFIED", "some_function", 3),
            ),
            ("packets dropped, reason has no code", "reason 255", "some_function", 5),
        ]

    monkeypatch.setattr(agent, "_CLOCK_INTERVAL_S", 0.02)
    with_agent(pin_dir, tmp_path, scenario)


def test_a_look_at_collectors_that_waits_keeps_the_event_loop_from_nothing(
    pin_dir, tmp_path, monkeypatch
):
    """A collector without a socket is tried again when nothing is being sent, which may take seconds."""

    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        waiting, go_on = threading.Event(), threading.Event()

        def recheck() -> None:
            waiting.set()
            assert go_on.wait(30)

        monkeypatch.setattr(process._exporter, "recheck", recheck)
        keeping = asyncio.create_task(process.keep_time())
        await becomes(waiting.is_set)
        await asyncio.sleep(0.05)
        assert not go_on.is_set()
        go_on.set()
        keeping.cancel()

    monkeypatch.setattr(agent, "_CLOCK_INTERVAL_S", 0.02)
    with_agent(pin_dir, tmp_path, scenario)


def test_wall_clock_that_is_set_is_followed(pin_dir, tmp_path, monkeypatch):
    async def scenario(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        keeping = asyncio.create_task(process.keep_time())
        monkeypatch.setattr(kernel, "wall_offset_ns", lambda: -5)
        await becomes(lambda: process._config._config.wall_offset_ns == (1 << 64) - 5)
        keeping.cancel()

    monkeypatch.setattr(agent, "_CLOCK_INTERVAL_S", 0.02)
    with_agent(pin_dir, tmp_path, scenario)


def test_http_thread_that_has_ended_ends_the_process(pin_dir, tmp_path, monkeypatch):
    async def scenario(process: agent.Agent) -> None:
        process._serving = lambda: False
        with pytest.raises(RuntimeError, match="the http thread has ended"):
            await process.keep_time()

    monkeypatch.setattr(agent, "_CLOCK_INTERVAL_S", 0.02)
    with_agent(pin_dir, tmp_path, scenario)


def no_detaching(*_: object) -> None:
    raise OSError(errno.EPERM, "no detaching here")


@pytest.mark.parametrize(
    ("at", "name", "fault", "reason", "message"),
    [
        (
            attach.Attacher,
            "detach_others",
            no_detaching,
            "UpgradeIncomplete",
            "reports are held back until older programs are gone: [Errno 1] no detaching here",
        ),
        (
            attach.DropLink,
            "ensure",
            no_detaching,
            "UpgradeIncomplete",
            "reports are held back until older programs are gone",
        ),
        (
            interfaces,
            "read_network",
            no_interfaces,
            "InterfacesUnknown",
            "[Errno 1] no netlink here",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_an_upgrade_that_cannot_be_completed_is_said_so_and_completed_later(
    pin_dir, tmp_path, monkeypatch, at, name, fault, reason, message
):
    """Until then both builds stay, and the new one reports nothing."""
    second = upgrades.version(tmp_path, "second", other_maps=True)

    async def older(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))

    async def newer(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 2))
        assert told(process) == (False, reason, message)
        assert value(process, "hostint_hold") == 1
        assert datapath_config(pin_dir, second).hold == 1
        assert len(loader.builds(pin_dir)) == 2
        changed = asyncio.Event()
        process.on_status = changed.set
        monkeypatch.undo()
        async with asyncio.timeout(40):
            while told(process)[1] != "NoInterfaces":
                await changed.wait()
                changed.clear()
        assert value(process, "hostint_hold") == 0
        assert datapath_config(pin_dir, second).hold == 0
        assert loader.builds(pin_dir) == [loader.current(pin_dir, second)]

    with_agent(pin_dir, tmp_path, older)
    monkeypatch.setattr(at, name, fault)
    try:
        with_agent(pin_dir, tmp_path, newer, bpf_dir=second)
    finally:
        unload.unload(pin_dir)


@pytest.mark.parametrize(
    ("state", "name", "expected"), [("kept", "shop", 1000), ("lost", "another", 0)]
)
def test_what_an_older_datapath_counted_for_a_watchlist_is_not_given_to_another_one(
    pin_dir, tmp_path, state, name, expected
):
    """A node that has lost its last good configuration gives the places away anew."""
    second = upgrades.version(tmp_path, "second", other_maps=True)
    watchlists = [WATCHLIST | {"name": name}]

    async def older(process: agent.Agent) -> None:
        await process.apply(agent.Wanted(spec(), 1))
        place = process._program.watchlist_indexes.names["shop"]
        maps = loader.current(pin_dir, default_bpf_dir()) / "maps"
        put(maps, "watchlist_counters", place, words(watched=1000, reported=1000))

    async def newer(process: agent.Agent) -> None:
        watched = next(m for m in process.metrics() if m.name == "hostint_watched")
        assert [(s.labels["watchlist"], s.value) for s in watched.samples] == [(name, expected)]

    first = agent.Wanted(spec(watchlists=watchlists), 2)
    try:
        with_agent(pin_dir, tmp_path / "kept", older)
        with_agent(pin_dir, tmp_path / state, newer, first, bpf_dir=second)
    finally:
        unload.unload(pin_dir)
