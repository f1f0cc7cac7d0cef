# SPDX-License-Identifier: Apache-2.0
"""Which interfaces are watched, one of each stack of devices, and what none of them sees."""

import dataclasses

import pytest

from hostint_agent import choice, interfaces
from tests.agent import node_shapes as shapes
from tests.agent.cable import cable
from tests.agent.node_shapes import Shape
from tests.lab.namespace import ip

LOOPBACK = interfaces.Link(1, "lo", None, False, True, False, None)
NIC = interfaces.Link(2, "eth0", None, True, False, False, None)
POD = interfaces.Link(10, "veth1a2b", "veth", True, False, True, None)
BRIDGE = interfaces.Link(20, "cni0", "bridge", True, False, False, None)
VXLAN = interfaces.Link(21, "flannel.1", "vxlan", True, False, False, None)
LOCAL_PAIR = interfaces.Link(22, "veth-in", "veth", True, False, False, None)
NOTHING = interfaces.Patterns()


def network(*links: interfaces.Link, addresses=None, default_route=()) -> interfaces.Network:
    return interfaces.Network(
        links=links,
        addresses=addresses or {},
        default_route=frozenset(default_route),
        preferred_route=frozenset(default_route),
    )


def names(chosen: list[interfaces.Interface]) -> dict[str, str]:
    return {interface.name: interface.kind for interface in chosen}


def chosen(*links: interfaces.Link, patterns=NOTHING, **facts) -> dict[str, str]:
    return names(choice.choose(network(*links, **facts), patterns))


def test_a_veth_into_another_namespace_is_a_pod():
    assert chosen(POD) == {"veth1a2b": "pod"}


def test_a_veth_pair_within_the_host_is_not_watched():
    assert chosen(LOCAL_PAIR) == {}


def test_what_carries_the_default_route_is_an_uplink():
    assert chosen(NIC, default_route=[2]) == {"eth0": "uplink"}


def test_a_physical_device_with_an_address_is_an_uplink():
    assert chosen(NIC, addresses={2: ("192.0.2.1",)}) == {"eth0": "uplink"}


def test_a_physical_device_that_carries_nothing_is_not_watched():
    assert chosen(NIC) == {}


def test_a_node_that_is_a_namespace_has_a_veth_uplink():
    assert chosen(POD, default_route=[10]) == {"veth1a2b": "uplink"}


def test_the_loopback_is_never_watched():
    everything = interfaces.Patterns(include=("*",))
    like_ethernet = dataclasses.replace(LOOPBACK, is_ethernet=True)
    for link in (LOOPBACK, like_ethernet):
        assert chosen(link, patterns=everything, addresses={1: ("127.0.0.1",)}) == {}


def test_bridges_and_tunnels_are_not_watched():
    facts = {"addresses": {20: ("10.244.1.1",), 21: ("10.244.1.0",)}, "default_route": [20, 21]}
    assert chosen(BRIDGE, VXLAN, **facts) == {}


def test_a_device_without_ethernet_headers_is_not_watched():
    tunnel = interfaces.Link(30, "wg0", "wireguard", False, False, False, None)
    facts = {"addresses": {30: ("10.9.0.1",)}, "default_route": [30]}
    assert chosen(tunnel, patterns=interfaces.Patterns(include=("wg*",)), **facts) == {}
    assert chosen(dataclasses.replace(tunnel, is_ethernet=True), **facts) == {"wg0": "uplink"}


def test_exclude_wins_over_everything():
    patterns = interfaces.Patterns(include=("veth*",), exclude=("veth1*",))
    assert chosen(POD, patterns=patterns) == {}


def test_include_adds_what_detection_leaves_out():
    patterns = interfaces.Patterns(include=("veth-*",))
    assert chosen(LOCAL_PAIR, patterns=patterns) == {"veth-in": "uplink"}


# nodes as they are: the uplinks, then the pods

WHOLE = {
    # the VLAN of br0 and the VLAN with an address are both on the bond, which stands for its ports
    "bond, VLAN, bridge": (shapes.BOND_VLAN_BRIDGE, ["bond0"], ["veth5e01cb4e"]),
    "VLAN without a default route": (shapes.VLAN_WITHOUT_ROUTE, ["bond0"], ["cali3f2a"]),
    # br-ex passes packets on to its port; pods on OVS stay pods
    "OVS": (shapes.OVS, ["enp1s0"], ["3d5a1b8c6e2f4a7", "7c0f9b1d2e3a5b8"]),
    # packets arrive at the VF, and all of them pass the synthetic device after that
    "Azure, accelerated": (shapes.AZURE, ["eth0"], ["azv3f1c2b7d", "azv9a0b1c2d"]),
    "AKS, bridge mode": (shapes.AKS_BRIDGE, ["eth0"], ["azv1d2c3b4a"]),
    "AKS, overlay": (shapes.AKS, ["eth0"], ["azv0c5", "lxc_health"]),
    "a VF alone": (shapes.SRIOV, ["ens1f0v2"], ["cali01"]),
    # the device below carries what pods' macvlan devices send, too
    "macvlan and ipvlan": (shapes.MACVLAN, ["eth0", "eth1"], ["veth1"]),
    # eth2 is a trunk of VLANs with policy routes; eth3 carries nothing
    "EKS": (
        shapes.EKS,
        ["eth0", "eth1", "eth2"],
        ["eni306cbc4b983", "enifd8fb8f99f1", "vlan7b1c2d3e4f5"],
    ),
    "Cilium with netkit": (shapes.NETKIT, ["eth0"], ["lxc1b14086930ee", "lxc_health"]),
    "kind": (shapes.KIND, ["eth0"], ["veth2a1b3c4d"]),
    "k3s without a network": (shapes.K3S_AIR_GAP, ["eth0"], ["veth77aa"]),
    # an address that somebody gave to a port is no reason to watch the port
    "team": (shapes.TEAM, ["team0"], []),
    "VRF": (shapes.VRF, ["eth0", "eth1"], []),
    "cabled bridges": (shapes.CABLED, ["eth0"], ["veth9"]),
    # what is below is encrypted
    "MACsec": (shapes.MACSEC, ["macsec0"], []),
}
ADDRESS = {"EKS": "192.168.10.21", "AKS, bridge mode": "10.240.0.4", "OVS": "192.0.2.21"}
ADDRESS["VLAN without a default route"] = "10.100.0.11"


def known(name: str) -> set[str]:
    """The addresses that the cluster knows such a node by."""
    return {ADDRESS[name]} if name in ADDRESS else set()


@pytest.mark.parametrize("name", WHOLE)
def test_of_each_stack_of_a_node_one_device_is_chosen(name):
    shape, uplinks, pods = WHOLE[name]
    picked = names(choice.choose(shapes.read(shape), NOTHING))
    assert picked == dict.fromkeys(uplinks, "uplink") | dict.fromkeys(pods, "pod")


@pytest.mark.parametrize("name", WHOLE)
def test_no_traffic_of_such_a_node_goes_unseen(name):
    found = shapes.read(WHOLE[name][0])
    picked = choice.choose(found, NOTHING)
    assert choice.unseen(found, NOTHING, picked, known(name)) == ()


@pytest.mark.parametrize("name", WHOLE)
def test_without_its_uplinks_a_node_has_traffic_unseen(name):
    """So the test before this one can fail. What was excluded is not complained about."""
    found = shapes.read(WHOLE[name][0])
    pods = [each for each in choice.choose(found, NOTHING) if each.kind == "pod"]
    left = [pod for pod in pods if name not in ("kind", "cabled bridges")]
    seen_otherwise = name == "k3s without a network"
    assert bool(choice.unseen(found, NOTHING, left, known(name))) != seen_otherwise
    everything = interfaces.Patterns(exclude=("*",))
    assert choice.unseen(found, everything, [], known(name)) == ()


UNSEEN = {
    "wireguard": (
        shapes.WIREGUARD,
        "10.6.0.2",
        "the node's address 10.6.0.2 is on wg0, which is not watched: wg0 (kind wireguard) has no "
        "Ethernet headers; what takes it cannot be reported, accept that with "
        "--exclude-interfaces wg0",
    ),
    "a VPN": (shapes.FULL_TUNNEL, None, "the default route is on tun0, which is not watched: tun0"),
    "InfiniBand": (
        shapes.INFINIBAND,
        None,
        "the default route is on ib0, which is not watched: ib0 has",
    ),
    "a virtual machine": (
        shapes.TAP_BRIDGE,
        None,
        "the default route is on br0, which is not watched: none of its ports leads to a physical "
        "device; name its way out with --include-interfaces, or accept that with "
        "--exclude-interfaces br0",
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_interface_sees_is_named_with_what_to_do(name):
    shape, address, words = UNSEEN[name]
    found = shapes.read(shape)
    (unseen,) = choice.unseen(found, NOTHING, choice.choose(found, NOTHING), {address} - {None})
    assert str(unseen).startswith(words)


def test_any_address_that_the_cluster_knows_the_node_by_must_be_seen():
    """On a node without IPv4 the node id is no address."""
    devices = [shapes.nic(2, "eth0", "198.51.100.4/24")]
    devices += [shapes.nic(3, "wg0", "fd00:6::2/64", kind="wireguard", type=65534)]
    found = shapes.read(Shape(devices, [shapes.default(2)]))
    picked = choice.choose(found, NOTHING)
    assert choice.unseen(found, NOTHING, picked, {"77.1.2.3"}) == ()
    (unseen,) = choice.unseen(found, NOTHING, picked, {"77.1.2.3", "fd00:6::2"})
    assert str(unseen).startswith("the node's address fd00:6::2 is on wg0")


def test_what_is_said_of_an_interface_fits_a_status():
    """A watchlist's message has room for 256 characters; names of interfaces have at most 15."""
    name, address = "x" * 15, "255.255.255.255"
    devices = [shapes.nic(2, name, f"{address}/32", kind=kind) for kind in ("bridge", "netkit")]
    devices += [shapes.nic(2, name, f"{address}/32", kind="wireguard", type=65534)]
    for device in devices:
        found = shapes.read(Shape([device], []))
        (unseen,) = choice.unseen(found, NOTHING, [], {address})
        assert len(str(unseen)) <= 256


def test_only_the_preferred_default_route_counts():
    """A way that is taken when the first one fails is no reason for a complaint."""
    routes = [shapes.default(2, metric=50), shapes.default(3, metric=100)]
    found = shapes.read(dataclasses.replace(shapes.FULL_TUNNEL, routes=routes))
    assert choice.unseen(found, NOTHING, choice.choose(found, NOTHING), ()) == ()


def test_an_included_port_sees_what_a_bridge_carries():
    patterns = interfaces.Patterns(include=("tap0",))
    other = shapes.Device(9, "tap9", "tun", master=2, member="bridge")
    shape = shapes.TAP_BRIDGE
    found = shapes.read(dataclasses.replace(shape, devices=[*shape.devices, other]))
    picked = choice.choose(found, patterns)
    assert names(picked) == {"tap0": "uplink", "veth4": "pod"}
    assert choice.unseen(found, patterns, picked, ()) == ()


def test_a_bridge_without_an_address_leads_its_pods_out():
    """A second network of pods, as Multus makes one."""
    devices = [
        shapes.LO,
        shapes.nic(2, "eth0", "192.0.2.5/24"),
        shapes.nic(3, "eth1", master=4),
        shapes.Device(4, "br1", "bridge"),
        shapes.pod(5, "veth5", master=4),
    ]
    found = shapes.read(Shape(devices, [shapes.default(2)]))
    assert names(choice.choose(found, NOTHING)) == {
        "eth0": "uplink",
        "eth1": "uplink",
        "veth5": "pod",
    }


def test_several_ways_of_a_default_route_are_uplinks():
    devices = [shapes.LO, shapes.nic(2, "eth0"), shapes.nic(3, "eth1")]
    found = shapes.read(Shape(devices, [shapes.default(2, 3)]))
    assert names(choice.choose(found, NOTHING)) == {"eth0": "uplink", "eth1": "uplink"}


def test_default_routes_are_told_apart_by_table_and_preference():
    routes = [
        shapes.default(2, metric=10),
        shapes.default(3, metric=20),
        shapes.default(4, table=10),
        shapes.default(5, table=1000),
        shapes.Route("::/0", [3], metric=1024),
    ]
    found = shapes.read(Shape([], routes))
    assert found.default_route == {2, 3}
    assert found.preferred_route == {2, 3}
    assert found.policy_route == {4, 5}
    assert shapes.read(Shape([], routes[:4])).preferred_route == {2}


def test_an_unreachable_default_route_is_none():
    """IPv6 has one on the loopback where there is no router."""
    routes = [shapes.Route("::/0", [1], kind=7, metric=4294967295)]
    devices = [shapes.LO, shapes.nic(2, "eth0", "192.0.2.1/24")]
    found = shapes.read(Shape(devices, routes))
    assert found.default_route == frozenset()


@pytest.mark.parametrize(
    "kind",
    ["veth", "netkit", "tun", "dummy", "ifb", "bridge", "openvswitch", "vrf", "vxlan", "geneve"],
)
def test_an_address_alone_makes_no_uplink_of_what_ends_here(kind):
    device = shapes.nic(2, "dev0", "192.0.2.1/24", kind=kind)
    assert choice.choose(shapes.read(Shape([device], [])), NOTHING) == []


@pytest.mark.parametrize("kind", ["vxlan", "geneve"])
@pytest.mark.parametrize("routes", [[], [shapes.default(3)]], ids=["address", "route"])
def test_a_tunnel_is_no_uplink_whatever_it_is_bound_to(kind, routes):
    devices = [shapes.nic(2, "eth0", "192.0.2.1/24")]
    devices += [shapes.Device(3, "tun3", kind, over=2, addresses=["10.1.0.1/24"])]
    found = shapes.read(Shape(devices, routes))
    picked = choice.choose(found, NOTHING)
    assert names(picked) == {"eth0": "uplink"}
    assert choice.unseen(found, NOTHING, picked, {"10.1.0.1"}) == ()


@pytest.mark.parametrize("kind", ["l2tp_eth", "macvlan", ""])
def test_an_address_makes_an_uplink_of_what_may_be_a_driver(kind):
    """Or of what stands on a device of another namespace: a node that is a container."""
    device = shapes.nic(2, "eth0", "192.0.2.1/24", kind=kind)
    assert names(choice.choose(shapes.read(Shape([device], [])), NOTHING)) == {"eth0": "uplink"}


def test_a_physical_device_that_names_itself_as_lower_is_an_uplink():
    device = shapes.nic(2, "eth0", "192.0.2.1/24", over=2)
    assert names(choice.choose(shapes.read(Shape([device], [])), NOTHING)) == {"eth0": "uplink"}


@pytest.mark.parametrize("below", ["tun", "bridge"])
def test_a_port_above_a_device_that_ends_here_is_no_way_out(below):
    devices = [
        shapes.Device(2, "br0", "bridge", addresses=["192.0.2.5/24"]),
        shapes.Device(3, "dev3.100", "vlan", over=4, master=2),
        shapes.Device(4, "dev3", below),
    ]
    found = shapes.read(Shape(devices, [shapes.default(2)]))
    assert choice.choose(found, NOTHING) == []
    (unseen,) = choice.unseen(found, NOTHING, [], ())
    assert unseen.name == "br0"


def test_an_address_of_the_node_on_its_loopback_is_seen_elsewhere():
    """BGP to the host: the address is on lo, packets take any NIC."""
    lo = dataclasses.replace(shapes.LO, addresses=["192.0.2.1/32"])
    found = shapes.read(Shape([lo, shapes.nic(2, "eth0")], [shapes.default(2)]))
    picked = choice.choose(found, NOTHING)
    assert names(picked) == {"eth0": "uplink"}
    assert choice.unseen(found, NOTHING, picked, {"192.0.2.1"}) == ()


@pytest.mark.parametrize(
    ("shape", "exclude"),
    [(shapes.TAP_BRIDGE, "br0"), (shapes.OVS, "enp1s0")],
    ids=["carrier", "uplink"],
)
def test_an_exclusion_is_no_reason_for_a_complaint(shape, exclude):
    patterns = interfaces.Patterns(exclude=(exclude,))
    found = shapes.read(shape)
    picked = choice.choose(found, patterns)
    assert "uplink" not in names(picked).values()
    assert choice.unseen(found, patterns, picked, ()) == ()
    assert len(choice.unseen(found, NOTHING, picked, ())) == 1


def test_a_bridge_whose_ports_are_all_watched_is_seen():
    """A node that is a container, with its own bridge: which veth leads out is not known."""
    devices = [
        shapes.Device(2, "br0", "bridge", addresses=["172.18.0.2/16"]),
        shapes.pod(3, "eth0", master=2),
        shapes.pod(4, "veth4", master=2),
    ]
    found = shapes.read(Shape(devices, [shapes.default(2)]))
    picked = choice.choose(found, NOTHING)
    assert names(picked) == {"eth0": "pod", "veth4": "pod"}
    assert choice.unseen(found, NOTHING, picked, ()) == ()
    assert len(choice.unseen(found, NOTHING, picked[:1], ())) == 1


def test_a_loop_of_devices_ends():
    """Devices may change between two messages of a dump."""
    one = interfaces.Link(2, "a", "vlan", True, False, False, None, lower=3)
    other = interfaces.Link(3, "b", "vlan", True, False, False, 2, lower=2)
    bridge = interfaces.Link(4, "c", "bridge", True, False, False, 4, lower=4)
    facts = {"addresses": {2: ("192.0.2.1",), 4: ("192.0.2.2",)}, "default_route": [3]}
    assert chosen(one, other, bridge, **facts) == {}


@pytest.mark.lab
def test_stacks_of_this_kernel_are_read_as_they_are():
    """The node's address on a macvlan, pods on a bridge and behind routes, a VXLAN."""
    with cable() as (near, far):
        node, other = f"-n {near.name}", far.name
        ip(
            f"{node} addr flush dev eth0",
            f"{node} link add host0 link eth0 type macvlan mode bridge",
            f"{node} addr add 10.98.0.1/24 dev host0",
            f"{node} link set host0 up",
            f"{node} route add default via 10.98.0.2 dev host0",
            f"{node} link add vx0 type vxlan id 7 dstport 8472 dev eth0",
            f"{node} addr add 10.244.1.0/32 dev vx0",
            f"{node} link add cni0 type bridge",
            f"{node} addr add 10.244.1.1/24 dev cni0",
            *(
                f"{node} link add {pod} type veth peer name {pod} netns {other}"
                for pod in ("pod0", "pod1")
            ),
            f"{node} link set pod0 master cni0",
            f"{node} addr add 10.244.1.1/32 dev pod1",
            f"{node} link add in0 type veth peer name in1",
            f"{node} addr add 10.244.1.9/32 dev in0",
        )
        found = near.inside(interfaces.read_network)
    picked = choice.choose(found, NOTHING)
    assert names(picked) == {"eth0": "uplink", "pod0": "pod", "pod1": "pod"}
    assert choice.unseen(found, NOTHING, picked, {"10.98.0.1"}) == ()
    pods = [each for each in picked if each.kind == "pod"]
    (missed,) = choice.unseen(found, NOTHING, pods, {"10.98.0.1"})
    assert missed.name == "host0"
