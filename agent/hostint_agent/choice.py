# SPDX-License-Identifier: Apache-2.0
"""Pure: which interfaces are watched, and which traffic of the node none of them sees.

Pods are veth or netkit devices whose peer is in another network namespace. Uplinks are found from
the devices that carry the host's traffic (an address, a default route, a bridge with pods) down to
the wire. Of each stack of devices one is chosen:

- A bridge, an OVS bridge or a VRF passes packets on to its ports: the ports that lead to the wire.
- VLAN, macvlan and ipvlan exchange whole frames with the device below, which those of pods share:
  the device below.
- Bond, team, hv_netvsc and net_failover make one device of several: that one, not its members.
- Anything else (MACsec, DSA, a kind that is not known here): the device itself, since the frames
  below it may be unreadable.

So a packet passes one uplink on its way in or out, whatever of the stack has addresses.
"""

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from hostint_agent.interfaces import Interface, Kind, Link, Network, Patterns

_POD_KINDS = frozenset({"veth", "netkit"})
# Masters whose ports are ways of their own. Every other master makes one device of its members.
_SWITCHES = frozenset({"bridge", "openvswitch", "vrf"})
# Kinds through which the same frame passes that the device below has.
_SAME_FRAME = frozenset({"vlan", "macvlan", "macvtap", "ipvlan", "ipvtap"})
# What these encapsulate leaves by an uplink, where it is known again by what is inside.
_TUNNELS = frozenset({"vxlan", "geneve"})
# Devices that end on this host, unless they stand on others. A kind that is not known here may be
# that of a driver: it leads out.
_ENDS = frozenset({"veth", "netkit", "tun", "dummy", "ifb"})
# Nothing leaves by these: they hold addresses (IPVS), or a default route that only has to exist
# (k3s without a network).
_NO_WAY_OUT = frozenset({"dummy", "ifb"})


@dataclasses.dataclass(frozen=True, slots=True)
class Unseen:
    """A device with traffic of the node that no watched interface sees."""

    name: str
    carries: str  # "the default route", or "the node's address 192.0.2.1"
    cause: str
    remedy: str

    @property
    def found(self) -> str:
        """What is wrong, and why."""
        return f"{self.carries} is on {self.name}, which is not watched: {self.cause}"

    def __str__(self) -> str:
        return f"{self.found}; {self.remedy}"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_pod(link: Link) -> bool:
    return link.kind in _POD_KINDS and link.has_foreign_peer


class _Devices:
    """The links of a network namespace as a tree of masters and lower devices."""

    def __init__(self, links: Iterable[Link]) -> None:
        self._by_index = {link.ifindex: link for link in links}
        self._ports: dict[int, list[Link]] = {}
        for link in self._by_index.values():
            if link.master in self._by_index:
                self._ports.setdefault(link.master, []).append(link)

    def taps(self, link: Link, passed: frozenset[int] = frozenset()) -> Iterator[Link]:
        """Yield the devices at which all packets of a device can be seen."""
        # A loop can be read where devices changed between two messages of a dump.
        if link.ifindex in passed:
            return
        passed |= {link.ifindex}
        following = self._following(link)
        for each in following:
            yield from self.taps(each, passed)
        if not following and link.kind not in _SWITCHES:
            yield link

    def _following(self, link: Link) -> list[Link]:
        """Return the devices that take all packets of this one; none if it is the last one."""
        master = self._by_index.get(link.master or 0)
        if master and master.kind not in _SWITCHES:
            return [master]
        if link.kind in _SWITCHES:
            return [port for port in self.ports(link) if self.leads_to_wire(port)]
        lower = self._by_index.get(link.lower or 0)
        if lower and link.kind in _SAME_FRAME:
            return [lower]
        if lower and link.kind == "veth":
            # A cable to a bridge of this host.
            bridge = self._by_index.get(lower.master or 0)
            return [bridge] if bridge and bridge.kind in _SWITCHES else []
        return []

    def ports(self, switch: Link) -> list[Link]:
        """Return the ports of a switch."""
        if switch.kind != "openvswitch":
            return self._ports.get(switch.ifindex, [])
        # The kernel knows one master of all OVS bridges. Which ports a bridge has only OVS knows.
        return [
            port
            for master, ports in self._ports.items()
            if self._by_index[master].kind == "openvswitch"
            for port in ports
        ]

    def leads_to_wire(self, link: Link, passed: frozenset[int] = frozenset()) -> bool:
        """Return True if packets leave the host by this device or one below it."""
        if link.ifindex in passed or link.is_loopback or link.kind in _TUNNELS:
            return False
        passed |= {link.ifindex}
        below = self._following(link) if link.kind == "veth" else self._below(link)
        if not below:
            return link.kind not in _ENDS
        # A physical device stays one when it gets members: a VF below hv_netvsc.
        return link.kind is None or any(self.leads_to_wire(each, passed) for each in below)

    def _below(self, link: Link) -> list[Link]:
        lower = self._by_index.get(link.lower or 0)
        return [*self._ports.get(link.ifindex, []), *([lower] if lower else [])]


def choose(network: Network, patterns: Patterns) -> list[Interface]:
    """Return the interfaces to watch, by index."""
    uplinks = frozenset(_uplinks(network))
    chosen = []
    for link in network.links:
        # The programs read Ethernet headers.
        if link.is_loopback or not link.is_ethernet or _matches(link.name, patterns.exclude):
            continue
        kind: Kind | None = None
        if link.ifindex in uplinks:
            kind = "uplink"
        elif _is_pod(link):
            kind = "pod"
        elif _matches(link.name, patterns.include):
            kind = "uplink"
        if kind:
            addresses = network.addresses.get(link.ifindex, ())
            chosen.append(Interface(link.ifindex, link.name, kind, addresses))
    return sorted(chosen, key=lambda interface: interface.ifindex)


def _uplinks(network: Network) -> Iterator[int]:
    devices = _Devices(network.links)
    pod_masters = {link.master for link in network.links if _is_pod(link) and link.master}
    carriers = {*network.addresses, *network.policy_route, *pod_masters}
    for link in network.links:
        has_route = link.ifindex in network.default_route
        if not has_route and link.ifindex not in carriers:
            continue
        for tap in devices.taps(link):
            # An address alone may be that of a gateway of pods, or of a tunnel.
            is_way_out = has_route and tap.kind not in _TUNNELS | _NO_WAY_OUT
            if is_way_out or devices.leads_to_wire(tap):
                yield tap.ifindex


def unseen(
    network: Network, patterns: Patterns, chosen: Iterable[Interface], addresses: Collection[str]
) -> tuple[Unseen, ...]:
    """Return the devices by which the node's own traffic passes the `chosen` interfaces by.

    `addresses` are those that the cluster knows the node by. A device that `patterns.exclude` names
    is left out: somebody decided so.
    """
    devices = _Devices(network.links)
    kinds = {interface.ifindex: interface.kind for interface in chosen}
    found = []
    for link in network.links:
        carries = _carries(link, network, addresses)
        if not carries or link.is_loopback or link.kind in _TUNNELS | _NO_WAY_OUT:
            continue
        taps = list(devices.taps(link))
        ports = devices.ports(link) if link.kind in _SWITCHES else []
        names = [each.name for each in (link, *taps)]
        is_excluded = any(_matches(name, patterns.exclude) for name in names)
        if not is_excluded and not _is_watched(taps, ports, kinds):
            found.append(_unseen(link, taps, carries))
    return tuple(found)


def _carries(link: Link, network: Network, addresses: Collection[str]) -> str | None:
    for address in network.addresses.get(link.ifindex, ()):
        if address in addresses:
            return f"the node's address {address}"
    return "the default route" if link.ifindex in network.preferred_route else None


def _is_watched(taps: Iterable[Link], ports: Iterable[Link], kinds: Mapping[int, Kind]) -> bool:
    if any(tap.ifindex in kinds for tap in taps):
        return True
    # None of a bridge's ports may lead to the wire: where all are watched, the way out is, too.
    of_ports = [kinds.get(port.ifindex) for port in ports]
    return "uplink" in of_ports or (bool(of_ports) and None not in of_ports)


def _unseen(link: Link, taps: Sequence[Link], carries: str) -> Unseen:
    headless = [tap for tap in taps if not tap.is_ethernet]
    accept = f"accept that with --exclude-interfaces {link.name}"
    if headless:
        kind = f" (kind {headless[0].kind})" if headless[0].kind else ""
        cause = f"{headless[0].name}{kind} has no Ethernet headers"
        return Unseen(link.name, carries, cause, f"what takes it cannot be reported, {accept}")
    if link.kind in _SWITCHES:
        cause = "none of its ports leads to a physical device"
    else:
        cause = f"devices of kind {link.kind} are not known to lead out of the host"
    return Unseen(
        link.name, carries, cause, f"name its way out with --include-interfaces, or {accept}"
    )
