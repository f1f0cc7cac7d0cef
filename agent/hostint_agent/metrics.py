# SPDX-License-Identifier: Apache-2.0
"""Pure: counters as Prometheus metrics, each with a help text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import core

_WATCHLIST_HELP = {
    "watched": "Packets that matched a Report rule",
    "reported": "Flow and queue reports written",
    "suppressed": "Watched packets that brought no news: the flow was reported less than an interval ago",
    "sampled_out": "Watched packets of flows outside the sample",
    "rate_limited": "Reports not written because of the collector's rate limit",
    "ring_full": "Reports lost because the ring was full",
    "unverified": "Watched packets that could not be tied to their ingress beyond doubt",
    "unresolved": "Watched packets that ended inside the host without a forward, delivery or drop",
    "dropped": "Watched packets that died before they left",
    "dropped_late": "Watched packets that died after they had left or been delivered",
    "drops_reported": "Drop reports written",
    "drops_suppressed": "Drops of a flow and reason that was reported less than an interval ago",
    "drops_sampled_out": "Drops of flows outside the sample",
    "drops_rate_limited": "Drop reports not written because of the collector's rate limit",
    "drops_ring_full": "Drop reports lost because the ring was full",
    "drops_not_asked": "Drops that the watchlist, or the reason, does not ask to report",
    "not_asked": "Watched packets of watchlists that ask for drops only",
}
_DATAPATH_HELP = {
    "not_ip": "Frames that are not IP",
    "truncated": "IP packets whose headers could not be read",
    "flow_evicted": "Flows forgotten because their part of the table was full",
    "snapshot_failed": "Reports without inner packet because it could not be read",
    "slot_busy": "Watched packets that could not be followed: another CPU was taking the same slot",
    "stale_drop": "Drops of packets that only had the address of a watched one",
    "drop_evicted": "Flows forgotten for a drop because their part of the table was full",
    "drop_snapshot_failed": "Drop reports without inner packet because it could not be read",
    "drop_nested": "Drops not looked at because two versions of the drop program met on a CPU during an upgrade",
    "drop_function_unknown": "Drops not counted by function: their table was full, or the function had no name",
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that metrics are made of."""

    version: str
    watchlists: Mapping[str, Mapping[str, int]]
    datapath: Mapping[str, int]
    drops: Mapping[str, int]
    drop_functions: Mapping[str, Mapping[str, int]]  # by reason, by function
    drop_recursion_misses: int
    exported: Mapping[str, tuple[int, int]]
    rings: Iterable[int]
    attached: int
    not_attached: int
    hold: bool
    rules: int
    generation: int
    config_errors: int


def families(now: Snapshot) -> list[core.Metric]:
    """All metric families."""
    found: list[core.Metric] = []
    for field, words in _WATCHLIST_HELP.items():
        family = core.CounterMetricFamily(f"hostint_{field}", words, labels=["watchlist"])
        for name, counters in now.watchlists.items():
            family.add_metric([name], max(0, counters[field]))
        found.append(family)
    for field, words in _DATAPATH_HELP.items():
        found.append(core.CounterMetricFamily(f"hostint_{field}", words, now.datapath[field]))
    drops = core.CounterMetricFamily(
        "hostint_drops_by_reason", "Watched packets that died, by kernel reason", labels=["reason"]
    )
    for reason, count in now.drops.items():
        drops.add_metric([reason], count)
    found += [drops, _drop_functions(now)]
    missed = "Drops not looked at because the drop program was at work on that CPU: the kernel does not run it within itself"
    found.append(
        core.CounterMetricFamily("hostint_drop_recursion_misses", missed, now.drop_recursion_misses)
    )
    found += _export_families(now)
    gauges = (
        ("hostint_interfaces_attached", "Interfaces with both programs attached", now.attached),
        (
            "hostint_interfaces_failed",
            "Interfaces that should be attached and are not",
            now.not_attached,
        ),
        (
            "hostint_hold",
            "Whether an upgrade that is not complete holds reports back: 0 or 1",
            int(now.hold),
        ),
        ("hostint_rules", "Directed rules that are live", now.rules),
        ("hostint_generation", "Commits of rules since the datapath was loaded", now.generation),
        ("hostint_config_errors", "Configurations refused since the start", now.config_errors),
    )
    found += [core.GaugeMetricFamily(name, words, value) for name, words, value in gauges]
    build = core.GaugeMetricFamily("hostint_build_info", "Version of the agent", labels=["version"])
    build.add_metric([now.version], 1)
    found.append(build)
    return found


def _drop_functions(now: Snapshot) -> core.Metric:
    family = core.CounterMetricFamily(
        "hostint_drops_by_function",
        "Watched packets dropped for a reason that does not say why, by kernel function",
        labels=["function", "reason"],
    )
    for reason, functions in now.drop_functions.items():
        for function, count in functions.items():
            family.add_metric([function, reason], count)
    return family


def _export_families(now: Snapshot) -> list[core.Metric]:
    sent = core.CounterMetricFamily(
        "hostint_reports_sent", "Reports handed to the network", labels=["collector"]
    )
    failed = core.CounterMetricFamily(
        "hostint_reports_failed", "Reports that could not be sent", labels=["collector"]
    )
    for name, (sent_count, failed_count) in now.exported.items():
        sent.add_metric([name], sent_count)
        failed.add_metric([name], failed_count)
    waiting = core.GaugeMetricFamily(
        "hostint_ring_records", "Reports waiting to be sent", labels=["ring"]
    )
    for ring, count in enumerate(now.rings):
        waiting.add_metric([str(ring)], count)
    return [sent, failed, waiting]
