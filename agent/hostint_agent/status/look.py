# SPDX-License-Identifier: Apache-2.0
"""What this node's datapath is like now, read from the pinned maps and the kernel, with or without an agent; nothing is changed.

Only data: how a person is told is `status_text`'s business.
"""

import errno
import importlib.metadata
import ipaddress
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hostint_agent import (
    bpf_calls,
    bpf_types,
    counters,
    interfaces,
    kernel,
    last_good,
    loader,
    pinned,
    report_rings,
)
from hostint_agent.status import hook_orders, map_contents, tallies


class NoStatus(Exception):
    """There is nothing to tell of; the text says why."""


@dataclass(frozen=True, slots=True)
class Where:
    """What to look at: pins and sources of the programs; whose last good configuration has names.

    `patterns` and `addresses` (of the node) are those of the agent, as in choice.unseen.
    """

    pin_dir: Path
    bpf_dir: Path
    state_dir: Path
    node: str
    patterns: interfaces.Patterns = field(default_factory=interfaces.Patterns)
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Watchlist:
    """A watchlist and what was counted for it."""

    name: str
    live: bool  # False: its collector is none of this node's
    rules: int  # directed ones
    collector: str
    pending: int  # packets that wait in a slot
    counters: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Collector:
    """Where reports go, or went: what failed is told as long as it is counted."""

    name: str
    live: bool
    address: str | None  # None: only its place in the maps is known
    port: int
    reports_per_second: int  # 0: no limit
    sent: int
    failed: int


@dataclass(frozen=True, slots=True)
class Ring:
    """A report ring: how many records wait for the agent, of how many that have room."""

    cpu: int
    kind: str
    waiting: int
    size: int


@dataclass(frozen=True, slots=True)
class Status:
    """Everything there is to tell."""

    version: str  # of this command
    node: str
    node_id: int
    pin_dir: str
    agent_running: bool
    agent_pid: (
        int | None
    )  # None as well where it cannot be seen: it may be in another PID namespace
    build: str
    sources_build: str | None  # what this command's own sources would be; None: it has none
    loaded_s: float  # ago
    enabled: bool
    holding: bool  # reports back, until an upgrade is complete
    own_namespace: (
        bool  # False: the datapath belongs to another network namespace than this command
    )
    configuration: (
        int | None
    )  # generation of the last good one; None: there is none, and names are not known
    programs: Mapping[str, bpf_calls.ProgramInfo]
    interfaces: tuple[hook_orders.Interface, ...]
    unseen: tuple[str, ...]  # traffic of the node that passes them by
    generation: int
    rules: int  # directed ones of watchlists
    own_rules: int  # that keep reports unwatched
    watchlists: tuple[Watchlist, ...]
    drops: Mapping[str, int]
    drop_functions: Mapping[str, Mapping[str, int]]  # by reason, by function
    collectors: tuple[Collector, ...]
    flows: int
    flow_places: int
    slots: Mapping[str, int]
    rings: tuple[Ring, ...]
    rates: tallies.Rates | None
    losses: tuple[tallies.Loss, ...]


def gather(where: Where, interval_s: float) -> Status:
    """Look, and look again after so long for what there is a second; 0: only once. Raises NoStatus, or OSError."""
    build = None
    try:
        build = pinned.loaded_build(where.pin_dir, where.bpf_dir)
        if build is None:
            lost = pinned.pins_lost(where.pin_dir)
            raise NoStatus(lost or f"no datapath is loaded at {where.pin_dir}")
        return _Look(build, where).status(interval_s)
    except OSError as error:
        # by hand, or while it is unloaded or replaced
        if error.errno != errno.ENOENT:
            raise
        what = build or where.pin_dir
        raise NoStatus(f"the datapath {what} is not complete: no {error.filename}") from error
    except (struct.error, IndexError, ValueError) as error:
        if build is None or build.name == pinned.sources_build(where.bpf_dir):
            raise
        words = f"the datapath {build} is of another version, whose maps this command cannot read"
        raise NoStatus(f"{words}: {error}") from error


class _Look:
    """One look at a build: what is live is that of its beginning, what is counted that of its end."""

    def __init__(self, build: Path, where: Where) -> None:
        self._build, self._where, self._maps = build, where, build / "maps"
        self._counters = counters.Counters(self._maps)
        self._rings = report_rings.Rings(self._maps)
        self._live = map_contents.live(self._maps)
        self._good = good = last_good.load(where.state_dir, where.node)
        # names by place; what is live without a name that we know has its place for one
        names = good.watchlists.names if good else {}
        self._watchlist_names = _by_place(names, self._live.policies)
        names = good.collectors.names if good else {}
        failed = (place for place, c in enumerate(self._rings.counters) if c.failed)
        self._collector_names = _by_place(names, {*self._live.collectors, *failed})

    def status(self, interval_s: float) -> Status:
        """Everything; takes as long as the interval and some milliseconds."""
        before = self._tally() if interval_s else None
        time.sleep(interval_s)
        now = self._tally()
        config, slots = pinned.config(self._build), self._counters.slots()
        running, pid = pinned.agent(self._where.pin_dir)
        programs = {name: pinned.program(self._build, name) for name in loader.programs()}
        own_namespace = config.netns_cookie in (0, kernel.netns_cookie())
        ids = {name: program.id for name, program in programs.items()}
        hooks = self._hooks(ids, config.node_id) if own_namespace else None
        names = kernel.drop_reason_names()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - programs["drop"].loaded_ns / 1e9
        return Status(
            version=importlib.metadata.version("hostint"),
            node=self._where.node,
            node_id=config.node_id,
            pin_dir=str(self._where.pin_dir),
            agent_running=running,
            agent_pid=pid,
            build=self._build.name,
            sources_build=pinned.sources_build(self._where.bpf_dir),
            loaded_s=age_s,
            enabled=bool(config.enabled),
            holding=bool(config.hold),
            own_namespace=own_namespace,
            configuration=self._good.generation if self._good else None,
            programs=programs,
            interfaces=hooks.interfaces if hooks else (),
            unseen=hooks.unseen if hooks else (),
            generation=self._live.generation,
            rules=sum(n for place, n in self._live.rules.items() if place),
            own_rules=self._live.rules.get(0, 0),
            watchlists=tuple(self._watchlists(now, slots)),
            drops=self._counters.drops(names),
            drop_functions=self._counters.drop_functions(names),
            collectors=tuple(self._collectors(now)),
            flows=map_contents.flows(self._maps),
            flow_places=bpf_types.NR_FLOW_SETS * bpf_types.FLOW_WAYS,
            slots=slots.states,
            rings=tuple(self._ring_states()),
            rates=tallies.rates(before, now) if before else None,
            losses=tallies.losses(before, now),
        )

    def _hooks(self, programs: Mapping[str, int], node_id: int) -> hook_orders.Hooks:
        addresses = {*self._where.addresses, str(ipaddress.IPv4Address(node_id))}
        return hook_orders.read(self._maps, programs, addresses, self._where.patterns)

    def _tally(self) -> tallies.Tally:
        exported = self._rings.counters
        return tallies.Tally(
            at_s=time.monotonic(),
            watchlists={n: self._counters.watchlist(i) for i, n in self._watchlist_names.items()},
            datapath=self._counters.datapath(),
            collectors={
                name: (int(exported[place].sent), int(exported[place].failed))
                for place, name in self._collector_names.items()
            },
            recursion_misses=pinned.program(self._build, "drop").recursion_misses,
        )

    def _watchlists(self, now: tallies.Tally, slots: counters.Slots) -> Iterator[Watchlist]:
        for place, name in self._watchlist_names.items():
            policy = self._live.policies.get(place)
            yield Watchlist(
                name=name,
                live=policy is not None,
                rules=self._live.rules.get(place, 0),
                collector=self._collector_names.get(policy.collector, "") if policy else "",
                pending=slots.pending.get(place, 0),
                counters=now.watchlists[name],
            )

    def _collectors(self, now: tallies.Tally) -> Iterator[Collector]:
        spec = self._good.spec if self._good else None
        known = {collector.name: collector for collector in spec.collectors} if spec else {}
        for place, name in self._collector_names.items():
            told, live = known.get(name), self._live.collectors.get(place)
            yield Collector(
                name=name,
                live=live is not None,
                address=str(told.address) if told else None,
                port=told.port if told else 0,
                reports_per_second=live.reports_per_second if live else 0,
                sent=now.collectors[name][0],
                failed=now.collectors[name][1],
            )

    def _ring_states(self) -> Iterator[Ring]:
        for number, waiting in enumerate(self._rings.waiting()):
            cpu, kind = divmod(number, bpf_types.RINGS_PER_CPU)
            yield Ring(cpu, bpf_types.RingKind(kind).name.lower(), waiting, self._rings.size)


def _by_place(names: Mapping[str, int], live: Iterable[int]) -> dict[int, str]:
    """Names by place, in the order of the names."""
    found = {place: f"#{place}" for place in live} | {place: n for n, place in names.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))
