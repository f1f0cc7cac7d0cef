# SPDX-License-Identifier: Apache-2.0
"""The wiring: nodes on an underlay, pods on nodes, a collector beside them. Everything dual stack.

collector 10.99.0.2 ─┐
node 1   10.99.0.11 ─┼─ underlay (a bridge in its own namespace)
node 2   10.99.0.12 ─┘
pods of node i: 10.244.i.10.., fd44:i::a..; routed (a veth and a host route each) or bridged (cni0)
"""

import contextlib
import itertools
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from tests.lab.namespace import Namespace, ip

Mode = Literal["routed", "bridged"]
_INSTANCES = itertools.count()
_PREFIX = "hl"
_SYSCTLS = (
    "net.ipv4.ip_forward=1",
    "net.ipv6.conf.all.forwarding=1",
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
    "net.ipv6.conf.all.accept_dad=0",
    "net.ipv6.conf.default.accept_dad=0",
    "net.ipv6.conf.default.router_solicitations=0",
)


@dataclass
class Pod:
    """A pod: a namespace with one interface, eth0. `interface` is the other end, on its node."""

    namespace: Namespace
    address: str
    address6: str
    interface: str

    def ip(self, version: int) -> str:
        """Its address of one family."""
        return self.address if version == 4 else self.address6


@dataclass
class Node:
    """A node: forwards between its pods and eth0."""

    namespace: Namespace
    number: int
    address: str
    address6: str
    pods: list[Pod] = field(default_factory=list)

    @property
    def node_id(self) -> int:
        """The node id that its reports carry."""
        return int.from_bytes(bytes(int(part) for part in self.address.split(".")), "big")

    def port(self, interface: str) -> int:
        """Index of one of its interfaces, which is the port id of reports."""
        shown = self.namespace.run("ip", "-o", "link", "show", "dev", interface)
        return int(shown.split(":")[0])


class Lab:
    """Nodes, pods and a collector; gone when left, and what a killed process left is removed by the next."""

    def __init__(self, *, nodes: int = 2, pods: int = 2, mode: Mode = "routed") -> None:
        self.mode = mode
        self._prefix = f"{_PREFIX}{os.getpid()}-{next(_INSTANCES)}"
        self._counts = (nodes, pods)
        self.nodes: list[Node] = []
        self.collector = self._namespace("c")
        self._underlay = self._namespace("u")
        self._cleanup = contextlib.ExitStack()

    def _namespace(self, suffix: str) -> Namespace:
        return Namespace(f"{self._prefix}{suffix}")

    collector_address = "10.99.0.2"
    collector_address6 = "fd99::2"

    @property
    def underlay(self) -> Namespace:
        """Where the wires of all nodes end, each with the name of its node."""
        return self._underlay

    def __enter__(self) -> Self:
        remove_leftovers()
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_exit(self, function: object, *arguments: object) -> None:
        """Have something called before the namespaces go."""
        self._cleanup.callback(function, *arguments)  # type: ignore[arg-type]

    def close(self) -> None:
        """Stop what was started in here, then remove the namespaces."""
        self._cleanup.close()
        remove_namespaces(f"{self._prefix}")

    def _add(self, namespace: Namespace) -> None:
        ip(f"netns add {namespace.name}")
        namespace.run("sysctl", "-qw", *_SYSCTLS)
        ip(f"-n {namespace.name} link set lo up")

    def _build(self) -> None:
        nodes, pods = self._counts
        self._add(self._underlay)
        ip(
            f"-n {self._underlay.name} link add br0 type bridge",
            f"-n {self._underlay.name} link set br0 up",
        )
        self._add(self.collector)
        self._plug(self.collector, "collector", self.collector_address, self.collector_address6)
        for number in range(1, nodes + 1):
            self.nodes.append(self._add_node(number, pods))
        for node in self.nodes:
            self._add_routes(node)

    def _plug(self, namespace: Namespace, port: str, address: str, address6: str) -> None:
        """Connect a namespace to the underlay by its eth0."""
        under, name = self._underlay.name, namespace.name
        ip(
            f"-n {under} link add {port} type veth peer name eth0 netns {name}",
            f"-n {under} link set {port} master br0 up",
            f"-n {name} addr add {address}/24 dev eth0",
            f"-n {name} addr add {address6}/64 dev eth0 nodad",
            f"-n {name} link set eth0 up",
        )

    def _add_node(self, number: int, pods: int) -> Node:
        namespace = self._namespace(f"n{number}")
        self._add(namespace)
        node = Node(namespace, number, f"10.99.0.{10 + number}", f"fd99::{10 + number:x}")
        self._plug(namespace, f"node{number}", node.address, node.address6)
        if self.mode == "bridged":
            ip(
                f"-n {namespace.name} link add cni0 type bridge",
                f"-n {namespace.name} addr add 10.244.{number}.1/24 dev cni0",
                f"-n {namespace.name} addr add fd44:{number}::1/64 dev cni0 nodad",
                f"-n {namespace.name} link set cni0 up",
            )
        for index in range(pods):
            node.pods.append(self._add_pod(node, index))
        return node

    def _add_pod(self, node: Node, index: int) -> Pod:
        number, name = node.number, self._namespace(f"p{node.number}{index}")
        pod = Pod(
            name, f"10.244.{number}.{10 + index}", f"fd44:{number}::{10 + index:x}", f"pod{index}"
        )
        self._add(name)
        host, inside, port = node.namespace.name, name.name, pod.interface
        ip(
            f"-n {host} link add {port} type veth peer name eth0 netns {inside}",
            f"-n {host} link set {port} up",
            f"-n {inside} link set eth0 up",
        )
        if self.mode == "bridged":
            ip(
                f"-n {host} link set {port} master cni0",
                f"-n {inside} addr add {pod.address}/24 dev eth0",
                f"-n {inside} addr add {pod.address6}/64 dev eth0 nodad",
                f"-n {inside} route add default via 10.244.{number}.1",
                f"-n {inside} route add ::/0 via fd44:{number}::1",
            )
        else:
            ip(
                f"-n {host} addr add 10.244.{number}.1/32 dev {port}",
                f"-n {host} addr add fe80::1/64 dev {port} nodad",
                f"-n {host} route add {pod.address}/32 dev {port}",
                f"-n {host} route add {pod.address6}/128 dev {port}",
                f"-n {inside} addr add {pod.address}/32 dev eth0",
                f"-n {inside} addr add {pod.address6}/128 dev eth0 nodad",
                f"-n {inside} route add default via 10.244.{number}.1 dev eth0 onlink",
                f"-n {inside} route add ::/0 via fe80::1 dev eth0 onlink",
            )
        return pod

    def _add_routes(self, node: Node) -> None:
        name = node.namespace.name
        for other in self.nodes:
            if other is not node:
                ip(
                    f"-n {name} route add 10.244.{other.number}.0/24 via {other.address}",
                    f"-n {name} route add fd44:{other.number}::/64 via {other.address6}",
                )
        collector = self.collector.name
        ip(
            f"-n {collector} route add 10.244.{node.number}.0/24 via {node.address}",
            f"-n {collector} route add fd44:{node.number}::/64 via {node.address6}",
        )


def remove_namespaces(prefix: str) -> None:
    """Delete every namespace whose name begins like this."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    names = [line.split()[0] for line in listed.stdout.splitlines() if line.startswith(prefix)]
    if names:
        ip(*(f"netns del {name}" for name in names))


def remove_leftovers() -> None:
    """Remove labs of processes that are gone."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    for line in listed.stdout.splitlines():
        name = line.split()[0]
        if not name.startswith(_PREFIX) or "-" not in name:
            continue
        pid = name[len(_PREFIX) :].split("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            ip(f"netns del {name}")
