# SPDX-License-Identifier: Apache-2.0
"""Files make the same configuration as the API server would, are read again when they change, and bad ones change nothing."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from hostint_agent import interfaces, resolver, standalone
from hostint_api import NodeConfigSpec
from tests.agent.exports import Clock

COLLECTOR = """
apiVersion: hostint.dev/v1alpha1
kind: IntCollector
metadata: {name: default}
spec: {address: 192.0.2.9, port: 5000, dscp: 3}
"""


def watchlist(name: str = "shop", priority: int = 0, interval: str = "1s") -> str:
    return f"""
apiVersion: hostint.dev/v1alpha1
kind: IntWatchlist
metadata: {{name: {name}}}
spec:
  priority: {priority}
  report: {{interval: {interval}}}
  rules: [{{name: all}}]
"""


def files(directory: Path, *documents: str) -> list[Path]:
    path = directory / "objects.yaml"
    path.write_text("---".join(documents))
    return [path]


def compiled(paths: list[Path], node_id: int = 1, **addresses: str) -> NodeConfigSpec:
    return standalone.compile_objects(standalone.read_files(paths), node_id, addresses)


def test_objects_of_several_files_make_one_configuration(tmp_path):
    paths = files(tmp_path, watchlist())
    other = tmp_path / "collector.yaml"
    other.write_text(COLLECTOR)
    spec = compiled([*paths, other], 42)
    assert spec.node_id == 42
    assert [(str(c.address), c.port, c.dscp) for c in spec.collectors] == [("192.0.2.9", 5000, 3)]
    assert [(r.watchlist, r.name) for r in spec.rules] == [("shop", "all")]
    assert [(str(i.address), i.port) for i in spec.ignored] == [("192.0.2.9", 5000)]
    assert spec.digest


def test_higher_priority_comes_first_then_the_name(tmp_path):
    lists = (watchlist("b"), watchlist("c", priority=5), watchlist("a"))
    spec = compiled(files(tmp_path, COLLECTOR, *lists))
    assert [rule.watchlist for rule in spec.rules] == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ((watchlist(),), 'IntWatchlist shop: spec.collectorRef.name: Not found: "default"'),
        (
            (COLLECTOR, watchlist(interval="1ms")),
            'IntWatchlist shop: spec.report.interval: Invalid value: "1ms": must be at least 10ms',
        ),
        (
            (
                COLLECTOR.replace(
                    "address: 192.0.2.9, port: 5000", "service: {namespace: n, name: s}"
                ),
            ),
            "IntCollector default: spec.service: needs Kubernetes; give an address instead",
        ),
        (("a: [",), "not YAML"),
        ((COLLECTOR, COLLECTOR), "IntCollector default: is in"),
    ],
    ids=["no collector", "limit", "service", "yaml", "twice"],
)
def test_what_is_wrong_is_told_with_file_object_and_field(tmp_path, documents, words):
    paths = files(tmp_path, *documents)
    with pytest.raises(standalone.InvalidFiles) as raised:
        standalone.read_files(paths)
    assert str(raised.value).startswith(f"{paths[0]}: ")
    assert words in str(raised.value)


class Follower:
    """Follows files and names, and does things to them meanwhile. The first of `seen` is that of the start."""

    def __init__(self, paths: list[Path], names: resolver.Resolver | None = None) -> None:
        self.paths = paths
        self.names = names
        self.seen: list[NodeConfigSpec] = []

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.seen) < 1 + count:
                await asyncio.sleep(0.01)

    def run(self, scenario) -> None:
        async def both() -> None:
            followed = standalone.Configuration(self.paths, 1, self.names)
            await followed.look_up()
            self.seen.append(followed.spec())
            task = asyncio.create_task(followed.follow(self.seen.append))
            await asyncio.sleep(0.05)
            await scenario()
            task.cancel()

        asyncio.run(both())


def names(spec: NodeConfigSpec) -> list[str]:
    return [entry.name for entry in spec.watchlists]


def test_a_file_that_is_replaced_is_read_again(tmp_path):
    paths = files(tmp_path, COLLECTOR, watchlist("one"))
    follower = Follower(paths)

    async def scenario() -> None:
        fresh = tmp_path / "fresh"
        fresh.write_text(COLLECTOR + "---" + watchlist("two"))
        os.replace(fresh, paths[0])
        await follower.until(1)

    follower.run(scenario)
    assert names(follower.seen[-1]) == ["two"]


def test_a_bad_file_changes_nothing_until_it_is_good_again(tmp_path):
    paths = files(tmp_path, COLLECTOR, watchlist("one"))
    follower = Follower(paths)

    async def scenario() -> None:
        with structlog.testing.capture_logs() as logs:
            paths[0].write_text("kind: Nonsense")
            async with asyncio.timeout(10):
                while not logs:
                    await asyncio.sleep(0.01)
        assert len(follower.seen) == 1
        assert {entry["log_level"] for entry in logs} == {"error"}
        assert str(paths[0]) in logs[0]["error"]
        paths[0].write_text(COLLECTOR + "---" + watchlist("two"))
        await follower.until(1)

    follower.run(scenario)
    assert names(follower.seen[-1]) == ["two"]


def collector(name: str, address: str = "192.0.2.9") -> str:
    return COLLECTOR.replace("default", name).replace("192.0.2.9", address)


def test_more_than_a_node_takes_is_told_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "POLL_S", 0.02)
    many = [collector(f"c{n}", f"192.0.2.{n}") for n in range(1, 18)]
    paths = files(tmp_path, *many)
    with pytest.raises(standalone.InvalidFiles, match="collectors: Too many: 17"):
        standalone.Configuration(paths, 1)

    async def scenario() -> None:
        files(tmp_path, *many[:16])
        configuration = standalone.Configuration(paths, 1)
        seen: list[NodeConfigSpec] = []
        following = asyncio.create_task(configuration.follow(seen.append))
        with structlog.testing.capture_logs() as logs:
            files(tmp_path, *many)
            await becomes(lambda: logs)
        assert logs[0]["event"] == "file not used, the last good configuration stays"
        assert "collectors: Too many: 17" in logs[0]["error"]
        files(tmp_path, *many[:15])
        await becomes(lambda: seen)
        assert len(seen[0].collectors) == 15
        following.cancel()

    asyncio.run(scenario())


def test_one_collector_too_many_that_gets_its_address_later_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "POLL_S", 0.02)
    many = [collector(f"c{n}", f"192.0.2.{n}") for n in range(1, 17)]
    paths = files(tmp_path, *many, collector("late", "collector.example"))
    dns, clock = Dns(), Clock()

    async def scenario() -> None:
        configuration = standalone.Configuration(paths, 1, resolver.Resolver(dns, clock))
        await configuration.look_up()
        following = asyncio.create_task(configuration.follow(lambda _: None))
        with structlog.testing.capture_logs() as logs:
            dns.answer = ("192.0.2.99",)
            clock.now += 1
            await becomes(lambda: "file not used" in str(logs))
        assert not following.done()
        following.cancel()

    asyncio.run(scenario())


def test_a_file_that_goes_away_changes_nothing(tmp_path):
    paths = files(tmp_path, COLLECTOR, watchlist("one"))
    follower = Follower(paths)

    async def scenario() -> None:
        with structlog.testing.capture_logs() as logs:
            paths[0].unlink()
            async with asyncio.timeout(10):
                while not logs:
                    await asyncio.sleep(0.01)

    follower.run(scenario)
    assert len(follower.seen) == 1


NAMED = COLLECTOR.replace("192.0.2.9", "collector.example")


def test_collector_without_an_address_is_left_out_with_its_destination(tmp_path):
    paths = files(tmp_path, NAMED, watchlist())
    spec = compiled(paths)
    assert (spec.collectors, spec.ignored) == ((), ())
    assert names(spec) == ["shop"]
    spec = compiled(paths, **{"collector.example": "fd00::9"})
    assert [str(collector.address) for collector in spec.collectors] == ["fd00::9"]


class Dns:
    """Answers as a test has it, and counts what it is asked."""

    def __init__(self, *answer: str) -> None:
        self.answer = answer
        self.asked = 0

    def __call__(self, name: str) -> list[str]:
        assert name == "collector.example"
        self.asked += 1
        if not self.answer:
            raise OSError(-3, "Temporary failure in name resolution")
        return list(self.answer)


def addresses(spec: NodeConfigSpec) -> list[str]:
    return [str(collector.address) for collector in spec.collectors]


def test_agent_starts_without_dns_and_says_so_and_finds_the_collector_later(tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "POLL_S", 0.02)
    dns, clock = Dns(), Clock()
    follower = Follower(files(tmp_path, NAMED, watchlist()), resolver.Resolver(dns, clock))

    async def scenario() -> None:
        dns.answer = ("192.0.2.7",)
        await asyncio.sleep(0.1)
        assert dns.asked == 1, "it waits before it asks again"
        clock.now += 1
        await follower.until(1)

    with structlog.testing.capture_logs() as logs:
        follower.run(scenario)
    assert [addresses(spec) for spec in follower.seen] == [[], ["192.0.2.7"]]
    assert [(entry["event"], entry.get("error")) for entry in logs] == [
        (
            "collector name not resolved, nothing is reported to it; retrying",
            "Temporary failure in name resolution",
        ),
        ("collector name resolved", None),
    ]


def test_address_that_changes_is_followed_and_kept_while_dns_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "POLL_S", 0.02)
    dns, clock = Dns("192.0.2.7"), Clock()
    paths = files(tmp_path, NAMED, watchlist())
    follower = Follower(paths, resolver.Resolver(dns, clock))

    async def scenario() -> None:
        dns.answer = ("192.0.2.8",)
        await asyncio.sleep(0.1)
        assert dns.asked == 1
        clock.now += resolver.REFRESH_S
        await follower.until(1)
        dns.answer = ()
        clock.now += resolver.REFRESH_S
        await becomes(lambda: dns.asked == 3)
        # a file that changes meanwhile has the last known address
        paths[0].write_text(NAMED + "---" + watchlist("two"))
        await follower.until(2)

    follower.run(scenario)
    assert [addresses(spec) for spec in follower.seen] == [
        ["192.0.2.7"],
        ["192.0.2.8"],
        ["192.0.2.8"],
    ]
    assert names(follower.seen[-1]) == ["two"]


async def becomes(check: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not check():
            await asyncio.sleep(0.01)


def test_new_name_in_a_file_is_looked_up_before_it_goes_live(tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "POLL_S", 0.02)
    paths = files(tmp_path, COLLECTOR, watchlist())
    follower = Follower(paths, resolver.Resolver(Dns("192.0.2.7"), Clock()))

    async def scenario() -> None:
        paths[0].write_text(NAMED + "---" + watchlist("two"))
        await follower.until(1)

    follower.run(scenario)
    assert [addresses(spec) for spec in follower.seen] == [["192.0.2.9"], ["192.0.2.7"]]


@pytest.mark.parametrize(
    ("text", "number"), [("7", 7), ("10.0.0.1", 0x0A000001), ("4294967295", 0xFFFFFFFF)]
)
def test_a_node_id_is_a_number_or_an_address(text, number):
    assert standalone.parse_node_id(text) == number


@pytest.mark.parametrize("text", ["", "-1", "4294967296", "10.0.0", "::1", "x"])
def test_other_node_ids_are_refused(text):
    with pytest.raises(ValueError, match="is not 0..4294967295 or an IPv4 address"):
        standalone.parse_node_id(text)


def test_the_node_id_is_the_address_with_the_default_route():
    network = interfaces.Network(
        links=(),
        addresses={2: ("172.16.0.1",), 3: ("fe80::1", "10.0.0.1")},
        default_route=frozenset({3}),
    )
    assert standalone.default_node_id(network) == 0x0A000001
