# SPDX-License-Identifier: Apache-2.0
"""Pure: from an IntNodeConfig's spec to what the datapath is given: directed rules, report settings, destinations."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from hostint_agent import bpf_types, classifier
from hostint_api import NodeCollector, NodeConfigSpec, NodeRule, NodeWatchlist, Peer

_EVENTS = {
    "Flow": bpf_types.ReportEvent.FLOW,
    "Drop": bpf_types.ReportEvent.DROP,
    "Queue": bpf_types.ReportEvent.QUEUE,
}
_ACTIONS = {"Report": bpf_types.RuleAction.REPORT, "Ignore": bpf_types.RuleAction.IGNORE}
_FORMATS = {"TelemetryReportV05": bpf_types.ReportFormat.V05}
# watchlist 0 is the agent's own Ignore rules; collector 0 is a collector like any other
FIRST_WATCHLIST = 1


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the reports of one collector go from this node."""

    name: str
    address: str
    port: int
    dscp: int


@dataclass(frozen=True, slots=True)
class Indexes:
    """Which place in the maps a name has. It keeps its place while it is in use, and a place that became free is used last,
    so that counters and records in flight are not taken for another's.
    """

    names: Mapping[str, int] = field(default_factory=dict)
    retired: tuple[int, ...] = ()

    def follow(self, wanted: Iterable[str], first: int, limit: int) -> "Indexes":
        """The places of exactly these names. Raises classifier.LimitExceeded."""
        names = sorted(set(wanted))
        if len(names) > limit - first:
            raise classifier.LimitExceeded("entries", len(names), limit - first)
        kept = {name: self.names[name] for name in names if name in self.names}
        retired = [i for i in self.retired if i not in kept.values()]
        retired += sorted(index for name, index in self.names.items() if name not in kept)
        taken = set(kept.values()) | set(retired)
        free = [index for index in range(first, limit) if index not in taken] + retired
        fresh = [name for name in names if name not in kept]
        kept |= dict(zip(fresh, free, strict=False))
        used = set(kept.values())
        return Indexes(kept, tuple(index for index in retired if index not in used))


# a rule, the place of its watchlist, and the directed rules that it became; by rule id
_Making = tuple[NodeRule, int, tuple[classifier.Rule, ...]]
Made = Mapping[int, _Making]


@dataclass(frozen=True, slots=True)
class Program:
    """Everything a commit needs. `fresh_watchlists`: places whose counters must begin at zero. `made`: for the next one."""

    rules: tuple[classifier.Rule, ...]
    policies: Mapping[int, bpf_types.Policy]
    collectors: Mapping[int, bpf_types.Collector]
    destinations: Mapping[int, Destination]
    watchlist_indexes: Indexes
    collector_indexes: Indexes
    fresh_watchlists: tuple[int, ...]
    made: Made = field(default_factory=dict)


def _ports(peer: Peer | None) -> tuple[classifier.PortRange, ...]:
    return tuple((r.port, r.last) for r in peer.ports) if peer and peer.ports else ()


def _cidrs(peer: Peer | None) -> tuple[classifier.Network, ...]:
    return tuple(peer.cidrs) if peer and peer.cidrs else ()


def _directed(rule: NodeRule, watchlist: int) -> tuple[classifier.Rule, ...]:
    """A rule, and its reply direction if it wants that."""
    one_way = classifier.Rule(
        rule_id=rule.id,
        watchlist=watchlist,
        action=_ACTIONS[rule.action],
        protocol=classifier.PROTOCOLS[rule.protocol] if rule.protocol else None,
        sources=_cidrs(rule.source),
        destinations=_cidrs(rule.destination),
        source_ports=_ports(rule.source),
        destination_ports=_ports(rule.destination),
    )
    if not rule.bidirectional:
        return (one_way,)
    return (
        one_way,
        classifier.Rule(
            rule_id=one_way.rule_id,
            watchlist=watchlist,
            action=one_way.action,
            protocol=one_way.protocol,
            sources=one_way.destinations,
            destinations=one_way.sources,
            source_ports=one_way.destination_ports,
            destination_ports=one_way.source_ports,
        ),
    )


def _same_peer(one: Peer | None, other: Peer | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.cidrs == other.cidrs and _ports(one) == _ports(other)


def _same(one: NodeRule, other: NodeRule) -> bool:
    """Whether two rules mean the same; their names do not matter. Half the time of comparing the models."""
    return (
        one.action == other.action
        and one.protocol == other.protocol
        and one.bidirectional == other.bidirectional
        and _same_peer(one.source, other.source)
        and _same_peer(one.destination, other.destination)
    )


def _make(rules: Iterable[NodeRule], places: Mapping[str, int], before: Made) -> Iterator[_Making]:
    """What becomes of every rule whose watchlist has a place; the same objects as before where nothing is different."""
    for rule in rules:
        place = places.get(rule.watchlist)
        if place is None:
            continue
        known = before.get(rule.id)
        if known is None or known[1] != place or not (known[0] is rule or _same(known[0], rule)):
            yield rule, place, _directed(rule, place)
        else:
            yield known if known[0] is rule else (rule, place, known[2])


def _ignore_reports(spec: NodeConfigSpec) -> list[classifier.Rule]:
    """Reports are never watched: UDP to any collector's destination, one rule a port."""
    by_port: dict[int, set[classifier.Network]] = {}
    for destination in spec.ignored:
        by_port.setdefault(destination.port, set()).add(
            classifier.host_network(str(destination.address))
        )
    for collector in spec.collectors:
        by_port.setdefault(collector.port, set()).add(
            classifier.host_network(str(collector.address))
        )
    return [
        classifier.Rule(
            rule_id=0,
            watchlist=0,
            action=bpf_types.RuleAction.IGNORE,
            protocol=classifier.PROTOCOLS["UDP"],
            destinations=tuple(sorted(networks, key=str)),
            destination_ports=((port, port),),
        )
        for port, networks in sorted(by_port.items())
    ]


def _policy(watchlist: NodeWatchlist, collector: int) -> bpf_types.Policy:
    events = bpf_types.ReportEvent(0)
    for event in watchlist.events:
        events |= _EVENTS[event]
    return bpf_types.Policy(
        interval_ns=watchlist.interval_ns,
        latency_change_ns=watchlist.latency_change_ns,
        congestion_latency_ns=watchlist.congestion_latency_ns,
        sample=watchlist.sample,
        events=int(events),
        collector=collector,
    )


def _collector(collector: NodeCollector) -> bpf_types.Collector:
    return bpf_types.Collector(
        reports_per_second=collector.reports_per_second,
        snap_length=collector.snap_length,
        format=_FORMATS[collector.format],
    )


def _destination(collector: NodeCollector) -> Destination:
    return Destination(collector.name, str(collector.address), collector.port, collector.dscp)


def build(
    spec: NodeConfigSpec,
    watchlists: Indexes = Indexes(),
    collectors: Indexes = Indexes(),
    before: Made = MappingProxyType({}),
) -> Program:
    """What this spec means for the datapath, given the places that names had before, and what had been made of rules.

    Raises classifier.LimitExceeded when there are more watchlists or collectors than places.
    """
    names = [watchlist.name for watchlist in spec.watchlists]
    watchlist_indexes = watchlists.follow(names, FIRST_WATCHLIST, bpf_types.MAX_WATCHLISTS)
    collector_indexes = collectors.follow(
        (c.name for c in spec.collectors), 0, bpf_types.MAX_COLLECTORS
    )
    places = watchlist_indexes.names
    known = [w for w in spec.watchlists if w.collector in collector_indexes.names]
    made = list(_make(spec.rules, {w.name: places[w.name] for w in known}, before))
    rules = _ignore_reports(spec)
    for _, _, directed in made:
        rules += directed
    return Program(
        rules=tuple(rules),
        policies={places[w.name]: _policy(w, collector_indexes.names[w.collector]) for w in known},
        collectors={collector_indexes.names[c.name]: _collector(c) for c in spec.collectors},
        destinations={collector_indexes.names[c.name]: _destination(c) for c in spec.collectors},
        watchlist_indexes=watchlist_indexes,
        collector_indexes=collector_indexes,
        fresh_watchlists=_fresh(watchlists, watchlist_indexes),
        made={making[0].id: making for making in made},
    )


def _fresh(before: Indexes, after: Indexes) -> tuple[int, ...]:
    return tuple(sorted(i for n, i in after.names.items() if before.names.get(n) != i))
