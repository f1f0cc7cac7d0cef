# SPDX-License-Identifier: Apache-2.0
"""Which interfaces of this network namespace are watched: pods and uplinks. Reads netlink; attaching is `attach`'s business."""

import dataclasses
import fnmatch
import ipaddress
import select
import socket
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

import pyroute2

Kind = Literal["pod", "uplink"]
_IFF_UP = 1
_IFF_LOOPBACK = 8
# rtnetlink multicast groups of linux/rtnetlink.h: links, IPv4 and IPv6 addresses, traffic control
_GROUPS = 1 | 0x10 | 0x100 | 8
_MAIN_TABLE = 254
# devices that carry other devices' packets: the device below them is the uplink
_NEVER_UPLINK = frozenset({"bridge", "vxlan", "geneve", "ifb", "dummy", "ipip", "sit", "gre"})


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """One interface to watch. `addresses` are its IP addresses, for the topology."""

    ifindex: int
    name: str
    kind: Kind
    addresses: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """One interface as netlink tells it."""

    ifindex: int
    name: str
    kind: str | None  # None: a physical device
    is_up: bool
    is_loopback: bool
    has_foreign_peer: bool  # the other end is in another network namespace
    master: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """Everything that the choice depends on, read in one go."""

    links: tuple[Link, ...]
    addresses: dict[int, tuple[str, ...]]  # global addresses by ifindex
    local: frozenset[str]  # every address of the host, of any scope
    default_route: frozenset[int]  # ifindexes of default routes


@dataclasses.dataclass(frozen=True, slots=True)
class Patterns:
    """Shell patterns on interface names that override the choice; exclude wins."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    return Link(
        ifindex=message["index"],
        name=message.get_attr("IFLA_IFNAME"),
        kind=info.get_attr("IFLA_INFO_KIND") if info else None,
        is_up=bool(message["flags"] & _IFF_UP),
        is_loopback=bool(message["flags"] & _IFF_LOOPBACK),
        has_foreign_peer=message.get_attr("IFLA_LINK_NETNSID") is not None,
        master=message.get_attr("IFLA_MASTER"),
    )


def read_network() -> Network:
    """Read links, addresses and default routes. Raises pyroute2.NetlinkError or OSError."""
    addresses: dict[int, list[str]] = {}
    local: set[str] = set()
    routes: set[int] = set()
    with pyroute2.IPRoute() as netlink:
        links = tuple(_link(message) for message in netlink.get_links())
        for message in netlink.get_addr():
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            local.add(text)
            if ipaddress.ip_address(text).is_link_local or message["scope"] != 0:
                continue
            addresses.setdefault(message["index"], []).append(text)
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in netlink.get_routes(family=family, table=_MAIN_TABLE):
                if message["dst_len"] == 0 and message.get_attr("RTA_OIF"):
                    routes.add(message.get_attr("RTA_OIF"))
    return Network(
        links=links,
        addresses={index: tuple(sorted(texts)) for index, texts in addresses.items()},
        local=frozenset(local),
        default_route=frozenset(routes),
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _kind(link: Link, carriers: frozenset[int]) -> Kind | None:
    """Pod: a veth into another namespace that carries no route of the host; uplink: what carries the host's own traffic."""
    if link.is_loopback or link.kind in _NEVER_UPLINK:
        return None
    carries = link.ifindex in carriers or (link.master in carriers and link.kind is None)
    if carries:
        return "uplink"
    if link.kind == "veth" and link.has_foreign_peer:
        # a veth that has addresses and is no bridge port may be a pod's gateway or a second uplink: watched either way
        return "pod"
    return None


def choose(network: Network, patterns: Patterns) -> list[Interface]:
    """The interfaces to watch, by index. Pure."""
    carriers = set(network.default_route)
    for link in network.links:
        if link.kind is None and link.ifindex in network.addresses:
            carriers.add(link.ifindex)
    chosen = []
    for link in network.links:
        kind = _kind(link, frozenset(carriers))
        if not link.is_loopback and _matches(link.name, patterns.include):
            kind = kind or "uplink"
        if kind is None or not link.is_up or _matches(link.name, patterns.exclude):
            continue
        addresses = network.addresses.get(link.ifindex, ())
        chosen.append(Interface(link.ifindex, link.name, kind, addresses))
    return sorted(chosen, key=lambda interface: interface.ifindex)


class Changes:
    """A netlink subscription that says *when* to look again, not what changed."""

    def __init__(self) -> None:
        """Subscribe. Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, _GROUPS))
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wait(self, timeout_s: float, wake_up: Sequence[int] = ()) -> bool:
        """Wait until something changed or a descriptor of `wake_up` is readable; False at the time-out."""
        ready, _, _ = select.select([self._socket.fileno(), *wake_up], [], [], timeout_s)
        if self._socket.fileno() in ready:
            self._drain()
        return bool(ready)

    def _drain(self) -> None:
        while True:
            try:
                self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                return  # ENOBUFS: messages were lost, which is a change as well
