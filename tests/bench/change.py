# SPDX-License-Identifier: Apache-2.0
"""How long a change of the rules takes: from a spec that has been read to tables that packets are judged by."""

import copy
import os
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostint_agent import classifier, loader, node_rules, spec_reader, tables
from hostint_api import NodeConfigSpec
from tests.bench import measure
from tests.bench.figure import Figure
from tests.bench.measure import Say
from tests.bench.node import bpf_dir

TAKES_S = (6, 40)
MANY, FEW = 10_000, 10
_MIDDLE = MANY // 2
_WATCHLIST_RULES = 256
_LARGE_ROUNDS = (1, 9)
_SMALL_ROUNDS = (3, 101)
# between two changes: programs that may still read the side that is to be written have ended
_PAUSE_S = 0.05
_COLLECTOR = {
    "name": "default",
    "address": "192.0.2.9",
    "port": 32766,
    "format": "TelemetryReportV05",
    "snapLength": 128,
    "dscp": 0,
    "reportsPerSecond": 0,
}
_SETTINGS = {
    "generation": 1,
    "collector": "default",
    "events": ["Flow", "Drop"],
    "intervalNs": 10**9,
    "latencyChangeNs": 0,
    "congestionLatencyNs": 0,
    "sample": 1,
}


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    pins = Path(f"/sys/fs/bpf/hostint-bench-{os.getpid()}-change")
    pins.mkdir()
    try:
        node = _Node(loader.load(pins, bpf_dir()) / "maps")
        say(f"{MANY:,} rules, of which there was none before")
        large = [node.large() for _ in range(_LARGE_ROUNDS[not quick])]
        say(f"one address, then one rule, of {MANY:,}")
        small = [node.small() for _ in range(_SMALL_ROUNDS[not quick])]
    finally:
        shutil.rmtree(pins)
    say("what the compiler keeps")
    return [*_figures(large, small), _memory()]


class _Node:
    """An agent's way from specs to tables."""

    def __init__(self, maps: Path) -> None:
        self._tables = tables.Tables(maps)
        self._reader = spec_reader.SpecReader()
        self._compiler = classifier.Compiler()
        self._program = node_rules.build(NodeConfigSpec(node_id=0))
        self._other = True

    def live(self, spec: NodeConfigSpec) -> float:
        """Make a spec live; how long it took, in seconds."""
        time.sleep(_PAUSE_S)
        started = time.perf_counter()
        before = self._program
        self._program = node_rules.build(
            spec, before.watchlist_indexes, before.collector_indexes, before.made
        )
        image = self._compiler.compile(self._program.rules)
        self._tables.commit(image, self._program.policies, self._program.collectors)
        return time.perf_counter() - started

    def large(self) -> float:
        """All rules, where there was none."""
        self.live(NodeConfigSpec(node_id=0))
        return self.live(self._reader.read(_spec(MANY)))

    def small(self) -> dict[str, float]:
        """One address changes, and one rule goes or comes back: seconds for each."""
        spec = _spec(MANY)
        self._other = not self._other
        if self._other:
            spec["rules"][_MIDDLE]["source"]["cidrs"] = ["10.200.3.0/24"]
        started = time.perf_counter()
        read = self._reader.read(spec)
        reading = time.perf_counter() - started
        cidr = self.live(read)
        shorter = copy.deepcopy(spec)
        del shorter["rules"][_MIDDLE + 100]
        gone = self.live(self._reader.read(shorter))
        back = self.live(self._reader.read(spec))
        return {"reading": reading, "cidr": cidr, "gone": gone, "back": back}


def _spec(count: int) -> dict[str, Any]:
    """As the API server would send it: in new objects every time."""
    rules = [
        {
            "id": number + 1,
            "watchlist": f"w{number // _WATCHLIST_RULES:03}",
            "name": f"r{number % _WATCHLIST_RULES}",
            "action": "Report",
            "protocol": "TCP",
            "source": {"cidrs": [f"10.{number % 100}.{number // 100}.0/24"]},
            "destination": {
                "cidrs": [f"10.96.{number % 200}.0/24"],
                "ports": [{"port": 80 + number % 50}],
            },
        }
        for number in range(count)
    ]
    names = sorted({str(rule["watchlist"]) for rule in rules})
    watchlists = [_SETTINGS | {"name": name} for name in names]
    return {"nodeID": 1, "collectors": [_COLLECTOR], "watchlists": watchlists, "rules": rules}


def _figures(large: list[float], small: list[dict[str, float]]) -> Iterator[Figure]:
    whole = measure.spread(large)
    yield whole.figure(
        "change_10000_rules_s", f"{MANY:,} new rules, to live", "s", compare="<=", goal=1.0
    )
    baseline = f"{1000 * whole.value:.0f} ms when all are new"
    cidr = measure.spread([taken["cidr"] for taken in small]).scaled(1000)
    yield cidr.figure(
        "change_one_cidr_ms",
        f"one address of {MANY:,} rules, to live",
        "ms",
        compare="<=",
        goal=20,
        baseline=baseline,
    )
    rules = [taken[which] for taken in small for which in ("gone", "back")]
    yield (
        measure.spread(rules)
        .scaled(1000)
        .figure("change_one_rule_ms", f"one rule more or less of {MANY:,}", "ms", baseline=baseline)
    )
    yield (
        measure.spread([taken["reading"] for taken in small])
        .scaled(1000)
        .figure("change_read_ms", f"reading a spec of {MANY:,} rules, one of them new", "ms")
    )


def _memory() -> Figure:
    kept = {}
    for count in (FEW, MANY):
        rules = node_rules.build(NodeConfigSpec.model_validate(_spec(count))).rules
        tracemalloc.start()
        compiler = classifier.Compiler()
        image = compiler.compile(rules)
        kept[count] = tracemalloc.get_traced_memory()[0] / 1e6
        tracemalloc.stop()
        del image
    return Figure(
        "compiler_memory_mb",
        f"what the compiler keeps of {MANY:,} rules",
        kept[MANY],
        "MB",
        baseline=f"{kept[FEW]:.1f} MB of {FEW} rules",
    )
