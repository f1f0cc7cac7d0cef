# SPDX-License-Identifier: Apache-2.0
"""Builds the ways that packets take through a node: who talks to whom, what is on the way, and where the hooks are."""

import dataclasses
import functools
import ipaddress
import json
import operator
import socket
import struct
from collections.abc import Callable, Sequence

from hostint_agent import bpf_calls, kernel
from tests.lab.namespace import Namespace, ip
from tests.lab.topology import Lab, Node, Pod

# addresses that all lead to the client, for flows that are told apart by address
CLIENTS = {4: "10.201.1.0/25", 6: "fd20:1::1000/121"}
SERVICE = {4: "10.96.0.10", 6: "fd96::10"}
# as wide as a packet of three segments is long: 100,000 of them are little data
_GSO_BYTES = 4800


@dataclasses.dataclass(frozen=True)
class Hook:
    """A program (ingress or egress) on a TCX hook of an interface."""

    namespace: Namespace
    interface: str
    program: str
    kind: int

    @property
    def ifindex(self) -> int:
        """Index of the interface in its namespace."""
        return self.namespace.inside(lambda: socket.if_nametoindex(self.interface))


def both(namespace: Namespace, *interfaces: str) -> list[Hook]:
    """Both programs on their hooks."""
    kinds = {"ingress": bpf_calls.TCX_INGRESS, "egress": bpf_calls.TCX_EGRESS}
    return [
        Hook(namespace, i, program, kind) for i in interfaces for program, kind in kinds.items()
    ]


@dataclasses.dataclass(frozen=True)
class CniProgram:
    """A program of cni.c on an interface of a node, after ours; `ways` as (key, value) of its map."""

    namespace: Namespace
    interface: str
    program: str
    ways: Sequence[tuple[bytes, bytes]] = ()


@dataclasses.dataclass
class Scene:
    """A client, a server and the node between them."""

    lab: Lab
    node: Node
    client: Pod
    server: Namespace
    listens: dict[int, str]
    connects: dict[int, str]
    hooks: list[Hook]
    cni: list[CniProgram] = dataclasses.field(default_factory=list)
    accepting: bool = False  # a CNI's clsact filter on every hooked interface says TC_ACT_OK

    def ends(self) -> dict[int, int]:
        """For truth.Judge: the host's sockets, and those of pods whose interfaces have hooks."""
        hooked = {hook.interface for hook in self.hooks}
        ends = {self.node.namespace.inside(kernel.netns_cookie): 0}
        for pod in self.node.pods:
            if pod.interface in hooked:
                cookie = pod.namespace.inside(kernel.netns_cookie)
                ends[cookie] = self.node.port(pod.interface)
        return {cookie & 0xFFFFFFFF: port for cookie, port in ends.items()}

    @property
    def stranger(self) -> Pod:
        """A pod of the node whose interface has no hooks."""
        return self.node.pods[-1]


Build = Callable[[Lab], Scene]


def _addresses(pod: Pod) -> dict[int, str]:
    return {4: pod.address, 6: pod.address6}


def _finish(scene: Scene) -> Scene:
    """Small super-packets, and every address of CLIENTS is the client's."""
    client, node = scene.client, scene.node
    for namespace in {scene.server, client.namespace} - {node.namespace}:
        namespace.run("ip", "link", "set", "eth0", "gso_max_size", str(_GSO_BYTES))
    inside, device = (
        client.namespace.name,
        "cni0" if scene.lab.mode == "bridged" else client.interface,
    )
    ip(
        f"-n {inside} route add local {CLIENTS[4]} dev lo",
        f"-n {inside} route add local {CLIENTS[6]} dev lo",
        f"-n {node.namespace.name} route add {CLIENTS[4]} via {client.address} dev {device} onlink",
        f"-n {node.namespace.name} route add {CLIENTS[6]} via {client.address6} dev {device} onlink",
    )
    return scene


def pods(lab: Lab) -> Scene:
    """Two pods of one node, by whatever connects them: a route each, or a bridge."""
    node = lab.nodes[0]
    client, server = node.pods[:2]
    hooks = both(node.namespace, client.interface, server.interface)
    addresses = _addresses(server)
    return _finish(Scene(lab, node, client, server.namespace, addresses, dict(addresses), hooks))


def outside(lab: Lab) -> Scene:
    """A pod and a machine beside the node: through the pod's interface (and the bridge) to eth0."""
    node = lab.nodes[0]
    client = node.pods[0]
    addresses = {4: lab.collector_address, 6: lab.collector_address6}
    hooks = both(node.namespace, client.interface, "eth0")
    scene = Scene(lab, node, client, lab.collector, addresses, dict(addresses), hooks)
    lab.collector.run("ip", "route", "add", CLIENTS[4], "via", node.address)
    lab.collector.run("ip", "-6", "route", "add", CLIENTS[6], "via", node.address6)
    return _finish(scene)


def host(lab: Lab) -> Scene:
    """A pod and its node: what is sent is delivered to the host, what comes back the host sends."""
    node = lab.nodes[0]
    client = node.pods[0]
    addresses = {4: node.address, 6: node.address6}
    hooks = both(node.namespace, client.interface)
    node.namespace.run("ip", "link", "set", client.interface, "gso_max_size", str(_GSO_BYTES))
    return _finish(Scene(lab, node, client, node.namespace, addresses, dict(addresses), hooks))


def rps(lab: Lab) -> Scene:
    """Packets are handed to the CPU that their flow's hash says."""
    scene = pods(lab)
    cpus = f"{(1 << bpf_calls.possible_cpus()) - 1:x}"
    for interface in (scene.node.pods[0].interface, scene.node.pods[1].interface):
        file = f"/sys/class/net/{interface}/queues/rx-0/rps_cpus"
        # the interfaces in /sys are those of the namespace that mounted it
        write = f"mount -t sysfs none /sys && echo {cpus} > {file} && cat {file}"
        shown = scene.node.namespace.run("unshare", "--mount", "sh", "-c", write)
        if int(shown, 16) != int(cpus, 16):
            raise RuntimeError(f"{file}: {shown.strip()} was read, {cpus} was written")
    return scene


def iptables(lab: Lab) -> Scene:
    """A service: the client talks to its address, DNAT and MASQUERADE change both sides."""
    scene = pods(lab)
    for version, command in ((4, "iptables"), (6, "ip6tables")):
        scene.connects[version] = SERVICE[version]
        run = scene.node.namespace.run
        to = scene.listens[version]
        run(
            command,
            "-t",
            "nat",
            "-A",
            "PREROUTING",
            "-d",
            SERVICE[version],
            "-j",
            "DNAT",
            "--to",
            to,
        )
        run(command, "-t", "nat", "-A", "POSTROUTING", "-d", to, "-j", "MASQUERADE")
        if version == 6:
            # the interface to the server has link-local addresses only
            run("ip", "-6", "addr", "add", "fd44:1::1/128", "dev", "pod1", "nodad")
    return scene


def nftables(lab: Lab) -> Scene:
    """A service by nftables: DNAT and SNAT."""
    scene = pods(lab)
    node = scene.node
    own = {4: "10.244.1.1", 6: node.address6}
    lines = []
    for version, family in ((4, "ip"), (6, "ip6")):
        scene.connects[version] = SERVICE[version]
        to = scene.listens[version]
        lines += [
            f"table {family} paths {{",
            "chain pre { type nat hook prerouting priority dstnat;",
            f"{family} daddr {SERVICE[version]} dnat to {to}; }}",
            "chain post { type nat hook postrouting priority srcnat;",
            f"{family} daddr {to} snat to {own[version]}; }}",
            "}",
        ]
    node.namespace.run("nft", "\n".join(lines))
    return scene


def defragmented(lab: Lab) -> Scene:
    """Connection tracking puts fragments together, and the node takes them apart again."""
    scene = pods(lab)
    for command in ("iptables", "ip6tables"):
        scene.node.namespace.run(
            command, "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"
        )
    return scene


def accepted(build: Build) -> Build:
    """With a CNI's clsact filters that accept: TC_ACT_OK overwrites the tag."""

    def built(lab: Lab) -> Scene:
        return dataclasses.replace(build(lab), accepting=True)

    return built


def mac(pod: Pod) -> bytes:
    """Address of the pod's eth0."""
    shown = json.loads(pod.namespace.run("ip", "-j", "link", "show", "dev", "eth0"))[0]["address"]
    return bytes.fromhex(shown.replace(":", ""))


def _ways(
    here: int, pod: Pod, to: int, tunnel: tuple[str, str] = ("0.0.0.0", "0.0.0.0")
) -> list[tuple[bytes, bytes]]:
    """struct going and struct way of cni.c: what comes in on interface `here` for the pod goes to interface `to`."""
    ends = b"".join(ipaddress.ip_address(end).packed for end in tunnel)
    value = struct.pack("=I", to) + ends + mac(pod) + bytes(2)
    keys = []
    for version in (4, 6):
        packed = ipaddress.ip_address(pod.ip(version)).packed
        words = struct.unpack(f"={len(packed) // 4}I", packed)
        keys.append(struct.pack("=II", here, functools.reduce(operator.xor, words)))
    return [(key, value) for key in keys]


def redirected(program: str) -> Build:
    """Two pods that a CNI's program connects, past routing and bridging."""

    def built(lab: Lab) -> Scene:
        scene = pods(lab)
        node = scene.node
        for source, target in (node.pods[:2], node.pods[1::-1]):
            ways = _ways(node.port(source.interface), target, node.port(target.interface))
            scene.cni.append(CniProgram(node.namespace, source.interface, program, ways))
        return scene

    return built


def redirected_to_peer(lab: Lab) -> Scene:
    """bpf_redirect_peer jumps over the egress hook of a pod's interface: the packet is next seen at the pod's socket."""
    return redirected("cni_redirect_peer")(lab)


def _across(lab: Lab) -> Scene:
    """Pods of two nodes; the first node is looked at."""
    first, second = lab.nodes
    client, server = first.pods[0], second.pods[0]
    hooks = both(first.namespace, client.interface, "eth0")
    addresses = _addresses(server)
    for node in lab.nodes:
        for pod in node.pods:
            pod.namespace.run("ip", "link", "set", "eth0", "mtu", "1400")
    return _finish(Scene(lab, first, client, server.namespace, addresses, dict(addresses), hooks))


def vxlan(lab: Lab) -> Scene:
    """Pods of two nodes, with a VXLAN device in each: forth the node encapsulates, back it decapsulates."""
    scene = _across(lab)
    for node, other in (lab.nodes, lab.nodes[::-1]):
        name = node.namespace.name
        ip(
            f"-n {name} link add vx0 type vxlan id 7 dstport 4444 local {node.address} remote {other.address} dev eth0",
            f"-n {name} link set vx0 up",
            f"-n {name} addr add 10.245.0.{node.number}/24 dev vx0",
            f"-n {name} addr add fd45::{node.number}/64 dev vx0 nodad",
            f"-n {name} route replace 10.244.{other.number}.0/24 via 10.245.0.{other.number} dev vx0",
            f"-n {name} route replace fd44:{other.number}::/64 via fd45::{other.number} dev vx0",
        )
    return scene


def geneve(lab: Lab) -> Scene:
    """Pods of two nodes whose CNI puts packets into Geneve, and takes them out, in its TC programs."""
    scene = _across(lab)
    for node, other in (lab.nodes, lab.nodes[::-1]):
        ours, theirs, where = node.pods[0], other.pods[0], node.namespace
        pod, eth0 = node.port(ours.interface), node.port("eth0")
        out = _ways(pod, theirs, eth0, (node.address, other.address))
        scene.cni += [
            CniProgram(where, ours.interface, "cni_encapsulate", out),
            CniProgram(where, "eth0", "cni_decapsulate", _ways(eth0, ours, pod)),
        ]
    return scene


def shaped(lab: Lab) -> Scene:
    """A bridge with a shaper that takes super-packets apart: what it sends on are other packets."""
    scene = outside(lab)
    scene.node.namespace.run(
        *"tc qdisc add dev cni0 root tbf rate 20gbit burst 4000 limit 4000000 mtu 4000".split()
    )
    return scene
