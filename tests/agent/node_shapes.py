# SPDX-License-Identifier: Apache-2.0
"""Netlink dumps of nodes that this kernel cannot be, with the attributes that their kernels send.

A shape says what `ip -d link`, `ip address` and `ip route show table all` show of a node. `read`
feeds the messages made of it through the agent's own reader. Numbers are those of linux/if_link.h,
linux/if_addr.h and linux/rtnetlink.h.
"""

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from unittest import mock

from hostint_agent import interfaces, netlink

_ETHER, _LOOPBACK, _NONE = 1, 772, 0xFFFE
_INFINIBAND = 32
MAIN = 254


def _u8(value: int) -> bytes:
    return struct.pack("=B", value)


def _u16(value: int) -> bytes:
    return struct.pack("=H", value)


def _be16(value: int) -> bytes:
    return struct.pack("!H", value)


def _u32(value: int) -> bytes:
    return struct.pack("=I", value)


# IFLA_INFO_DATA of each kind: what `ip -d link` shows of it
_DATA: Mapping[str, Sequence[tuple[int, bytes]]] = {
    "bond": [(1, _u8(4)), (3, _u32(100)), (14, _u8(1))],  # 802.3ad, miimon 100, layer3+4
    "bridge": [
        (1, _u32(1500)),
        (5, _u32(0)),
        (7, _u8(0)),
    ],  # forward_delay, stp_state, vlan_filtering
    "geneve": [(1, _u32(0)), (5, _be16(6081)), (6, b"")],  # id, port, collect metadata
    "ipvlan": [(1, _u16(0)), (2, _u16(0))],  # l2, bridge
    "macvlan": [(1, _u32(4)), (2, _u16(0))],  # bridge
    "netkit": [(2, _u8(1)), (3, _u32(0)), (4, _u32(2)), (5, _u32(1))],  # primary, policies, l3
    "team": [],
    "tun": [(3, _u8(2)), (4, _u8(0))],  # tap
    "vlan": [(1, _u16(100)), (5, _be16(0x8100))],  # id, 802.1Q
    "vrf": [(1, _u32(10))],  # table
    "vxlan": [(1, _u32(1)), (15, _be16(8472))],  # id, port
    "wireguard": [],
}


@dataclass
class Device:
    """One interface."""

    ifindex: int
    name: str
    kind: str = ""
    master: int = 0
    over: int = 0  # the device below, or a peer on the same host
    peer: int = 0  # index of a peer in another namespace
    member: str = ""  # kind of the master, as IFLA_INFO_SLAVE_KIND
    type: int = _ETHER
    addresses: Sequence[str] = ()

    def message(self) -> bytes:
        """Return the body of an RTM_NEWLINK."""
        is_loopback = self.type == _LOOPBACK
        body = struct.pack(
            "=BxHiII", 0, self.type, self.ifindex, 0x49 if is_loopback else 0x11043, 0
        )
        body += netlink.attribute(3, self.name.encode(errors="surrogateescape") + b"\0")
        body += netlink.attribute(13, _u32(1000)) + netlink.attribute(16, _u8(6))
        body += netlink.attribute(4, _u32(1500))
        if self.over or self.peer:
            body += netlink.attribute(5, _u32(self.over or self.peer))
        if self.master:
            body += netlink.attribute(10, _u32(self.master))
        if self.type == _ETHER:
            body += netlink.attribute(1, bytes((2, 0, 0, 0, 0, self.ifindex & 255)))
        if self.peer:
            body += netlink.attribute(37, struct.pack("=i", self.ifindex % 7))
        return body + self._info()

    def _info(self) -> bytes:
        info = b""
        if self.kind:
            info += netlink.attribute(1, self.kind.encode() + b"\0")
            data = b"".join(netlink.attribute(*each) for each in _DATA.get(self.kind, ()))
            info += netlink.attribute(2, data) if data else b""
        if self.member:
            info += netlink.attribute(4, self.member.encode() + b"\0")
        return netlink.attribute(18 | 0x8000, info) if info else b""

    def address_messages(self) -> Iterator[bytes]:
        """Yield the bodies of RTM_NEWADDR."""
        for text in self.addresses:
            address = ipaddress.ip_interface(text)
            packed, is_v4 = address.ip.packed, address.version == 4
            scope = 254 if address.ip.is_loopback else 253 if address.ip.is_link_local else 0
            body = struct.pack(
                "=BBBBI", _family(address), address.network.prefixlen, 0x80, scope, self.ifindex
            )
            body += netlink.attribute(1, packed) + (netlink.attribute(2, packed) if is_v4 else b"")
            yield body + netlink.attribute(6, struct.pack("=IIII", 0xFFFFFFFF, 0xFFFFFFFF, 0, 0))


@dataclass
class Route:
    """A route; `devices` are several for one with several ways."""

    to: str
    devices: Sequence[int]
    table: int = MAIN
    metric: int = 0
    kind: int = 1  # RTN_UNICAST

    def message(self) -> bytes:
        """Return the body of an RTM_NEWROUTE."""
        is_v6 = ":" in self.to
        network = ipaddress.ip_network(self.to)
        table = self.table if self.table < 256 else 252
        body = struct.pack(
            "=BBBBBBBBI", _family(network), network.prefixlen, 0, 0, table, 3, 0, self.kind, 0
        )
        body += netlink.attribute(15, _u32(self.table))
        if network.prefixlen:
            body += netlink.attribute(1, network.network_address.packed)
        if self.metric:
            body += netlink.attribute(6, _u32(self.metric))
        gateway = netlink.attribute(5, bytes(15 if is_v6 else 3) + b"\1")
        if len(self.devices) == 1:
            return body + gateway + netlink.attribute(4, _u32(self.devices[0]))
        hops = b"".join(
            struct.pack("=HBBi", 8 + len(gateway), 0, 0, i) + gateway for i in self.devices
        )
        return body + netlink.attribute(9, hops)


def _family(address: ipaddress._BaseAddress | ipaddress._BaseNetwork) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


@dataclass
class Shape:
    """A node."""

    devices: Sequence[Device]
    routes: Sequence[Route]
    more_addresses: Sequence[bytes] = field(default_factory=list)
    more_links: Sequence[bytes] = field(default_factory=list)

    def bodies(self, kind: int, family: int) -> list[bytes]:
        """Return what a dump answers."""
        if kind == netlink.RTM_GETLINK:
            return [each.message() for each in self.devices] + list(self.more_links)
        if kind == netlink.RTM_GETADDR:
            each = [body for device in self.devices for body in device.address_messages()]
            return list(self.more_addresses) + each
        return [r.message() for r in self.routes if r.message()[0] == family]


class _Kernel(netlink.Socket):
    """Answers dumps as the kernel does: datagrams of several messages, and an end."""

    shape: Shape

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence += 1
        bodies = self.shape.bodies(kind, body[0])
        self._datagrams = [
            b"".join(map(self._framed, bodies[at : at + 3])) for at in range(0, len(bodies), 3)
        ]
        self._datagrams.append(self._framed(bytes(4), 3))

    def _framed(self, body: bytes, kind: int = netlink.RTM_NEWLINK) -> bytes:
        header = struct.pack("=IHHII", 16 + len(body), kind, 2, self._sequence, 0)
        return header + body + bytes(-len(body) % 4)

    def _receive(self, what: str) -> bytes:
        return self._datagrams.pop(0)


@contextlib.contextmanager
def answering(shape: Shape) -> Iterator[None]:
    """Have every dump answered by a shape."""
    kernel = type("Kernel", (_Kernel,), {"shape": shape})
    with mock.patch.object(netlink, "Socket", kernel):
        yield


def read(shape: Shape) -> interfaces.Network:
    """Return what the agent reads on such a node."""
    with answering(shape):
        return interfaces.read_network()


def default(*devices: int, **more: int) -> Route:
    """Return a default route of IPv4."""
    return Route("0.0.0.0/0", devices, **more)


def nic(ifindex: int, name: str, *addresses: str, **more: object) -> Device:
    """Return a physical device."""
    return Device(ifindex, name, addresses=addresses, **more)  # type: ignore[arg-type]


def pod(ifindex: int, name: str, kind: str = "veth", **more: object) -> Device:
    """Return a pod's device."""
    return Device(ifindex, name, kind, peer=2, **more)  # type: ignore[arg-type]


LO = Device(1, "lo", type=_LOOPBACK, addresses=["127.0.0.1/8", "::1/128"])

# bare metal: br0 has the address, over bond0.100 over bond0; VLAN 200 of the bond is for storage
BOND_VLAN_BRIDGE = Shape(
    [
        LO,
        nic(2, "eno1", master=4, member="bond"),
        nic(3, "eno2", master=4, member="bond"),
        Device(4, "bond0", "bond"),
        Device(5, "bond0.100", "vlan", over=4, master=7, member="bridge"),
        Device(6, "bond0.200", "vlan", over=4, addresses=["10.200.0.11/24"]),
        Device(7, "br0", "bridge", addresses=["10.100.0.11/24", "2001:db8:100::11/64"]),
        Device(8, "vnet0", "tun", master=7, member="bridge"),
        Device(9, "flannel.1", "vxlan", addresses=["10.244.1.0/32"]),
        Device(10, "cni0", "bridge", addresses=["10.244.1.1/24"]),
        pod(11, "veth5e01cb4e", master=10, member="bridge"),
    ],
    [default(7), Route("::/0", [7], metric=1024), Route("10.244.2.0/24", [9])],
)

# the address is on a VLAN of a bond, without a default route (BGP to the host, static routes)
VLAN_WITHOUT_ROUTE = Shape(
    [
        LO,
        nic(2, "eno1", master=4, member="bond"),
        nic(3, "eno2", master=4, member="bond"),
        Device(4, "bond0", "bond"),
        Device(5, "bond0.100", "vlan", over=4, addresses=["10.100.0.11/24"]),
        pod(11, "cali3f2a"),
    ],
    [Route("10.0.0.0/8", [5])],
)

# OpenShift, OVN-Kubernetes: br-ex has the address, eth0 is a port of it, pods are ports of br-int
OVS = Shape(
    [
        LO,
        nic(2, "enp1s0", master=4, member="openvswitch"),
        Device(4, "ovs-system", "openvswitch"),
        Device(5, "br-ex", "openvswitch", addresses=["192.0.2.21/24", "169.254.169.2/29"]),
        Device(6, "br-int", "openvswitch"),
        Device(7, "ovn-k8s-mp0", "openvswitch", addresses=["10.128.0.2/23"]),
        Device(8, "genev_sys_6081", "geneve", master=4, member="openvswitch"),
        pod(9, "3d5a1b8c6e2f4a7", master=4, member="openvswitch"),
        pod(10, "7c0f9b1d2e3a5b8", master=4, member="openvswitch"),
    ],
    [default(5, metric=48), Route("10.128.0.0/14", [7])],
)

# Azure with accelerated networking: the VF is a member of the synthetic device, which has no kind
AZURE = Shape(
    [
        LO,
        nic(2, "eth0", "10.224.0.4/16"),
        nic(3, "enP30832p0s0", master=2),
        pod(5, "azv3f1c2b7d"),
        pod(7, "azv9a0b1c2d"),
    ],
    [
        default(2, metric=100),
        Route("168.63.129.16/32", [2], metric=100),
        Route("10.224.0.17/32", [5]),
    ],
)

# AKS with Azure CNI in bridge mode: the synthetic device is a port of azure0
AKS_BRIDGE = Shape(
    [
        LO,
        nic(2, "eth0", master=4, member="bridge"),
        nic(3, "enP1s1", master=2),
        Device(4, "azure0", "bridge", addresses=["10.240.0.4/16"]),
        pod(6, "azv1d2c3b4a", master=4, member="bridge"),
    ],
    [default(4)],
)

# a VF given to the host as it is, its PF in another machine
SRIOV = Shape(
    [LO, nic(2, "ens1f0v2", "10.1.0.7/24"), pod(9, "cali01")],
    [default(2)],
)

# the node's address on a macvlan above the NIC, and an ipvlan for storage
MACVLAN = Shape(
    [
        LO,
        nic(2, "eth0"),
        nic(3, "eth1"),
        Device(4, "host0", "macvlan", over=2, addresses=["192.0.2.5/24"]),
        Device(5, "store0", "ipvlan", over=3, addresses=["10.9.0.5/24"]),
        pod(9, "veth1"),
    ],
    [default(4)],
)

# EKS with the VPC CNI: pods of secondary ENIs leave by policy routes, VLANs of a trunk ENI have no
# addresses
EKS = Shape(
    [
        LO,
        nic(2, "eth0", "192.168.10.21/19"),
        pod(3, "eni306cbc4b983"),
        pod(4, "enifd8fb8f99f1"),
        nic(5, "eth1", "192.168.20.9/19"),
        nic(6, "eth2"),
        Device(7, "vlan.eth.1", "vlan", over=6),
        pod(8, "vlan7b1c2d3e4f5"),
        nic(9, "eth3"),
    ],
    [
        default(2, metric=512),
        default(5, table=2),
        default(7, table=101),
        Route("192.168.20.33/32", [3]),
    ],
)

# AKS, overlay: one NIC, pods behind routes
AKS = Shape(
    [LO, nic(2, "eth0", "10.224.0.5/16"), pod(4, "azv0c5"), pod(6, "lxc_health")],
    [default(2, metric=100), Route("10.244.3.11/32", [4])],
)

# Cilium with netkit devices, a VXLAN and its own pair of veth
NETKIT = Shape(
    [
        LO,
        nic(2, "eth0", "172.18.0.3/16", "fc00:f853::3/64"),
        Device(3, "cilium_net", "veth", over=4),
        Device(4, "cilium_host", "veth", over=3, addresses=["10.244.0.201/32"]),
        Device(5, "cilium_vxlan", "vxlan"),
        pod(10, "lxc1b14086930ee", "netkit"),
        pod(12, "lxc_health", "netkit"),
    ],
    [default(2), Route("10.244.0.24/32", [10])],
)

# kind: the node is a container, its eth0 the end of a veth
KIND = Shape(
    [
        LO,
        pod(2, "eth0", addresses=["172.18.0.2/16"]),
        pod(3, "veth2a1b3c4d", addresses=["10.244.0.1/32"]),
    ],
    [default(2), Route("10.244.0.2/32", [3])],
)

# k3s on a machine without a network: a default route that only has to exist, IPVS addresses
K3S_AIR_GAP = Shape(
    [
        LO,
        nic(2, "eth0", "192.168.1.5/24"),
        Device(3, "dummy0", "dummy", addresses=["203.0.113.254/31"]),
        Device(4, "kube-ipvs0", "dummy", addresses=["10.43.0.1/32", "10.43.0.10/32"]),
        Device(5, "cni0", "bridge", addresses=["10.42.0.1/24"]),
        Device(6, "flannel.1", "vxlan", addresses=["10.42.0.0/32"]),
        pod(7, "veth77aa", master=5, member="bridge"),
    ],
    [default(3, metric=1000)],
)

TEAM = Shape(
    [
        LO,
        nic(2, "ens1", master=4, member="team"),
        nic(3, "ens2", "10.3.0.9/24", master=4, member="team"),
        Device(4, "team0", "team", addresses=["10.3.0.5/24"]),
    ],
    [default(4)],
)

VRF = Shape(
    [
        LO,
        nic(2, "eth0", "192.0.2.9/24", master=4, member="vrf"),
        nic(3, "eth1", "198.51.100.9/24"),
        Device(4, "red", "vrf"),
    ],
    [default(2, table=10), default(3)],
)

# two bridges of one host, connected by a cable
CABLED = Shape(
    [
        LO,
        nic(2, "eth0", master=4, member="bridge"),
        Device(4, "br-phys", "bridge"),
        Device(5, "br-host", "bridge", addresses=["192.0.2.5/24"]),
        Device(6, "patch-a", "veth", over=7, master=4, member="bridge"),
        Device(7, "patch-b", "veth", over=6, master=5, member="bridge"),
        pod(9, "veth9", master=5, member="bridge"),
    ],
    [default(5)],
)

# frames below these cannot be read, or are not Ethernet
MACSEC = Shape(
    [LO, nic(2, "eth0"), Device(3, "macsec0", "macsec", over=2, addresses=["192.0.2.5/24"])],
    [default(3)],
)
WIREGUARD = Shape(
    [
        LO,
        nic(2, "eth0", "198.51.100.4/24"),
        Device(3, "wg0", "wireguard", type=_NONE, addresses=["10.6.0.2/24"]),
        pod(4, "veth4"),
    ],
    [default(2), Route("10.6.0.0/24", [3])],
)
FULL_TUNNEL = Shape(
    [
        LO,
        nic(2, "eth0", "198.51.100.4/24"),
        Device(3, "tun0", "tun", type=_NONE, addresses=["10.8.0.2/24"]),
    ],
    [default(3), default(2, metric=100)],
)
INFINIBAND = Shape(
    [LO, nic(2, "ib0", "10.7.0.2/24", type=_INFINIBAND)],
    [default(2)],
)
# the way out of this bridge is a virtual machine
TAP_BRIDGE = Shape(
    [
        LO,
        Device(2, "br0", "bridge", addresses=["192.0.2.5/24"]),
        Device(3, "tap0", "tun", master=2, member="bridge"),
        pod(4, "veth4", master=2, member="bridge"),
    ],
    [default(2)],
)
