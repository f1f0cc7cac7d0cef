# SPDX-License-Identifier: Apache-2.0
"""What we read of the cluster's own kinds, and the reflectors that keep State equal to it.

Services are mirrored cluster-wide: they are few and quiet, and any address of a collector may turn out to be the ClusterIP of any of them, IPv6 as
well as IPv4, which no field selector can ask for. EndpointSlices are many and busy: one reflector per Service that a collector names.
"""

import asyncio
import ipaddress
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pydantic

from hostint_api import NodeConfigSpec, names, node_config
from hostint_operator import desired_state
from hostint_operator.kube import client, reflector

SERVICE_LABEL = "kubernetes.io/service-name"

AnyReflector = reflector.Reflector[Any, Any]


class _Typed(pydantic.BaseModel):
    type: str = ""
    status: str = ""
    address: str = ""


class _NodeStatus(pydantic.BaseModel):
    addresses: list[_Typed] = []


class _Node(reflector.Resource):
    status: _NodeStatus = pydantic.Field(default_factory=_NodeStatus)


class _PodSpec(pydantic.BaseModel):
    nodeName: str = ""  # noqa: N815  the name on the wire


class _PodStatus(pydantic.BaseModel):
    conditions: list[_Typed] = []


class _Pod(reflector.Resource):
    spec: _PodSpec = pydantic.Field(default_factory=_PodSpec)
    status: _PodStatus = pydantic.Field(default_factory=_PodStatus)


class _Port(pydantic.BaseModel):
    name: str | None = None
    port: int | None = None
    protocol: str = "TCP"


class _ServiceSpec(pydantic.BaseModel):
    cluster_ip: str = pydantic.Field("", alias="clusterIP")
    cluster_ips: list[str] = pydantic.Field([], alias="clusterIPs")
    ports: list[_Port] = []


class _Service(reflector.Resource):
    spec: _ServiceSpec


class _EndpointConditions(pydantic.BaseModel):
    ready: bool | None = None


class _Endpoint(pydantic.BaseModel):
    addresses: list[str] = []
    conditions: _EndpointConditions = _EndpointConditions()


class _EndpointSlice(reflector.Resource):
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


class _Owner(pydantic.BaseModel):
    kind: str = ""
    uid: str = ""


class _OwnedMetadata(reflector.Metadata):
    owners: list[_Owner] = pydantic.Field([], alias="ownerReferences")


class _WatchlistStatus(pydantic.BaseModel):
    name: str
    generation: int = 0
    ready: bool = False
    reason: str = ""
    message: str = ""


class _CollectorStatus(pydantic.BaseModel):
    name: str
    reachable: bool = True
    reason: str = ""
    message: str = ""


class _NodeConfigStatus(pydantic.BaseModel):
    observed_digest: str = pydantic.Field("", alias="observedDigest")
    watchlists: list[_WatchlistStatus] = []
    collectors: list[_CollectorStatus] = []


class WireNodeConfig(reflector.Resource):
    """An IntNodeConfig; read leniently, since anybody may have edited it."""

    metadata: _OwnedMetadata
    spec: dict[str, Any] = pydantic.Field(default_factory=dict)
    status: _NodeConfigStatus | None = None


def read_node(item: _Node) -> tuple[str, desired_state.Node]:
    """Read what selects a node and what names it on the wire."""
    internal = (entry.address for entry in item.status.addresses if entry.type == "InternalIP")
    return item.metadata.name, desired_state.Node(
        name=desired_state.NodeName(item.metadata.name),
        uid=item.metadata.uid,
        labels=item.metadata.labels,
        internal_addresses=_addresses(internal),
    )


def read_node_config(item: WireNodeConfig) -> tuple[str, desired_state.NodeConfig]:
    """Read what is configured on a node, by digest, and what its agent says of it."""
    status = item.status or _NodeConfigStatus(observedDigest="")
    return item.metadata.name, desired_state.NodeConfig(
        uid=item.metadata.uid,
        version=int(item.metadata.version),
        owner_uid=next((o.uid for o in item.metadata.owners if o.kind == "Node"), ""),
        digest=_actual_digest(item.spec),
        observed_digest=status.observed_digest,
        watchlists={
            entry.name: desired_state.WatchlistOnNode(
                entry.generation, entry.ready, entry.reason, entry.message
            )
            for entry in status.watchlists
        },
        collectors={
            entry.name: desired_state.CollectorOnNode(entry.reachable, entry.reason, entry.message)
            for entry in status.collectors
        },
    )


def _actual_digest(spec: Mapping[str, Any]) -> str:
    """Compute the digest of a spec that is there; whatever its own `digest` says, a spec edited by hand has another one."""
    try:
        read = NodeConfigSpec.model_validate(spec)
    except pydantic.ValidationError:
        return ""
    actual = node_config.digest(read)
    return actual if actual == read.digest else ""


def _read_pod(item: _Pod) -> tuple[str, desired_state.AgentPod] | None:
    ready = any(c.type == "Ready" and c.status == "True" for c in item.status.conditions)
    node = desired_state.NodeName(item.spec.nodeName)
    return item.metadata.name, desired_state.AgentPod(node, ready)


def _read_service(item: _Service) -> tuple[str, desired_state.Service]:
    virtual = dict.fromkeys([item.spec.cluster_ip, *item.spec.cluster_ips])
    key = f"{item.metadata.namespace}/{item.metadata.name}"
    return key, desired_state.Service(_addresses(virtual), _udp_ports(item.spec.ports))


def _read_slice(item: _EndpointSlice) -> tuple[str, desired_state.EndpointSlice]:
    metadata = item.metadata
    ready: list[str] = []
    not_ready: list[str] = []
    for endpoint in item.endpoints or []:
        # Absent means unknown, which the API says is to be read as ready.
        counts = endpoint.conditions.ready is not False
        (ready if counts else not_ready).extend(endpoint.addresses)
    service = f"{metadata.namespace}/{metadata.labels.get(SERVICE_LABEL, '')}"
    return f"{metadata.namespace}/{metadata.name}", desired_state.EndpointSlice(
        service, _addresses(ready), _addresses(not_ready), _udp_ports(item.ports or [])
    )


def _udp_ports(ports: Iterable[_Port]) -> tuple[desired_state.ServicePort, ...]:
    return tuple(
        desired_state.ServicePort(port.name or "", port.port)
        for port in ports
        if port.protocol == "UDP" and port.port is not None
    )


def _addresses(texts: Iterable[str]) -> tuple[desired_state.Address, ...]:
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_address(text))
        except ValueError:  # a headless Service says "None", an endpoint of type FQDN a name
            continue
    return tuple(found)


class Observers:
    """The reflectors of everything that is not a user's object.

    `on_inputs` is called when something changed that a compile depends on, `on_node` when only that node's own object or agent did.
    """

    def __init__(
        self,
        api: client.Api,
        state: desired_state.State,
        namespace: str,
        on_inputs: Callable[[], None],
        on_node: Callable[[desired_state.NodeName], None],
    ) -> None:
        self._api = api
        self._state = state
        self._on_inputs = on_inputs
        self._on_node = on_node
        self._slices: dict[str, tuple[AnyReflector, asyncio.Task[None]]] = {}
        own_kind = f"/apis/{names.GROUP}/{names.VERSION}"
        pods = f"/api/v1/namespaces/{namespace}/pods"
        self.reflectors: dict[str, AnyReflector] = {
            "nodes": reflector.Reflector(api, "/api/v1/nodes", _Node, read_node, self._node),
            "services": reflector.Reflector(
                api, "/api/v1/services", _Service, _read_service, self._service
            ),
            "nodeconfigs": reflector.Reflector(
                api,
                f"{own_kind}/{names.NODE_CONFIGS}",
                WireNodeConfig,
                read_node_config,
                self._node_config,
            ),
            "pods": reflector.Reflector(
                api,
                pods,
                _Pod,
                _read_pod,
                self._pod,
                selector={"labelSelector": f"{names.AGENT_LABEL}={names.AGENT_NAME}"},
            ),
        }

    def all(self) -> dict[str, AnyReflector]:
        """Return every reflector that runs, by a name for metrics."""
        slices = {f"endpointslices {key}": entry[0] for key, entry in self._slices.items()}
        return self.reflectors | slices

    async def synced(self) -> None:
        """Wait until every reflector has listed once."""
        while waiting := [r for r in self.all().values() if not r.synced.is_set()]:
            await waiting[0].synced.wait()

    def follow_services(self, keys: Iterable[str]) -> None:
        """Mirror the EndpointSlices of exactly these Services (namespace/name)."""
        wanted = set(keys)
        for key in set(self._slices) - wanted:
            self._slices.pop(key)[1].cancel()
            for name in [n for n, piece in self._state.slices.items() if piece.service == key]:
                del self._state.slices[name]
        for key in wanted - set(self._slices):
            # Users write these names; in a path and a selector they must stay names.
            namespace, name = (urllib.parse.quote(part, safe="") for part in key.split("/", 1))
            mirror = reflector.Reflector(
                self._api,
                f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices",
                _EndpointSlice,
                _read_slice,
                self._slice,
                selector={"labelSelector": f"{SERVICE_LABEL}={name}"},
            )
            task = asyncio.create_task(mirror.run(), name=f"endpointslices {key}")
            self._slices[key] = (mirror, task)

    def services_synced(self, key: str) -> bool:
        """Whether the EndpointSlices of a Service have been listed."""
        entry = self._slices.get(key)
        return entry is not None and entry[0].synced.is_set()

    def _node(self, _: str, old: desired_state.Node | None, new: desired_state.Node | None) -> None:
        if new is not None:
            self._state.nodes[new.name] = new
        elif old is not None:
            self._state.nodes.pop(old.name, None)
        self._on_inputs()

    def _node_config(self, key: str, _: object, new: desired_state.NodeConfig | None) -> None:
        name = desired_state.NodeName(key)
        if new is None:
            self._state.node_configs.pop(name, None)
        else:
            known = self._state.node_configs.get(name)
            # What an apply returned may be newer than what the watch tells now.
            if known is None or known.uid != new.uid or known.version <= new.version:
                self._state.node_configs[name] = new
        self._on_node(name)

    def _pod(
        self, key: str, old: desired_state.AgentPod | None, new: desired_state.AgentPod | None
    ) -> None:
        if new is None:
            self._state.agents.pop(key, None)
        else:
            self._state.agents[key] = new
        for pod in (old, new):
            if pod is not None:
                self._on_node(pod.node)

    def _service(self, key: str, _: object, new: desired_state.Service | None) -> None:
        if new is None:
            self._state.services.pop(key, None)
        else:
            self._state.services[key] = new
        self._on_inputs()

    def _slice(self, key: str, _: object, new: desired_state.EndpointSlice | None) -> None:
        if new is None:
            self._state.slices.pop(key, None)
        else:
            self._state.slices[key] = new
        self._on_inputs()
