# SPDX-License-Identifier: Apache-2.0
"""A lab with an agent on every node and a collector: what most tests with traffic need."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from hostint_collector.embedded import CollectorThread
from hostint_collector.record import Record
from tests.lab.agent import LabAgent
from tests.lab.topology import Lab, Mode, Node, Pod

COLLECTOR = """
apiVersion: hostint.dev/v1alpha1
kind: IntCollector
metadata: {{name: default}}
spec: {{address: "{address}", port: {port}}}
---
"""


def watchlist(rules: str, report: str = "interval: 10ms, events: [Flow, Drop]", name="test") -> str:
    """A watchlist in YAML: flow-style rules, one a line, and flow-style report settings."""
    listed = "\n".join(f"  - {{name: r{i}, {r}}}" for i, r in enumerate(rules.strip().splitlines()))
    return (
        f"apiVersion: hostint.dev/v1alpha1\nkind: IntWatchlist\nmetadata: {{name: {name}}}\n"
        f"spec:\n  rules:\n{listed}\n  report: {{{report}}}\n---\n"
    )


@dataclass
class Scene:
    """The lab, its agents in the order of the nodes, and the collector."""

    lab: Lab
    agents: list[LabAgent]
    collector: CollectorThread

    @property
    def nodes(self) -> list[Node]:
        return self.lab.nodes

    def pods(self) -> tuple[Pod, Pod]:
        """One pod on the first node, one on the last."""
        return self.nodes[0].pods[0], self.nodes[-1].pods[0]

    def objects(self, *watchlists: str) -> str:
        """Objects that report to this scene's collector."""
        address, port = self.lab.collector_address, self.collector.port
        return COLLECTOR.format(address=address, port=port) + "".join(watchlists)

    def watch(self, *watchlists: str) -> None:
        """Make these watchlists live on every node, and forget what was reported before."""
        for agent in self.agents:
            agent.change(self.objects(*watchlists))
        self.quiet()
        self.collector.clear()

    def quiet(self, for_s: float = 0.3, timeout_s: float = 10.0) -> None:
        """Wait until no report has come for a while."""
        deadline = time.monotonic() + timeout_s
        total, since = self.collector.total, time.monotonic()
        while time.monotonic() - since < for_s and time.monotonic() < deadline:
            time.sleep(0.02)
            if self.collector.total != total:
                total, since = self.collector.total, time.monotonic()

    def reports(self, node: Node, kind: str = "flow", **inner: object) -> list[Record]:
        """Reports of one node whose inner packet has these fields (keys as in JSON)."""
        return [
            r
            for r in self.collector.records(kind)
            if r["nodeId"] == node.node_id and all(r["inner"][k] == v for k, v in inner.items())
        ]

    def wait_reports(
        self,
        node: Node,
        count: int = 1,
        kind: str = "flow",
        timeout_s: float = 5.0,
        **inner: object,
    ) -> list[Record]:
        """At least `count` such reports. Raises TimeoutError saying what came instead."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.reports(node, kind, **inner)) < count:
            if time.monotonic() > deadline:
                came = self.collector.records()[-6:]
                raise TimeoutError(
                    f"{len(found)} of {count} {kind} reports of {node.address} with {inner}; last: {came}"
                )
            time.sleep(0.02)
        return found


NOTHING = watchlist("source: {cidrs: [203.0.113.0/32]}")


@contextlib.contextmanager
def scene(mode: Mode = "routed", nodes: int = 2, *options: str) -> Iterator[Scene]:
    """Build it, watching nothing yet."""
    with Lab(nodes=nodes, mode=mode) as lab:
        collector = lab.collector.inside(lambda: CollectorThread(lab.collector_address))
        lab.on_exit(collector.stop)
        built = Scene(lab, [], collector)
        for node in lab.nodes:
            built.agents.append(LabAgent(lab, node, built.objects(NOTHING), *options).start())
        yield built
