# SPDX-License-Identifier: Apache-2.0
"""Which interfaces of this network namespace are watched: pods and uplinks. Reads netlink; attaching is `attach`'s business."""

import contextlib
import dataclasses
import fnmatch
import ipaddress
import select
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from hostint_agent import netlink

Kind = Literal["pod", "uplink"]
_IFF_LOOPBACK = 8
_ARPHRD_ETHER = 1
# rtnetlink multicast groups of linux/rtnetlink.h: links, traffic control, addresses and routes of both families
_GROUPS = 1 | 8 | 0x10 | 0x40 | 0x100 | 0x400
_MAIN_TABLE = 254
# linux/if_link.h, linux/if_addr.h, linux/rtnetlink.h
_IFLA_IFNAME, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_EXT_MASK, _IFLA_LINK_NETNSID = 3, 10, 18, 29, 37
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
# the attribute of IFLA_INFO_DATA that is a tunnel's UDP port, big endian
_TUNNEL_PORT = {"vxlan": 15, "geneve": 5}
_RTEXT_FILTER_SKIP_STATS = 8
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_MULTIPATH, _RTA_TABLE = 4, 9, 15
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEXT_HOP = struct.Struct("=HBBi")
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
    is_ethernet: bool
    is_loopback: bool
    has_foreign_peer: bool  # the other end is in another network namespace
    master: int | None
    tunnel_port: int | None = None  # UDP port of a VXLAN or Geneve device


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """Everything that the choice depends on, read in one go."""

    links: tuple[Link, ...]
    addresses: dict[int, tuple[str, ...]]  # global addresses by ifindex
    local: frozenset[str]  # every address of the host, of any scope
    default_route: frozenset[int]  # ifindexes of default routes

    def tunnel_ports(self, kind: str) -> list[int]:
        """UDP ports of the tunnels of one kind, "vxlan" or "geneve", that end on this host."""
        return sorted(
            {link.tunnel_port for link in self.links if link.kind == kind and link.tunnel_port}
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Patterns:
    """Shell patterns on interface names that override the choice; exclude wins."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def _link(body: bytes) -> Link:
    _, kind, ifindex, flags, _ = _LINK.unpack_from(body)
    told = netlink.attributes(body, _LINK.size)
    info = netlink.attributes(told.get(_IFLA_LINKINFO, b""))
    device = _text(info[_IFLA_INFO_KIND]) if _IFLA_INFO_KIND in info else None
    return Link(
        ifindex=ifindex,
        name=_text(told[_IFLA_IFNAME]),
        kind=device,
        is_ethernet=kind == _ARPHRD_ETHER,
        is_loopback=bool(flags & _IFF_LOOPBACK),
        has_foreign_peer=_IFLA_LINK_NETNSID in told,
        master=_number(told[_IFLA_MASTER]) if _IFLA_MASTER in told else None,
        tunnel_port=_tunnel_port(device, netlink.attributes(info.get(_IFLA_INFO_DATA, b""))),
    )


def _tunnel_port(kind: str | None, told: Mapping[int, bytes]) -> int | None:
    value = told.get(_TUNNEL_PORT.get(kind or "", 0))
    return int.from_bytes(value, "big") if value else None


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="surrogateescape")


def _number(value: bytes) -> int:
    return int(struct.unpack_from("=I", value)[0])


def _address(body: bytes) -> tuple[int, int, str]:
    """(ifindex, scope, address) of an address message."""
    _, _, _, scope, ifindex = _ADDRESS.unpack_from(body)
    told = netlink.attributes(body, _ADDRESS.size)
    # of a point-to-point link IFA_ADDRESS is the other end's
    value = told.get(_IFA_LOCAL) or told[_IFA_ADDRESS]
    return ifindex, scope, str(ipaddress.ip_address(value))


def _default_route(body: bytes) -> Iterator[int]:
    """Interfaces of a route message, if that is a default route of the main table."""
    _, length, _, _, table, *_ = _ROUTE.unpack_from(body)
    if length:
        return
    told = netlink.attributes(body, _ROUTE.size)
    if _RTA_TABLE in told:
        table = _number(told[_RTA_TABLE])
    if table != _MAIN_TABLE:
        return
    if _RTA_OIF in told:
        yield _number(told[_RTA_OIF])
    hops = told.get(_RTA_MULTIPATH, b"")
    while len(hops) >= _NEXT_HOP.size:
        size, _, _, ifindex = _NEXT_HOP.unpack_from(hops)
        yield ifindex
        hops = hops[max(size, _NEXT_HOP.size) + 3 & ~3 :]


def read_network() -> Network:
    """Read links, addresses and default routes. Raises OSError."""
    addresses: dict[int, list[str]] = {}
    local: set[str] = set()
    without_statistics = netlink.attribute(
        _IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS)
    )
    with netlink.Socket() as route:
        asked = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + without_statistics
        links = tuple(_link(body) for body in route.dump(netlink.RTM_GETLINK, asked))
        asked = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        for body in route.dump(netlink.RTM_GETADDR, asked):
            ifindex, scope, text = _address(body)
            local.add(text)
            if scope == 0 and not ipaddress.ip_address(text).is_link_local:
                addresses.setdefault(ifindex, []).append(text)
        routes: set[int] = set()
        for family in (socket.AF_INET, socket.AF_INET6):
            asked = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
            for body in route.dump(netlink.RTM_GETROUTE, asked):
                routes.update(_default_route(body))
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
    if link.kind in _NEVER_UPLINK:
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
        # the programs read Ethernet headers: a tunnel device without them is not for us, whatever it carries
        if link.is_loopback or not link.is_ethernet or _matches(link.name, patterns.exclude):
            continue
        kind = _kind(link, frozenset(carriers))
        if _matches(link.name, patterns.include):
            kind = kind or "uplink"
        if kind:
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

    def close(self) -> None:
        """Unsubscribe."""
        self._socket.close()

    def wait(self, timeout_s: float, wake_up: Sequence[int] = ()) -> bool:
        """Wait until something changed or a descriptor of `wake_up` is readable; False at the time-out."""
        ready, _, _ = select.select([self._socket.fileno(), *wake_up], [], [], timeout_s)
        changed = self._socket.fileno() in ready and self.drain()
        return changed or any(descriptor in ready for descriptor in wake_up)

    def drain(self) -> bool:
        """Forget the changes told so far; True if one of them matters to us."""
        matters = False
        while True:
            try:
                matters |= _matters(self._socket.recv(65536))
            except BlockingIOError:
                return matters
            except OSError:
                matters = True  # ENOBUFS: messages were lost, which is a change as well


def _matters(datagram: bytes) -> bool:
    """False for what tells of routes alone that are no default route: a router daemon changes thousands."""
    with contextlib.suppress(netlink.NetlinkError):
        return any(
            kind not in (netlink.RTM_NEWROUTE, netlink.RTM_DELROUTE) or not body[1]
            for kind, _, _, body in netlink.messages(datagram)
        )
    return True
