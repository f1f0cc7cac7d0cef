# SPDX-License-Identifier: Apache-2.0
"""Short ways to make the records that the operator's tests are about."""

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from hostint_api import CollectorSpec, WatchlistSpec
from hostint_operator import desired_state


def watchlist(
    name: str,
    *rules: str,
    priority: int = 0,
    collector: str | None = None,
    labels: Mapping[str, str] | None = None,
    bidirectional: bool = False,
    generation: int = 1,
    status: Mapping[str, Any] | None = None,
) -> desired_state.Watchlist:
    spec: dict[str, Any] = {
        "priority": priority,
        "rules": [{"name": r, "bidirectional": bidirectional} for r in rules or ("all",)],
    }
    if collector:
        spec["collectorRef"] = {"name": collector}
    if labels:
        spec["nodeSelector"] = {"matchLabels": dict(labels)}
    return desired_state.UserObject(
        name, f"uid-{name}", generation, 1, WatchlistSpec.model_validate(spec), "", status or {}
    )


def invalid_watchlist(name: str, problem: str) -> desired_state.Watchlist:
    return desired_state.UserObject(name, f"uid-{name}", 1, 1, None, problem, {})


def collector(
    name: str = "default", status: Mapping[str, Any] | None = None, **spec: Any
) -> desired_state.Collector:
    spec = spec or {"address": "192.0.2.9", "port": 4000}
    return desired_state.UserObject(
        name, f"uid-{name}", 1, 1, CollectorSpec.model_validate(spec), "", status or {}
    )


def node(name: str, *addresses: str, **labels: str) -> desired_state.Node:
    found = tuple(ipaddress.ip_address(a) for a in addresses)
    return desired_state.Node(desired_state.NodeName(name), f"uid-{name}", labels, found)


def by_name(objects: Iterable[Any]) -> dict[Any, Any]:
    return {o.name: o for o in objects}


def service(*ports: int, cluster: Iterable[str] = ()) -> desired_state.Service:
    return desired_state.Service(
        tuple(ipaddress.ip_address(a) for a in cluster),
        tuple(desired_state.ServicePort(f"p{port}", port) for port in ports),
    )


def endpoint_slice(
    service_key: str, port: int, target: int, ready: Iterable[str], not_ready: Iterable[str] = ()
) -> desired_state.EndpointSlice:
    return desired_state.EndpointSlice(
        service_key,
        tuple(ipaddress.ip_address(a) for a in ready),
        tuple(ipaddress.ip_address(a) for a in not_ready),
        (desired_state.ServicePort(f"p{port}", target),),
    )
