# SPDX-License-Identifier: Apache-2.0
"""Read this network namespace from netlink: links, addresses, default routes.

Which of the links are watched is decided in `choice`.
"""

import dataclasses
import errno
import ipaddress
import select
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar

import structlog

from hostint_agent import netlink

Kind = Literal["pod", "uplink"]
_T = TypeVar("_T")
_IFF_LOOPBACK = 8
_ARPHRD_ETHER = 1
# rtnetlink multicast groups of linux/rtnetlink.h: links, traffic control, addresses and routes of both families
_GROUPS = 1 | 8 | 0x10 | 0x40 | 0x100 | 0x400
# Tables from 256 on have the number 252 in the header of a message (RT_TABLE_COMPAT).
_MAIN_TABLE, _RTN_UNICAST = 254, 1
# linux/if_link.h, linux/if_addr.h, linux/rtnetlink.h
_IFLA_IFNAME, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO = 3, 5, 10, 18
_IFLA_EXT_MASK, _IFLA_LINK_NETNSID = 29, 37
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
# the attribute of IFLA_INFO_DATA that is a tunnel's UDP port, big endian
_TUNNEL_PORT = {"vxlan": 15, "geneve": 5}
_RTEXT_FILTER_SKIP_STATS = 8
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_PRIORITY, _RTA_MULTIPATH = 4, 6, 9
_LINK = struct.Struct("=BxHiII")
_ADDRESS = struct.Struct("=BBBBI")
_ROUTE = struct.Struct("=BBBBBBBBI")
_NEXT_HOP = struct.Struct("=HBBi")
# The kernel answers a dump of all families with those of others, too: MCTP, Phonet, MPLS.
_IP: Mapping[int, type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]] = {
    socket.AF_INET: ipaddress.IPv4Address,
    socket.AF_INET6: ipaddress.IPv6Address,
}
_MAX_REPORTED = 64

log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """One interface to watch. `addresses` are its IP addresses, for the topology."""

    ifindex: int
    name: str
    kind: Kind
    addresses: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """One interface as netlink reports it."""

    ifindex: int
    name: str
    kind: str | None  # None: a physical device
    is_ethernet: bool
    is_loopback: bool
    has_foreign_peer: bool  # the other end, or the device below, is in another network namespace
    master: int | None
    tunnel_port: int | None = None  # UDP port of a VXLAN or Geneve device
    lower: int | None = None  # the device below, or the peer, if that is in this network namespace


@dataclasses.dataclass(frozen=True, slots=True)
class DefaultRoute:
    """One way of a default route."""

    ifindex: int
    family: int
    table: int
    metric: int


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """Everything that the choice depends on, read in one go."""

    links: tuple[Link, ...]
    addresses: dict[int, tuple[str, ...]]  # global addresses by ifindex
    default_route: frozenset[int]  # ifindexes of default routes of the main table
    policy_route: frozenset[int] = frozenset()  # ifindexes of default routes of other tables
    preferred_route: frozenset[int] = (
        frozenset()
    )  # of `default_route`, the lowest metric per family

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
    found = netlink.attributes(body, _LINK.size)
    info = netlink.attributes(found.get(_IFLA_LINKINFO, b""))
    device = _text(info[_IFLA_INFO_KIND]) if _IFLA_INFO_KIND in info else None
    is_foreign = _IFLA_LINK_NETNSID in found
    return Link(
        ifindex=ifindex,
        name=_text(found[_IFLA_IFNAME]),
        kind=device,
        is_ethernet=kind == _ARPHRD_ETHER,
        is_loopback=bool(flags & _IFF_LOOPBACK),
        has_foreign_peer=is_foreign,
        master=_index(found, _IFLA_MASTER),
        tunnel_port=_tunnel_port(device, netlink.attributes(info.get(_IFLA_INFO_DATA, b""))),
        lower=None if is_foreign else _index(found, _IFLA_LINK),
    )


def _tunnel_port(kind: str | None, found: Mapping[int, bytes]) -> int | None:
    value = found.get(_TUNNEL_PORT.get(kind or "", 0))
    return int.from_bytes(value, "big") if value else None


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="surrogateescape")


def _number(value: bytes) -> int:
    return int(struct.unpack_from("=I", value)[0])


def _index(found: Mapping[int, bytes], kind: int) -> int | None:
    """Return the ifindex in an attribute; None without one, or where it is 0 (any device)."""
    return _number(found[kind]) or None if kind in found else None


def _address(body: bytes) -> tuple[int, str] | None:
    """Return (ifindex, address) of a message; None if it is no global one of IP."""
    family, _, _, scope, ifindex = _ADDRESS.unpack_from(body)
    if family not in _IP or scope:
        return None
    found = netlink.attributes(body, _ADDRESS.size)
    # of a point-to-point link IFA_ADDRESS is the other end's
    value = found.get(_IFA_LOCAL) or found[_IFA_ADDRESS]
    address = _IP[family](value)
    return None if address.is_link_local else (ifindex, str(address))


def _default_routes(body: bytes) -> list[DefaultRoute]:
    """Return the ways of a route message; none if it is no unicast default route of IP."""
    family, length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(body)
    if length or family not in _IP or kind != _RTN_UNICAST:
        return []
    found = netlink.attributes(body, _ROUTE.size)
    metric = _number(found[_RTA_PRIORITY]) if _RTA_PRIORITY in found else 0
    indexes = [_number(found[_RTA_OIF])] if _RTA_OIF in found else []
    indexes += _hops(found.get(_RTA_MULTIPATH, b""))
    return [DefaultRoute(index, family, table, metric) for index in indexes]


def _hops(hops: bytes) -> Iterator[int]:
    while len(hops) >= _NEXT_HOP.size:
        size, _, _, ifindex = _NEXT_HOP.unpack_from(hops)
        yield ifindex
        hops = hops[max(size, _NEXT_HOP.size) + 3 & ~3 :]


class _Reader:
    """Reads messages; one that cannot be read is left out and logged once."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    def read(
        self, what: str, bodies: Iterable[bytes], parse: Callable[[bytes], _T]
    ) -> Iterator[_T]:
        """Yield what `parse` makes of each body."""
        for body in bodies:
            try:
                yield parse(body)
            except (OSError, struct.error, KeyError, ValueError) as error:
                self._report(what, body, error)

    def _report(self, what: str, body: bytes, error: Exception) -> None:
        # The text of some errors has the value: the number of lines must have an end.
        cause = f"{what}: {type(error).__name__}: {error}"
        if cause not in self._reported and len(self._reported) < _MAX_REPORTED:
            self._reported.add(cause)
            log.warning("netlink message left out", what=what, error=cause, bytes=body[:64].hex())


_READER = _Reader()


def read_network() -> Network:
    """Read links, addresses and default routes. Raises OSError."""
    without_statistics = netlink.attribute(
        _IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS)
    )
    with netlink.Socket() as route:
        asked = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + without_statistics
        links = route.dump(netlink.RTM_GETLINK, asked)
        asked = _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        # Addresses and routes may change without end. What does not change is in every answer.
        addresses = route.dump(netlink.RTM_GETADDR, asked, whole=False)
        routes: list[bytes] = []
        for family in _IP:
            asked = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
            routes += route.dump(netlink.RTM_GETROUTE, asked, whole=False)
    return parse(links, addresses, routes)


def parse(links: Iterable[bytes], addresses: Iterable[bytes], routes: Iterable[bytes]) -> Network:
    """Return the network that the bodies of three dumps describe."""
    by_device: dict[int, list[str]] = {}
    for ifindex, text in filter(None, _READER.read("address", addresses, _address)):
        by_device.setdefault(ifindex, []).append(text)
    ways = [way for some in _READER.read("route", routes, _default_routes) for way in some]
    main = [way for way in ways if way.table == _MAIN_TABLE]
    return Network(
        links=tuple(_READER.read("link", links, _link)),
        addresses={index: tuple(sorted(texts)) for index, texts in by_device.items()},
        default_route=frozenset(way.ifindex for way in main),
        policy_route=frozenset(way.ifindex for way in ways if way.table != _MAIN_TABLE),
        preferred_route=frozenset(_preferred(main)),
    )


def _preferred(ways: Sequence[DefaultRoute]) -> Iterator[int]:
    for family in _IP:
        of_family = [way for way in ways if way.family == family]
        lowest = min((way.metric for way in of_family), default=0)
        yield from (way.ifindex for way in of_family if way.metric == lowest)


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
        # select(2) would refuse descriptors from 1,024 on
        waiting = select.poll()
        for descriptor in (self._socket.fileno(), *wake_up):
            waiting.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in waiting.poll(timeout_s * 1000)}
        changed = self._socket.fileno() in ready and self.drain()
        return changed or any(descriptor in ready for descriptor in wake_up)

    def drain(self) -> bool:
        """Discard the changes reported so far; True if one of them matters."""
        matters = False
        while True:
            try:
                matters |= _matters(self._socket.recv(65536))
            except BlockingIOError:
                return matters
            except OSError as error:
                matters = True  # messages were lost: what they said is not known
                if error.errno != errno.ENOBUFS:
                    return True


def _matters(datagram: bytes) -> bool:
    """Return False for routes that are no default route: a router daemon changes thousands."""
    try:
        return any(_is_change(kind, body) for kind, _, _, body in netlink.messages(datagram))
    except netlink.NetlinkError:
        return True


def _is_change(kind: int, body: bytes) -> bool:
    is_route = kind in (netlink.RTM_NEWROUTE, netlink.RTM_DELROUTE)
    return not is_route or len(body) < _ROUTE.size or not body[1]
