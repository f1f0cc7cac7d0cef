# SPDX-License-Identifier: Apache-2.0
"""Checks of `hostint-agent doctor` that concern collectors: which way reports go, and whether the biggest fits. Nothing is sent."""

import ipaddress
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hostint_agent import bpf_types, last_good, netlink
from hostint_agent.doctor import finding
from hostint_agent.doctor.finding import Finding
from hostint_agent.node_rules import Destination

_IP_MTU, _IPV6_MTU = 14, 24
# of IP and UDP
_HEADER_BYTES = {socket.AF_INET: 20 + 8, socket.AF_INET6: 40 + 8}
_ROUTE = struct.Struct("=BBBBBBBBI")
_RTA_DST, _RTA_OIF = 1, 4
_GIVE = "give --collector HOST:PORT to have one looked at"


@dataclass(frozen=True, slots=True)
class Way:
    """How the kernel would send to a collector."""

    interface: str
    source: str
    mtu: int


class _Routes(netlink.Socket):
    def interface(self, address: str, tos: int) -> str:
        """The interface that leads to an address. Raises OSError."""
        wanted = ipaddress.ip_address(address)
        family = socket.AF_INET if wanted.version == 4 else socket.AF_INET6
        asked = _ROUTE.pack(family, wanted.max_prefixlen, 0, tos, 0, 0, 0, 0, 0)
        asked += netlink.attribute(_RTA_DST, wanted.packed)
        what = f"route to {address}"
        # with an acknowledgement: one route is no dump, and has no end of its own
        self._send(netlink.RTM_GETROUTE, netlink.NLM_F_ACK, asked)
        told = netlink.attributes(self._answers(what)[0], _ROUTE.size)
        return socket.if_indextoname(struct.unpack("=I", told[_RTA_OIF])[0])


def configured(state_dir: Path, node: str) -> tuple[list[Destination], Finding | None]:
    """Collectors of the configuration that was live last; without any, a finding that says why."""
    good = last_good.load(state_dir, node)
    if good and good.spec and good.spec.collectors:
        listed = [Destination(c.name, str(c.address), c.port, c.dscp) for c in good.spec.collectors]
        return listed, None
    if good:
        words = f"the last configuration of node {node} has none"
        return [], finding.warning("collectors", words, f"watch something, or {_GIVE}")
    try:
        kept = sorted(path.name for path in state_dir.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        kept = []
    if kept:
        words = f"{state_dir} has no usable configuration of node {node}, but {', '.join(kept)}"
        return [], finding.warning("collectors", words, f"name the node with --node, or {_GIVE}")
    words = f"none is known: {state_dir} keeps no configuration of node {node}"
    return [], finding.warning("collectors", words, _GIVE)


def reach(destination: Destination) -> Finding:
    """How reports get to a collector, and whether the biggest one fits."""
    try:
        family, address = _resolve(destination)
    except (socket.gaierror, UnicodeError) as error:
        # not everything that is no name gets as far as to be looked up
        words = f"{destination.address}: {getattr(error, 'strerror', None) or error}"
        return finding.failure(_check(destination), words, "correct the name, or this node's DNS")
    try:
        way = _way(family, address, destination)
    except OSError as error:
        return finding.failure(
            _check(destination),
            f"{_where(address, destination.port)}: {error.strerror}",
            f"add a route to {address} on this node, or correct the collector's address",
        )
    return fits(destination, address, way)


def fits(destination: Destination, address: str, way: Way) -> Finding:
    """Judge the way to an address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    needed = bpf_types.REPORT_BYTES + _HEADER_BYTES[family]
    words = (
        f"{_where(address, destination.port)} over {way.interface} from {way.source}, MTU {way.mtu}"
    )
    if way.mtu < needed:
        return finding.warning(
            _check(destination),
            f"{words}: the biggest report is a packet of {needed} bytes",
            f"raise the MTU of {way.interface} (or of the path) to {needed} or more, or lower the collector's snapLength: "
            "bigger reports leave one by one, in fragments",
        )
    return finding.ok(_check(destination), f"{words}, needed are {needed}")


def _resolve(destination: Destination) -> tuple[socket.AddressFamily, str]:
    """Raises socket.gaierror."""
    found = socket.getaddrinfo(destination.address, destination.port, type=socket.SOCK_DGRAM)
    family, _, _, _, address = found[0]
    return family, str(address[0])


def _way(family: socket.AddressFamily, address: str, destination: Destination) -> Way:
    """Connect as a sender does, which sends nothing. Raises OSError (no route)."""
    tos = destination.dscp << 2
    with socket.socket(family, socket.SOCK_DGRAM) as probe, _Routes() as routes:
        if family == socket.AF_INET:
            probe.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        else:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
        probe.connect((address, destination.port))
        mtu = (
            probe.getsockopt(socket.IPPROTO_IP, _IP_MTU)
            if family == socket.AF_INET
            else probe.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU)
        )
        return Way(routes.interface(address, tos), str(probe.getsockname()[0]), mtu)


def _check(destination: Destination) -> str:
    return f"collector {destination.name}"


def _where(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def check(given: Sequence[Destination], state_dir: Path, node: str) -> list[Finding]:
    """Look at the collectors given, or else at those of the configuration that was live last. Raises OSError."""
    known, trouble = (given, None) if given else configured(state_dir, node)
    return [trouble] if trouble else [reach(destination) for destination in known]
