# SPDX-License-Identifier: Apache-2.0
"""What is known now: the users' objects and what the cluster looks like. Records only, nothing is decided here."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NewType, TypeVar

from hostint_api import CollectorSpec, WatchlistSpec

NodeName = NewType("NodeName", str)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

S = TypeVar("S", WatchlistSpec, CollectorSpec)


@dataclass(frozen=True, slots=True)
class UserObject(Generic[S]):
    """An IntWatchlist or IntCollector as the API server holds it; `spec` is None if it is not valid, `problem` says why."""

    name: str
    uid: str
    generation: int
    version: int
    spec: S | None
    problem: str
    status: Mapping[str, Any]


Watchlist = UserObject[WatchlistSpec]
Collector = UserObject[CollectorSpec]


@dataclass(frozen=True, slots=True)
class Node:
    """A Node: what selects it and what names it on the wire."""

    name: NodeName
    uid: str
    labels: Mapping[str, str]
    internal_addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class WatchlistOnNode:
    """What an agent says about one watchlist."""

    generation: int
    ready: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class CollectorOnNode:
    """What an agent says about one collector."""

    reachable: bool
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """An IntNodeConfig as observed. `digest` is computed from the spec that is there, not read from it; empty if that is not valid."""

    uid: str
    version: int
    owner_uid: str
    digest: str
    observed_digest: str
    watchlists: Mapping[str, WatchlistOnNode]
    collectors: Mapping[str, CollectorOnNode]


@dataclass(frozen=True, slots=True)
class AgentPod:
    """An agent pod: where it runs and whether it is Ready."""

    node: NodeName
    ready: bool


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A UDP port of a Service."""

    name: str
    port: int


@dataclass(frozen=True, slots=True)
class Service:
    """A Service: its virtual addresses and UDP ports."""

    cluster_addresses: tuple[Address, ...]
    ports: tuple[ServicePort, ...]


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """One EndpointSlice; `ports` are the UDP ports of the endpoints, by the name of the Service's port."""

    service: str  # namespace/name
    ready: tuple[Address, ...]
    not_ready: tuple[Address, ...]
    ports: tuple[ServicePort, ...]


@dataclass(frozen=True, slots=True)
class DnsAnswer:
    """What a name resolves to: the last good answer, and how often in a row it has failed since."""

    addresses: tuple[Address, ...]
    failures: int
    error: str


@dataclass(slots=True)
class State:
    """All of it. Written by intake, the reflectors and the resolver; read by reconcile."""

    watchlists: dict[str, Watchlist] = field(default_factory=dict)
    collectors: dict[str, Collector] = field(default_factory=dict)
    nodes: dict[NodeName, Node] = field(default_factory=dict)
    node_configs: dict[NodeName, NodeConfig] = field(default_factory=dict)
    agents: dict[str, AgentPod] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)  # by namespace/name
    slices: dict[str, EndpointSlice] = field(default_factory=dict)  # by namespace/name
    dns: dict[str, DnsAnswer] = field(default_factory=dict)

    def nodes_with_agent(self) -> frozenset[NodeName]:
        """Name the nodes on which an agent pod is Ready."""
        return frozenset(agent.node for agent in self.agents.values() if agent.ready)
