# SPDX-License-Identifier: Apache-2.0
"""Pure: from watchlists, collectors and nodes to what every node is told.

`plan` decides what concerns the whole cluster (order, rule ids, which watchlists are accepted); `node_spec` then writes one node's spec.
"""

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NewType

from hostint_api import (
    IgnoredDestination,
    NodeCollector,
    NodeConfigSpec,
    NodeRule,
    NodeWatchlist,
    WatchlistSpec,
    node_config,
)
from hostint_operator import desired_state, endpoints

RuleId = NewType("RuleId", int)

# Per node; the limits of the datapath's tables (bpf/types.h) and of the classifier.
MAX_WATCHLISTS = 255
MAX_COLLECTORS = 16
MAX_DIRECTED_RULES = 15_000
MAX_IGNORED = 1024
# etcd takes objects of up to 1.5 MiB; this leaves room for everything that is not a rule.
MAX_RULE_BYTES = 1_200_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one watchlist.

    Accepted, its rules take part; with a `collector_problem` they still cannot be sent to any node, since there is nowhere to report to.
    """

    accepted: bool
    reason: str
    message: str
    collector_problem: str = ""

    @property
    def compiled(self) -> bool:
        """Whether nodes get its rules."""
        return self.accepted and not self.collector_problem


@dataclass(frozen=True, slots=True)
class Entry:
    """A watchlist that takes part, in its place of the order."""

    name: str
    generation: int
    spec: WatchlistSpec
    collector: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that node_spec needs to know besides the node."""

    entries: tuple[Entry, ...]  # compiled ones only, first match first
    verdicts: Mapping[str, Verdict]
    rule_ids: Mapping[tuple[str, str], RuleId]
    resolutions: Mapping[str, endpoints.Resolution]
    collectors: Mapping[str, desired_state.Collector]
    ignored: tuple[endpoints.Endpoint, ...]


def plan(
    watchlists: Mapping[str, desired_state.Watchlist],
    collectors: Mapping[str, desired_state.Collector],
    nodes: Mapping[desired_state.NodeName, desired_state.Node],
    resolutions: Mapping[str, endpoints.Resolution],
) -> Plan:
    """Decide for the whole cluster; the result depends on the arguments only, not on their order."""
    verdicts: dict[str, Verdict] = {}
    candidates: list[Entry] = []
    for watchlist in _in_order(watchlists.values()):
        verdict = _judge(watchlist, collectors, resolutions)
        verdicts[watchlist.name] = verdict
        if verdict.accepted and watchlist.spec is not None:
            candidates.append(
                Entry(
                    watchlist.name,
                    watchlist.generation,
                    watchlist.spec,
                    watchlist.spec.collector_name,
                )
            )
    for name, message in _over_the_limits(candidates, nodes.values()):
        verdicts[name] = Verdict(False, "TooManyRules", message)
    return Plan(
        entries=tuple(entry for entry in candidates if verdicts[entry.name].compiled),
        verdicts=verdicts,
        rule_ids=rule_ids(
            (watchlist.name, rule.name)
            for watchlist in watchlists.values()
            if watchlist.spec is not None
            for rule in watchlist.spec.rules
        ),
        resolutions=resolutions,
        collectors=collectors,
        ignored=_ignored(list(resolutions.values())),
    )


def node_spec(decided: Plan, node: desired_state.Node) -> NodeConfigSpec:
    """Write the spec of one node's IntNodeConfig, with its digest."""
    entries = [entry for entry in decided.entries if selects(entry.spec, node)]
    used = sorted({entry.collector for entry in entries})
    spec = NodeConfigSpec(
        node_id=node_id(node),
        digest="",
        collectors=tuple(_node_collector(decided, name, node) for name in used),
        ignored=tuple(IgnoredDestination(address=e.address, port=e.port) for e in decided.ignored),
        watchlists=tuple(_node_watchlist(entry) for entry in entries),
        rules=tuple(_node_rules(entries, decided.rule_ids)),
    )
    return spec.model_copy(update={"digest": node_config.digest(spec)})


def selects(spec: WatchlistSpec, node: desired_state.Node) -> bool:
    """Whether a watchlist is for a node."""
    return all(node.labels.get(key) == value for key, value in spec.match_labels.items())


def node_id(node: desired_state.Node) -> int:
    """Return what names a node on the wire: its IPv4 InternalIP, else a hash of its name."""
    for address in node.internal_addresses:
        if isinstance(address, ipaddress.IPv4Address):
            return int(address)
    return _hash32(node.name)


def rule_ids(rules: Iterable[tuple[str, str]]) -> dict[tuple[str, str], RuleId]:
    """Give every (watchlist, rule) a number of 32 bits that stays the same whatever else comes and goes.

    Of two with the same hash, which is rare, the one later in the alphabet gets another.
    """
    ids: dict[tuple[str, str], RuleId] = {}
    taken = {0}  # no rule
    for watchlist, rule in sorted(set(rules)):
        attempt = 0
        number = _hash32(f"{watchlist}/{rule}")
        while number in taken:
            attempt += 1
            number = _hash32(f"{watchlist}/{rule}/{attempt}")
        taken.add(number)
        ids[watchlist, rule] = RuleId(number)
    return ids


def _hash32(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def _in_order(watchlists: Iterable[desired_state.Watchlist]) -> list[desired_state.Watchlist]:
    return sorted(watchlists, key=lambda w: (-(w.spec.priority if w.spec else 0), w.name))


def _judge(
    watchlist: desired_state.Watchlist,
    collectors: Mapping[str, desired_state.Collector],
    resolutions: Mapping[str, endpoints.Resolution],
) -> Verdict:
    if watchlist.spec is None:
        return Verdict(False, "Invalid", watchlist.problem)
    name = watchlist.spec.collector_name
    if name not in collectors:
        return Verdict(False, "CollectorNotFound", f"IntCollector '{name}' does not exist")
    resolution = resolutions[name]
    if not resolution.accepted:
        words = f"IntCollector '{name}' is not accepted: {resolution.message}"
        return Verdict(True, "Valid", "the watchlist is valid", words)
    if not resolution.reachable:
        words = f"IntCollector '{name}' has nowhere to send to: {resolution.message}"
        return Verdict(True, "Valid", "the watchlist is valid", words)
    return Verdict(True, "Valid", "the watchlist is valid")


@dataclass(slots=True)
class _Use:
    """What the watchlists admitted so far take of one node's limits."""

    watchlists: int
    directed_rules: int
    rule_bytes: int
    collectors: set[str]

    def refuses(self, entry: Entry) -> str:
        """Say why one more does not fit; empty if it does."""
        if self.watchlists + 1 > MAX_WATCHLISTS:
            return f"a node can have {MAX_WATCHLISTS} watchlists"
        if len(self.collectors | {entry.collector}) > MAX_COLLECTORS:
            return f"a node can report to {MAX_COLLECTORS} collectors"
        rules = self.directed_rules + _directed(entry.spec)
        if rules > MAX_DIRECTED_RULES:
            return f"a node can have {MAX_DIRECTED_RULES} rules (bidirectional ones count twice) and would have {rules}"
        size = self.rule_bytes + rule_bytes(entry)
        if size > MAX_RULE_BYTES:
            return f"the rules of a node can take {MAX_RULE_BYTES} bytes and would take {size}"
        return ""


def _over_the_limits(
    entries: Sequence[Entry], nodes: Iterable[desired_state.Node]
) -> Iterator[tuple[str, str]]:
    """Name the watchlists that do not fit beside those before them in the order, and say why."""
    # Nodes that the same watchlists select are one case.
    cases: dict[tuple[str, ...], desired_state.NodeName] = {}
    labels: dict[tuple[str | None, ...], tuple[str, ...]] = {}
    keys = sorted({key for entry in entries for key in entry.spec.match_labels})
    for node in sorted(nodes, key=lambda node: node.name):
        own = tuple(node.labels.get(key) for key in keys)
        if own not in labels:
            labels[own] = tuple(entry.name for entry in entries if selects(entry.spec, node))
        cases.setdefault(labels[own], node.name)
    uses = {case: (set(case), _Use(0, 0, 0, set())) for case in cases}
    for entry in entries:
        selected = {case: use for case, (selection, use) in uses.items() if entry.name in selection}
        refusals = [(cases[case], use.refuses(entry)) for case, use in selected.items()]
        refused = sorted((node, words) for node, words in refusals if words)
        if refused:
            node_name, words = refused[0]
            yield (
                entry.name,
                f"does not fit beside the watchlists before it on node '{node_name}': {words}",
            )
            continue
        for use in selected.values():
            use.watchlists += 1
            use.directed_rules += _directed(entry.spec)
            use.rule_bytes += rule_bytes(entry)
            use.collectors.add(entry.collector)


def rule_bytes(entry: Entry) -> int:
    """Estimate from above what the rules take in an IntNodeConfig, as JSON."""
    size = 0
    for rule in entry.spec.rules:
        size += 120 + len(entry.name) + len(rule.name)
        for peer in (rule.source, rule.destination):
            if peer is not None:
                size += 40 + sum(len(str(cidr)) + 4 for cidr in peer.cidrs or ())
                size += 36 * len(peer.ports or ())
    return size


def _ignored(resolutions: Sequence[endpoints.Resolution]) -> tuple[endpoints.Endpoint, ...]:
    """Collect every destination of reports; beyond the limit, those that get reports now come first."""
    usable = {endpoint for resolution in resolutions for endpoint in resolution.usable}
    known = {endpoint for resolution in resolutions for endpoint in resolution.known} - usable
    ordered = sorted(usable, key=str) + sorted(known, key=str)
    return tuple(sorted(ordered[:MAX_IGNORED], key=str))


def _directed(spec: WatchlistSpec) -> int:
    return sum(2 if rule.bidirectional else 1 for rule in spec.rules)


def _node_collector(decided: Plan, name: str, node: desired_state.Node) -> NodeCollector:
    spec = decided.collectors[name].spec
    assert spec is not None  # noqa: S101  a watchlist whose collector is not valid is not compiled
    chosen = endpoints.choose(node.name, decided.resolutions[name].usable)
    return NodeCollector(
        name=name,
        address=chosen.address,
        port=chosen.port,
        format=spec.format,
        snap_length=spec.snap_length,
        dscp=spec.dscp,
        reports_per_second=spec.reports_per_second,
    )


def _node_watchlist(entry: Entry) -> NodeWatchlist:
    report = entry.spec.report
    return NodeWatchlist(
        name=entry.name,
        generation=entry.generation,
        collector=entry.collector,
        events=report.events,
        interval_ns=report.interval_ns,
        latency_change_ns=report.latency_change_ns,
        congestion_latency_ns=report.congestion_latency_ns,
        sample=report.sample,
    )


def _node_rules(
    entries: Iterable[Entry], ids: Mapping[tuple[str, str], RuleId]
) -> Iterator[NodeRule]:
    for entry in entries:
        for rule in entry.spec.rules:
            yield NodeRule(
                id=ids[entry.name, rule.name],
                watchlist=entry.name,
                name=rule.name,
                action=rule.action,
                protocol=rule.protocol,
                source=rule.source,
                destination=rule.destination,
                bidirectional=rule.bidirectional,
            )
