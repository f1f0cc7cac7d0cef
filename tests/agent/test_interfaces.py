# SPDX-License-Identifier: Apache-2.0
"""Which interfaces are watched: pods and uplinks, nothing that carries other devices' packets."""

import dataclasses
import socket
import struct

from hostint_agent import interfaces, netlink

LOOPBACK = interfaces.Link(1, "lo", None, False, True, False, None)
NIC = interfaces.Link(2, "eth0", None, True, False, False, None)
POD = interfaces.Link(10, "veth1a2b", "veth", True, False, True, None)
BRIDGE = interfaces.Link(20, "cni0", "bridge", True, False, False, None)
VXLAN = interfaces.Link(21, "flannel.1", "vxlan", True, False, False, None)
LOCAL_PAIR = interfaces.Link(22, "veth-in", "veth", True, False, False, None)


def network(*links: interfaces.Link, addresses=None, default_route=()) -> interfaces.Network:
    return interfaces.Network(
        links=links,
        addresses=addresses or {},
        local=frozenset(),
        default_route=frozenset(default_route),
    )


def chosen(*links: interfaces.Link, patterns=interfaces.Patterns(), **facts) -> dict[str, str]:
    picked = interfaces.choose(network(*links, **facts), patterns)
    return {interface.name: interface.kind for interface in picked}


def test_a_veth_into_another_namespace_is_a_pod():
    assert chosen(POD) == {"veth1a2b": "pod"}


def test_a_veth_pair_within_the_host_is_not_watched():
    assert chosen(LOCAL_PAIR) == {}


def test_what_carries_the_default_route_is_an_uplink():
    assert chosen(NIC, default_route=[2]) == {"eth0": "uplink"}


def test_a_physical_device_with_an_address_is_an_uplink():
    assert chosen(NIC, addresses={2: ("192.0.2.1",)}) == {"eth0": "uplink"}


def test_a_node_that_is_a_namespace_has_a_veth_uplink():
    assert chosen(POD, default_route=[10]) == {"veth1a2b": "uplink"}


def test_the_loopback_is_never_watched():
    everything = interfaces.Patterns(include=("*",))
    assert chosen(LOOPBACK, patterns=everything, addresses={1: ("127.0.0.1",)}) == {}


def test_devices_that_carry_other_devices_packets_are_not_watched():
    facts = {"addresses": {20: ("10.244.1.1",), 21: ("10.244.1.0",)}, "default_route": [20, 21]}
    assert chosen(BRIDGE, VXLAN, **facts) == {}


def test_a_bridged_uplink_is_watched_at_its_physical_port():
    port = dataclasses.replace(NIC, master=20)
    assert chosen(port, BRIDGE, addresses={20: ("192.0.2.1",)}, default_route=[20]) == {
        "eth0": "uplink"
    }


def test_a_device_without_ethernet_headers_is_not_watched_whatever_it_carries_or_is_called():
    tunnel = interfaces.Link(30, "wg0", "wireguard", False, False, False, None)
    facts = {"addresses": {30: ("10.9.0.1",)}, "default_route": [30]}
    assert chosen(tunnel, patterns=interfaces.Patterns(include=("wg*",)), **facts) == {}
    assert chosen(dataclasses.replace(tunnel, is_ethernet=True), **facts) == {"wg0": "uplink"}


def test_exclude_wins_over_everything():
    patterns = interfaces.Patterns(include=("veth*",), exclude=("veth1*",))
    assert chosen(POD, patterns=patterns) == {}


def test_include_adds_what_detection_leaves_out():
    assert chosen(LOCAL_PAIR, patterns=interfaces.Patterns(include=("veth-*",))) == {
        "veth-in": "uplink"
    }


def route_message(kind: int, length: int) -> bytes:
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, length, 0, 0, 254, 0, 0, 1, 0)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def test_only_default_routes_are_a_reason_to_look_again():
    """A router daemon changes thousands of the others."""
    other = route_message(netlink.RTM_NEWROUTE, 24) + route_message(netlink.RTM_DELROUTE, 32)
    assert not interfaces._matters(other)
    assert interfaces._matters(route_message(netlink.RTM_DELROUTE, 0))
    assert interfaces._matters(other + route_message(netlink.RTM_NEWROUTE, 0))


def test_every_other_message_is_a_reason_to_look_again():
    assert interfaces._matters(route_message(netlink.RTM_NEWLINK, 24))
    assert interfaces._matters(b"what nobody understands")


def link_message(kind: str, *data: tuple[int, bytes]) -> bytes:
    inside = b"".join(netlink.attribute(*each) for each in data)
    info = netlink.attribute(1, kind.encode() + b"\0") + netlink.attribute(2, inside)
    head = struct.pack("=BxHiII", 0, 1, 7, 0, 0)
    return head + netlink.attribute(3, b"dev7\0") + netlink.attribute(18, info)


def test_tunnels_are_known_by_their_ports():
    port = struct.pack("!H", 4444)
    links = [
        interfaces._link(link_message("vxlan", (1, bytes(4)), (15, port))),
        interfaces._link(link_message("geneve", (5, port))),
        interfaces._link(link_message("bridge", (15, port), (5, port))),
        interfaces._link(link_message("vxlan")),
    ]
    assert [link.tunnel_port for link in links] == [4444, 4444, None, None]
    assert network(*links, *links).tunnel_ports("vxlan") == [4444]
    assert network(NIC).tunnel_ports("geneve") == []
