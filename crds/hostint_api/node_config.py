# SPDX-License-Identifier: Apache-2.0
"""IntNodeConfig: what one node is told, and what its agent says of it. Mirrors crds/intnodeconfig.yaml."""

import hashlib
import json
from typing import Annotated

import pydantic

from hostint_api import model
from hostint_api.collector import MAX_SNAP_LENGTH, MIN_SNAP_LENGTH, Format
from hostint_api.watchlist import Action, Event, Peer, Protocol

_U32 = (1 << 32) - 1
_DAY_NS = 24 * 3600 * 10**9

IpAddress = Annotated[pydantic.IPvAnyAddress, pydantic.PlainSerializer(str)]
Nanoseconds = Annotated[int, pydantic.Field(ge=0, le=_DAY_NS)]


class NodeCollector(model.Model):
    """A collector as this node reaches it."""

    name: model.Name
    address: IpAddress
    port: model.Port
    format: Format
    snap_length: Annotated[int, pydantic.Field(ge=MIN_SNAP_LENGTH, le=MAX_SNAP_LENGTH)]
    dscp: Annotated[int, pydantic.Field(ge=0, le=63)]
    reports_per_second: Annotated[int, pydantic.Field(ge=0, le=10_000_000)]


class IgnoredDestination(model.Model):
    """A collector's destination: UDP to it is never watched."""

    address: IpAddress
    port: model.Port


class NodeWatchlist(model.Model):
    """Report settings of one watchlist; a time of 0 means off."""

    name: model.Name
    generation: Annotated[int, pydantic.Field(ge=0)]
    collector: model.Name
    events: Annotated[tuple[Event, ...], pydantic.Field(max_length=3)]
    interval_ns: Nanoseconds
    latency_change_ns: Nanoseconds
    congestion_latency_ns: Nanoseconds
    sample: Annotated[int, pydantic.Field(ge=1, le=1_000_000)]


class NodeRule(model.Model):
    """A rule in its place of the order; `id` stays the same for (watchlist, name)."""

    id: Annotated[int, pydantic.Field(ge=1, le=_U32)]
    watchlist: model.Name
    name: Annotated[str, pydantic.Field(min_length=1, max_length=63)]
    action: Action
    protocol: Protocol | None = None
    source: Peer | None = None
    destination: Peer | None = None
    bidirectional: bool = False


class NodeConfigSpec(model.Model):
    """Everything a node's agent is told."""

    node_id: Annotated[int, pydantic.Field(alias="nodeID", ge=0, le=_U32)]
    digest: Annotated[str, pydantic.Field(max_length=80)] = ""
    collectors: Annotated[tuple[NodeCollector, ...], pydantic.Field(max_length=16)] = ()
    ignored: Annotated[tuple[IgnoredDestination, ...], pydantic.Field(max_length=1024)] = ()
    watchlists: Annotated[tuple[NodeWatchlist, ...], pydantic.Field(max_length=255)] = ()
    rules: Annotated[tuple[NodeRule, ...], pydantic.Field(max_length=15_000)] = ()


class WatchlistState(model.Model):
    """What the agent says of one watchlist."""

    name: model.Name
    generation: int
    ready: bool
    reason: Annotated[str, pydantic.Field(max_length=64)] = ""
    message: Annotated[str, pydantic.Field(max_length=256)] = ""


class CollectorState(model.Model):
    """What the agent says of one collector."""

    name: model.Name
    reachable: bool
    reason: Annotated[str, pydantic.Field(max_length=64)] = ""
    message: Annotated[str, pydantic.Field(max_length=256)] = ""


class NodeConfigStatus(model.Model):
    """The agent's answer."""

    observed_generation: int
    observed_digest: Annotated[str, pydantic.Field(max_length=80)] = ""
    agent_version: Annotated[str, pydantic.Field(max_length=64)] = ""
    watchlists_ready: Annotated[str, pydantic.Field(max_length=16)] = ""
    watchlists: Annotated[tuple[WatchlistState, ...], pydantic.Field(max_length=255)] = ()
    collectors: Annotated[tuple[CollectorState, ...], pydantic.Field(max_length=16)] = ()


def digest(spec: NodeConfigSpec) -> str:
    """Identity of a spec's content: SHA-256 of its canonical JSON without the digest itself."""
    content = spec.model_dump(
        mode="json", by_alias=True, exclude={"digest"}, exclude_none=True, exclude_defaults=True
    )
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
