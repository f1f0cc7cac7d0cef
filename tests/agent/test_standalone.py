# SPDX-License-Identifier: Apache-2.0
"""Files make the same configuration as the API server would, are read again when they change, and bad ones change nothing."""

import asyncio
import os
from pathlib import Path

import pytest
import structlog

from hostint_agent import interfaces, standalone
from hostint_api import NodeConfigSpec

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


def no_dns(name: str) -> str:
    raise OSError(-2, f"no such name {name}")


def test_objects_of_several_files_make_one_configuration(tmp_path):
    paths = files(tmp_path, watchlist())
    other = tmp_path / "collector.yaml"
    other.write_text(COLLECTOR)
    spec = standalone.compile_files([*paths, other], 42)
    assert spec.node_id == 42
    assert [(str(c.address), c.port, c.dscp) for c in spec.collectors] == [("192.0.2.9", 5000, 3)]
    assert [(r.watchlist, r.name) for r in spec.rules] == [("shop", "all")]
    assert [(str(i.address), i.port) for i in spec.ignored] == [("192.0.2.9", 5000)]
    assert spec.digest


def test_higher_priority_comes_first_then_the_name(tmp_path):
    lists = (watchlist("b"), watchlist("c", priority=5), watchlist("a"))
    spec = standalone.compile_files(files(tmp_path, COLLECTOR, *lists), 1)
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
        (
            (COLLECTOR.replace("192.0.2.9", "nowhere.invalid"),),
            'IntCollector default: spec.address: Invalid value: "nowhere.invalid": no such name',
        ),
        (("a: [",), "not YAML"),
        ((COLLECTOR, COLLECTOR), "IntCollector default: is in"),
    ],
    ids=["no collector", "limit", "service", "dns", "yaml", "twice"],
)
def test_what_is_wrong_is_told_with_file_object_and_field(tmp_path, documents, words):
    paths = files(tmp_path, *documents)
    with pytest.raises(standalone.InvalidFiles) as raised:
        standalone.compile_files(paths, 1, no_dns)
    assert str(raised.value).startswith(f"{paths[0]}: ")
    assert words in str(raised.value)


class Follower:
    """Follows files, and does things to them meanwhile."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.seen: list[NodeConfigSpec] = []

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.seen) < count:
                await asyncio.sleep(0.01)

    def run(self, scenario) -> None:
        async def both() -> None:
            task = asyncio.create_task(standalone.follow(self.paths, 1, self.seen.append))
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
        assert follower.seen == []
        assert {entry["log_level"] for entry in logs} == {"error"}
        assert str(paths[0]) in logs[0]["error"]
        paths[0].write_text(COLLECTOR + "---" + watchlist("two"))
        await follower.until(1)

    follower.run(scenario)
    assert names(follower.seen[-1]) == ["two"]


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
    assert follower.seen == []


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
        local=frozenset(),
        default_route=frozenset({3}),
    )
    assert standalone.default_node_id(network) == 0x0A000001
