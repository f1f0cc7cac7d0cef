# SPDX-License-Identifier: Apache-2.0
"""The paths of the matrix, and what is claimed of each."""

import dataclasses
import ipaddress
from collections.abc import Mapping

from hostint_agent import classifier
from tests.lab import truth
from tests.lab.paths import traffic, wiring
from tests.lab.topology import Mode

# claims: nearly all of the watched packets are matched, or none is
ALL, NONE = "all", "none"
_BOTH_WAYS = {"forth": ALL, "back": ALL}


@dataclasses.dataclass(frozen=True)
class Path:
    """A way through a node and the traffic on it.

    `claims` say what is matched, by what becomes of the packets: forth and back through the node, sent by the host,
    arrived at the host. `except_for` are limits of the datapath: (way, IP version, kind) of which nothing is claimed, each
    with its cause next to it in PATHS. That nothing is made up is claimed of every path, without exception.
    """

    name: str
    build: wiring.Build
    mode: Mode = "routed"
    nodes: int = 1
    kinds: tuple[tuple[str, traffic.Kind], ...] = (("udp", traffic.UDP), ("tcp", traffic.TCP))
    claims: Mapping[str, str] = dataclasses.field(default_factory=lambda: _BOTH_WAYS)
    except_for: tuple[tuple[str, int, str], ...] = ()
    watch: str = "ports"

    def claim(self, way: str, version: int, kind: str) -> str | None:
        """What is claimed of one way, None for nothing."""
        return None if (way, version, kind) in self.except_for else self.claims.get(way)


def _tagged(tags: int) -> tuple[tuple[str, traffic.Kind], ...]:
    kinds = (("udp", traffic.UDP), ("tcp", traffic.TCP))
    return tuple((name, traffic.tagged(kind, tags)) for name, kind in kinds)


_HOST = {"sent": ALL, "arrived": ALL}
_WITH_SEGMENTS = (("udp", traffic.UDP), ("tcp", traffic.TCP), ("udp-gso", traffic.UDP_SEGMENTS))
_SUPER_PACKETS = tuple((version, kind) for version in (4, 6) for kind in ("tcp", "udp-gso"))
_UDP_FRAGMENTS = (("udp", traffic.FRAGMENTS),)

PATHS = (
    Path("routed", wiring.pods, kinds=_WITH_SEGMENTS, watch="both sides"),
    Path("rps", wiring.rps),
    Path("iptables", wiring.iptables, watch="connected"),
    Path("nftables", wiring.nftables, watch="listening"),
    Path("bridge", wiring.pods, mode="bridged"),
    Path("bridge-routed", wiring.outside, mode="bridged"),
    # IPv6 routing gives a packet whose headroom is too small for the tunnel another sk_buff (skb_expand_head clones what
    # no socket owns)
    Path("vxlan", wiring.vxlan, nodes=2, except_for=(("forth", 6, "udp"),)),
    Path("geneve", wiring.geneve, nodes=2),
    Path("redirect", wiring.redirected("cni_redirect")),
    Path("redirect-neigh", wiring.redirected("cni_redirect_neigh")),
    Path("redirect-peer", wiring.redirected_to_peer),
    Path("host", wiring.host, claims=_HOST),
    Path("vlan", wiring.pods, mode="bridged", kinds=_tagged(1)),
    Path("qinq", wiring.pods, mode="bridged", kinds=_tagged(2)),
    Path("sctp", wiring.pods, kinds=(("sctp", traffic.SCTP),)),
    Path("icmp", wiring.pods, kinds=(("icmp", traffic.ICMP),)),
    Path("fragments", wiring.pods, kinds=_UDP_FRAGMENTS),
    # the stack puts a datagram together in the sk_buff of the fragment that came last: it is another packet by then
    Path("host-fragments", wiring.host, kinds=_UDP_FRAGMENTS, claims={"sent": ALL}),
    # connection tracking does the same, and takes it apart again
    Path("defragmented", wiring.defragmented, kinds=_UDP_FRAGMENTS, claims={}),
    # a CNI's filter that accepts overwrites tc_index, by which packets were once known
    Path("accepted", wiring.accepted(wiring.pods)),
    Path("bridge-routed-accepted", wiring.accepted(wiring.outside), mode="bridged"),
    Path("iptables-accepted", wiring.accepted(wiring.iptables), watch="connected"),
    # back, the shaper of the bridge takes super-packets apart: other packets with the same tag and interface
    Path(
        "segmented",
        wiring.shaped,
        mode="bridged",
        kinds=_WITH_SEGMENTS,
        except_for=tuple(("back", *what) for what in _SUPER_PACKETS),
    ),
)


def selection(
    path: Path, kind: traffic.Kind, scene: wiring.Scene, version: int, percent: int
) -> truth.Selection:
    """Which of the flows are watched."""
    protocol = kind.protocols[version]
    flows = traffic.FLOWS * percent // 100
    if kind.by_address:
        first = ipaddress.ip_network(wiring.CLIENTS[version])[0]
        clients = tuple(ipaddress.summarize_address_range(first, first + flows - 1))
        return truth.Selection(protocol, clients=clients)
    ports = (traffic.FIRST_CLIENT_PORT, traffic.FIRST_CLIENT_PORT + flows - 1)
    clients, server = _sides(path.watch, scene, version)
    return truth.Selection(protocol, ports, clients, server)


def _sides(
    watch: str, scene: wiring.Scene, version: int
) -> tuple[tuple[classifier.Network, ...], classifier.Network | None]:
    """Addresses of a rule: none, what the client connects to, where the server listens, or client and server."""
    host = classifier.host_network
    if watch == "connected":
        return (), host(scene.connects[version])
    if watch == "listening":
        return (), host(scene.listens[version])
    if watch == "both sides":
        return (host(scene.client.ip(version)),), host(scene.listens[version])
    return (), None
