# SPDX-License-Identifier: Apache-2.0
"""IntWatchlist: which flows to report, and when. Mirrors crds/intwatchlist.yaml."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import pydantic

from hostint_api import model, names

Action = Literal["Report", "Ignore"]
Protocol = Literal["TCP", "UDP", "SCTP", "ICMP", "ICMPv6"]
Event = Literal["Flow", "Drop", "Queue"]

PROTOCOLS_WITH_PORTS = ("TCP", "UDP", "SCTP")
DEFAULT_INTERVAL_NS = 10**9
DEFAULT_LATENCY_CHANGE_NS = 100_000
_MS = 10**6
_HOUR = 3600 * 10**9


class PortRange(model.Model):
    """A port, or all ports from `port` to `endPort`."""

    port: model.Port
    end_port: model.Port | None = None

    @pydantic.model_validator(mode="after")
    def _end_is_not_before_begin(self) -> Self:
        if self.end_port is not None and self.end_port < self.port:
            raise ValueError("endPort must not be smaller than port")
        return self

    @property
    def last(self) -> int:
        """Last port of the range."""
        return self.end_port or self.port


class Peer(model.Model):
    """One side of a flow; what is absent matches anything."""

    cidrs: Annotated[tuple[model.Cidr, ...], pydantic.Field(min_length=1, max_length=64)] | None = (
        None
    )
    ports: Annotated[tuple[PortRange, ...], pydantic.Field(min_length=1, max_length=16)] | None = (
        None
    )

    @property
    def families(self) -> frozenset[int]:
        """IP versions that this side can match."""
        return frozenset(c.version for c in self.cidrs) if self.cidrs else frozenset({4, 6})


class WatchlistRule(model.Model):
    """A set of flows and what to do about them."""

    name: Annotated[
        str, pydantic.Field(min_length=1, max_length=63, pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    ]
    action: Action = "Report"
    protocol: Protocol | None = None
    source: Peer | None = None
    destination: Peer | None = None
    bidirectional: bool = False

    @pydantic.model_validator(mode="after")
    def _ports_need_a_protocol_that_has_them(self) -> Self:
        has_ports = any(peer and peer.ports for peer in (self.source, self.destination))
        if has_ports and self.protocol not in PROTOCOLS_WITH_PORTS:
            raise ValueError("ports need protocol TCP, UDP or SCTP")
        return self

    @pydantic.model_validator(mode="after")
    def _sides_share_a_family(self) -> Self:
        if (
            self.source
            and self.destination
            and not self.source.families & self.destination.families
        ):
            raise ValueError("source and destination must have an IP family in common")
        return self


class NodeSelector(model.Model):
    """Which nodes watch: those with all of these labels."""

    match_labels: Annotated[
        Mapping[str, Annotated[str, pydantic.Field(max_length=63)]], pydantic.Field(max_length=16)
    ]


class CollectorRef(model.Model):
    """Name of an IntCollector."""

    name: model.Name


class ReportSettings(model.Model):
    """What is reported of a watched flow, and how often."""

    events: Annotated[tuple[Event, ...], pydantic.Field(min_length=1, max_length=3)] = (
        "Flow",
        "Drop",
    )
    interval_ns: Annotated[
        model.Duration, pydantic.Field(alias="interval", ge=10 * _MS, le=_HOUR)
    ] = DEFAULT_INTERVAL_NS
    latency_change_ns: Annotated[
        model.Duration, pydantic.Field(alias="latencyChange", ge=0, le=_HOUR)
    ] = DEFAULT_LATENCY_CHANGE_NS
    congestion_latency_ns: Annotated[
        model.Duration, pydantic.Field(alias="congestionLatency", ge=0, le=_HOUR)
    ] = 0
    sample: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] = 1

    @pydantic.field_validator("events")
    @classmethod
    def _events_differ(cls, events: tuple[Event, ...]) -> tuple[Event, ...]:
        if len(set(events)) != len(events):
            raise ValueError("events must not repeat")
        return events


class WatchlistSpec(model.Model):
    """Which flows of which nodes are reported, and to which collector."""

    collector_ref: CollectorRef | None = None
    node_selector: NodeSelector | None = None
    priority: Annotated[int, pydantic.Field(ge=-1000, le=1000)] = 0
    rules: Annotated[tuple[WatchlistRule, ...], pydantic.Field(min_length=1, max_length=256)]
    report: ReportSettings = ReportSettings()

    @pydantic.field_validator("rules")
    @classmethod
    def _names_differ(cls, rules: tuple[WatchlistRule, ...]) -> tuple[WatchlistRule, ...]:
        seen: set[str] = set()
        for rule in rules:
            if rule.name in seen:
                raise ValueError(f"duplicate rule name '{rule.name}'")
            seen.add(rule.name)
        return rules

    @property
    def collector_name(self) -> str:
        """The IntCollector that gets the reports."""
        return self.collector_ref.name if self.collector_ref else names.DEFAULT_COLLECTOR

    @property
    def match_labels(self) -> Mapping[str, str]:
        """Labels that a node must have; none: every node."""
        return self.node_selector.match_labels if self.node_selector else {}
