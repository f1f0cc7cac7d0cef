# SPDX-License-Identifier: Apache-2.0
"""Pure: where the reports of a collector go, and which of its endpoints each node gets."""

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hostint_api import CollectorSpec, ServiceRef, names
from hostint_operator import desired_state

# Failures in a row, 30 s apart, after which a status says that a name no longer resolves.
DNS_FAILURES_TOLD = 3


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One UDP destination of reports."""

    address: desired_state.Address
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a collector stands for now.

    `usable` are the endpoints that may be given to nodes; `known` are all that may still receive reports, for the ignored list.
    `accepted` False: the collector's spec itself is refused. `reason` and `message` speak of whether there is an endpoint.
    """

    accepted: bool
    reason: str
    message: str
    usable: tuple[Endpoint, ...] = ()
    known: tuple[Endpoint, ...] = ()

    @property
    def reachable(self) -> bool:
        """Whether there is an endpoint to send to."""
        return bool(self.usable)


def resolve(collector: desired_state.Collector, state: desired_state.State) -> Resolution:
    """Find the endpoints of a collector in what is known now."""
    spec = collector.spec
    if spec is None:
        return Resolution(False, "Invalid", collector.problem)
    if spec.service is not None:
        return _of_service(spec.service, state)
    return _of_address(spec, state)


def choose(node: str, endpoints: Iterable[Endpoint]) -> Endpoint:
    """Give a node one endpoint by rendezvous hash: when one goes, only the nodes that had it move."""
    return max(endpoints, key=lambda endpoint: (_weight(node, endpoint), str(endpoint)))


def host_name(spec: CollectorSpec) -> str | None:
    """Return the DNS name that has to be looked up for a collector, if its address is one."""
    if spec.address is None or _literal(spec.address) is not None:
        return None
    return spec.address


def service_key(reference: ServiceRef) -> str:
    """Return the key of a Service in State."""
    return f"{reference.namespace}/{reference.name}"


def _weight(node: str, endpoint: Endpoint) -> bytes:
    return hashlib.sha256(f"{node}|{endpoint}".encode()).digest()


def _literal(text: str) -> desired_state.Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _of_address(spec: CollectorSpec, state: desired_state.State) -> Resolution:
    assert spec.address is not None  # noqa: S101  the model lets exactly one of address and service be set
    port = spec.port or names.DEFAULT_PORT
    literal = _literal(spec.address)
    if literal is not None:
        found = Endpoint(literal, port)
        return _checked((found,), f"reports go to {found}", state)
    answer = state.dns.get(spec.address)
    if answer is None:
        return Resolution(True, "Resolving", f"address '{spec.address}' is being looked up")
    if not answer.addresses:
        return Resolution(
            True, "DNSFailure", f"address '{spec.address}' does not resolve: {answer.error}"
        )
    all_found = tuple(Endpoint(address, port) for address in answer.addresses)
    shown = ", ".join(str(endpoint) for endpoint in all_found[:3])
    if answer.failures < DNS_FAILURES_TOLD:
        return _checked(all_found, f"address '{spec.address}' resolves to {shown}", state)
    words = (
        f"address '{spec.address}' no longer resolves ({answer.error}); "
        f"reports still go to its last known {shown}"
    )
    return _checked(all_found, words, state, "LastKnownAddress")


def _checked(
    found: tuple[Endpoint, ...], message: str, state: desired_state.State, reason: str = "Resolved"
) -> Resolution:
    """Refuse the virtual address of a Service; else everything found is usable."""
    services = _cluster_addresses(state.services)
    for endpoint in found:
        if key := services.get(endpoint.address):
            namespace, name = key.split("/")
            return Resolution(
                False,
                "ClusterIPAddress",
                f"address {endpoint.address} is the ClusterIP of Service {key}, whose load balancing would scatter the reports;"
                f" use service: {{namespace: {namespace}, name: {name}, port: {endpoint.port}}}",
            )
    ordered = tuple(sorted(found, key=str))
    return Resolution(True, reason, message, ordered, ordered)


def _cluster_addresses(
    services: Mapping[str, desired_state.Service],
) -> dict[desired_state.Address, str]:
    return {
        address: key for key, service in services.items() for address in service.cluster_addresses
    }


def _of_service(reference: ServiceRef, state: desired_state.State) -> Resolution:
    key = service_key(reference)
    service = state.services.get(key)
    if service is None:
        return Resolution(True, "ServiceNotFound", f"Service {key} does not exist")
    port_names = [port.name for port in service.ports if port.port == reference.port]
    if not port_names:
        have = ", ".join(str(port.port) for port in service.ports) or "none"
        return Resolution(
            True,
            "PortNotFound",
            f"Service {key} has no UDP port {reference.port}; its UDP ports: {have}",
        )
    slices = [piece for piece in state.slices.values() if piece.service == key]
    usable = _endpoints(slices, port_names, only_ready=True)
    known = _endpoints(slices, port_names, only_ready=False)
    if not usable:
        words = f"Service {key} has no ready endpoint for UDP port {reference.port}"
        return Resolution(True, "NoEndpoints", words, known=known)
    plural = "endpoint" if len(usable) == 1 else "endpoints"
    words = f"Service {key} has {len(usable)} ready {plural}"
    return Resolution(True, "Resolved", words, usable, known)


def _endpoints(
    slices: Iterable[desired_state.EndpointSlice], port_names: list[str], *, only_ready: bool
) -> tuple[Endpoint, ...]:
    found = {
        Endpoint(address, port.port)
        for piece in slices
        for port in piece.ports
        if port.name in port_names
        for address in (piece.ready if only_ready else piece.ready + piece.not_ready)
    }
    return tuple(sorted(found, key=str))
