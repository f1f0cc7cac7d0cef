# SPDX-License-Identifier: Apache-2.0
"""A node on which packets die in ways that a test arranges, and all that the datapath says of it.

Watched is what goes to one port (and one protocol without ports), so that every figure is about the packets of the test.
"""

import contextlib
import ctypes
import fcntl
import itertools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hostint_agent import bpf_calls, bpf_types, classifier, kernel
from hostint_report import inner, v05
from tests.lab import datapath as datapaths
from tests.lab import raw_packets, traffic
from tests.lab.namespace import Namespace, ip
from tests.lab.topology import Lab, Mode, Node, Pod

PORT = 4007
NO_SUCH_PROTOCOL = 253
WAIT_S = 15.0
_HOUR_NS = 3600 * 10**9
_PROG_LOAD, _LINK_CREATE = 5, 28
_SCHED_CLS, _TC_ACT_SHOT = 3, 2
# linux/if_tun.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
T = TypeVar("T")
Arrangement = contextlib.AbstractContextManager[object]


@dataclass(frozen=True)
class Outcome:
    """What changed: drops by reason and by function, counters of the watchlist, and drop reports."""

    reasons: Mapping[str, int]  # by the kernel's name
    functions: Mapping[tuple[str, str], int]  # by the kernel's name and function
    counters: Mapping[str, int]
    reports: Sequence[v05.DropReport]

    @property
    def dead(self) -> int:
        """Watched packets that died."""
        return self.counters["dropped"] + self.counters["dropped_late"]


@dataclass
class Stage:
    """One node, its pods and its datapath, another node with pods behind it."""

    lab: Lab
    datapath: datapaths.Datapath
    _ports: Iterator[int] = field(default_factory=lambda: itertools.count(10_000))

    @property
    def node(self) -> Node:
        return self.lab.nodes[0]

    @property
    def host(self) -> Namespace:
        return self.node.namespace

    @property
    def client(self) -> Pod:
        return self.node.pods[0]

    @property
    def server(self) -> Pod:
        """A pod beside the client, on the same node."""
        return self.node.pods[1]

    @property
    def far(self) -> Pod:
        """A pod on the other node."""
        return self.lab.nodes[1].pods[0]

    @property
    def gateway(self) -> str:
        """The node's interface that the client's packets are routed from."""
        return "cni0" if self.lab.mode == "bridged" else self.client.interface

    def address(self, version: int) -> str:
        """The node's own address."""
        return self.node.address if version == 4 else self.node.address6

    def fresh_port(self) -> int:
        """A source port that no flow had."""
        return next(self._ports)

    def send(self, source: Namespace, address: str, count: int = 1) -> None:
        """Datagrams of a flow that there was none of yet: a known one would not be reported again."""
        traffic.send_udp(source, address, PORT, count=count, source_port=self.fresh_port())

    def watch(self, snap_length: int = bpf_types.SNAP_BYTES) -> None:
        """Watch what goes to PORT; one drop report an hour for a flow and reason."""
        report = bpf_types.RuleAction.REPORT
        port = ((PORT, PORT),)
        rules = [
            classifier.Rule(1, 1, report, protocol=17, destination_ports=port),
            classifier.Rule(2, 1, report, protocol=6, destination_ports=port),
            classifier.Rule(3, 1, report, protocol=NO_SUCH_PROTOCOL),
        ]
        collector = bpf_types.Collector(snap_length=snap_length)
        self.datapath.watch(rules, {1: datapaths.policy(interval_ns=_HOUR_NS)}, {0: collector})

    def _drops_by_function(self) -> dict[tuple[str, str], int]:
        by_reason = self.datapath.counters.drop_functions(kernel.drop_reason_names())
        return {(r, name): count for r, some in by_reason.items() for name, count in some.items()}

    def _figures(self) -> tuple[dict[str, int], dict[str, int]]:
        reasons = self.datapath.counters.drops(kernel.drop_reason_names())
        return reasons, dict(self.datapath.counters.watchlist(1))

    def outcome(
        self, do: Callable[[], object], dead: int | Callable[[], int], timeout_s: float = WAIT_S
    ) -> Outcome:
        """Do something that lets so many watched packets die, and wait until they have (or the time is over)."""
        self.datapath.drain()
        reasons, counters = self._figures()
        functions = self._drops_by_function()
        do()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            now = self._figures()[1]
            died = (
                now["dropped"]
                + now["dropped_late"]
                - counters["dropped"]
                - counters["dropped_late"]
            )
            wanted = dead() if callable(dead) else dead
            if wanted and died == wanted:
                break
            time.sleep(0.01)
        time.sleep(0.005)  # the program that counted the last of them has ended by then
        now_reasons, now = self._figures()
        return Outcome(
            reasons=_growth(reasons, now_reasons),
            functions=_growth(functions, self._drops_by_function()),
            counters={name: now[name] - counters[name] for name in counters},
            reports=self.drop_reports(),
        )

    def drop_reports(self) -> list[v05.DropReport]:
        """The drop reports that wait."""
        reports = [v05.decode(data) for data in self.datapath.drain()]
        return [report for report in reports if isinstance(report, v05.DropReport)]

    def send_frames(self, contents: Sequence[bytes], to_mac: str = "") -> None:
        """Put IP packets on the client's wire, to the gateway unless told otherwise."""
        to_mac = to_mac or raw_packets.mac(self.host, self.gateway)
        own = raw_packets.mac(self.client.namespace, "eth0")
        frames = [raw_packets.frame(own, to_mac, content) for content in contents]
        raw_packets.put_on_wire(self.client.namespace, "eth0", frames)

    # -- what makes packets die; each is undone when its block is left --

    @contextlib.contextmanager
    def commands(self, *pairs: tuple[str, str], where: Namespace | None = None) -> Iterator[None]:
        """Run commands on the node (or elsewhere), and the second of each pair afterwards, last first."""
        namespace = where or self.host
        with contextlib.ExitStack() as stack:
            for do, undo in pairs:
                namespace.run(*do.split())
                if undo:
                    stack.callback(namespace.run, *undo.split())
            yield

    @contextlib.contextmanager
    def sysctl(self, **values: int) -> Iterator[None]:
        """Set sysctls of the node; `__` in a name stands for a dot."""
        before = {}
        for name in values:
            key = name.replace("__", ".")
            before[key] = self.host.run("sysctl", "-n", key).strip()
        self.host.run("sysctl", "-qw", *(f"{n.replace('__', '.')}={v}" for n, v in values.items()))
        try:
            yield
        finally:
            self.host.run("sysctl", "-qw", *(f"{key}={value}" for key, value in before.items()))

    @contextlib.contextmanager
    def nft(self, hook: str, rule: str, family: str = "inet") -> Iterator[Callable[[], int]]:
        """One rule in one chain, `hook` being where; gives how many packets a counter in the rule has seen."""
        self.host.run("nft", f"add table {family} deaths")
        try:
            self.host.run("nft", f"add chain {family} deaths here {{ type filter {hook}; }}")
            self.host.run("nft", f"add rule {family} deaths here {rule}")
            yield lambda: int(
                self.host.run("nft", f"list table {family} deaths").split("packets ")[1].split()[0]
            )
        finally:
            self.host.run("nft", f"delete table {family} deaths")

    @contextlib.contextmanager
    def shot_by_tcx(self, interface: str, kind: int) -> Iterator[None]:
        """Another's TCX program, behind ours, that drops everything."""
        program = shooting_program()
        index = self.host.inside(lambda: socket.if_nametoindex(interface))
        attr = struct.pack("=IIIIIIQ", program, index, kind, 0, 0, 0, 0)
        link = self.host.inside(lambda: bpf_calls.bpf(_LINK_CREATE, attr, "tcx link"))
        try:
            yield
        finally:
            os.close(link)
            os.close(program)

    @contextlib.contextmanager
    def shot_by_clsact(self, interface: str, direction: str) -> Iterator[None]:
        """Another's filter of the old kind that drops everything."""
        pin = self.datapath.directory / "shot"
        program = shooting_program()
        bpf_calls.obj_pin(program, pin)
        os.close(program)
        add, remove = (f"tc qdisc {do} dev {interface} clsact" for do in ("add", "del"))
        filters = f"tc filter add dev {interface} {direction} bpf direct-action object-pinned {pin}"
        try:
            with self.commands((add, remove), (filters, "")):
                yield
        finally:
            pin.unlink()

    @contextlib.contextmanager
    def queue(self, interface: str, *lines: str) -> Iterator[Callable[[], int]]:
        """Queueing disciplines for the egress of an interface; gives what they say that they have dropped."""
        first, *more = lines
        pairs = [
            (f"tc qdisc add dev {interface} root {first}", f"tc qdisc del dev {interface} root")
        ]
        pairs += [(f"tc qdisc add dev {interface} {line}", "") for line in more]
        with self.commands(*pairs):
            yield lambda: self._queue_drops(interface)

    def _queue_drops(self, interface: str) -> int:
        # the outer discipline counts what the inner one refuses
        shown = self.host.run("tc", "-s", "qdisc", "show", "dev", interface, "root")
        return int(shown.split("dropped ")[1].split(",")[0])

    @contextlib.contextmanager
    def unread_device(self) -> Iterator[None]:
        """t0, a device without Ethernet headers; it has room for two packets, and nobody takes them out."""

        def make() -> int:
            device = os.open("/dev/net/tun", os.O_RDWR)
            request = struct.pack("16sH22x", b"t0", _IFF_TUN | _IFF_NO_PI)
            fcntl.ioctl(device, _TUNSETIFF, request)
            return device

        device = self.host.inside(make)
        try:
            self.host.run(*"ip link set t0 txqueuelen 2 up".split())
            yield
        finally:
            os.close(device)

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """The other end of the node's eth0 is down, and the kernel has taken notice."""
        wire = (self.lab.underlay, f"node{self.node.number}")
        ip(f"-n {wire[0].name} link set {wire[1]} down")
        try:
            deadline = time.monotonic() + WAIT_S
            while "DOWN " not in self.host.run("ip", "-o", "link", "show", "dev", "eth0"):
                if time.monotonic() > deadline:
                    raise TimeoutError("eth0 is still up")
                time.sleep(0.01)
            yield
        finally:
            ip(f"-n {wire[0].name} link set {wire[1]} up")

    @contextlib.contextmanager
    def vxlan(self, version: int, *fdb: str) -> Iterator[str]:
        """A tunnel device with a route into it and a known neighbour there; gives the address behind it."""
        target = "10.202.0.1" if version == 4 else "fd22::1"
        mac = "02:00:00:00:00:01"
        pairs = [
            ("ip link add vx0 type vxlan id 7 dstport 4789 nolearning", "ip link del vx0"),
            ("ip link set vx0 up", ""),
            (f"ip -{version} route add {target} dev vx0", ""),
            (f"ip -{version} neigh replace {target} lladdr {mac} dev vx0", ""),
            *((f"bridge fdb add {mac} dev vx0 {entry}", "") for entry in fdb),
        ]
        with self.commands(*pairs):
            yield target


def shooting_program() -> int:
    """A TC program that drops every packet; the caller closes it."""
    code = struct.pack("<BBhiBBhi", 0xB7, 0, 0, _TC_ACT_SHOT, 0x95, 0, 0, 0)
    instructions = ctypes.create_string_buffer(code, len(code))
    gpl = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "=IIQQ",
        _SCHED_CLS,
        len(code) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(gpl),
    )
    return bpf_calls.bpf(_PROG_LOAD, attr, "load a program")


def inner_of(report: v05.DropReport) -> inner.InnerPacket:
    """The packet that a report is about."""
    return inner.parse(report.packet)


@contextlib.contextmanager
def stage(mode: Mode, bpf_dir: Path | None = None) -> Iterator[Stage]:
    """Build one. Neighbours are known for good: only the test lets packets die."""
    with Lab(nodes=2, mode=mode) as lab, datapaths.loaded(lab.nodes[0].namespace, bpf_dir) as path:
        built = Stage(lab, path)
        node, other = lab.nodes
        for version in (4, 6):
            gateway = f"10.244.{node.number}.1" if version == 4 else f"fd44:{node.number}::1"
            if version == 6 and mode == "routed":
                gateway = "fe80::1"
            for pod in node.pods:
                know(built.host, pod.ip(version), _towards(built, pod), pod.namespace, "eth0")
                know(pod.namespace, gateway, "eth0", built.host, _towards(built, pod))
            there = other.address if version == 4 else other.address6
            know(built.host, there, "eth0", other.namespace, "eth0")
            if mode == "bridged":
                pod = built.server
                know(built.client.namespace, pod.ip(version), "eth0", pod.namespace, "eth0")
        ports = bpf_calls.Map.open(path.maps / "ports")
        for interface in (built.client.interface, built.server.interface, "eth0"):
            path.attach(interface)
            index = node.port(interface)
            ports.update(struct.pack("=I", index), struct.pack("=Q", index))
        ports.close()
        path.attach_drop()
        path.attach_delivery()
        built.watch()
        path.enable()
        yield built


def _growth(before: Mapping[T, int], now: Mapping[T, int]) -> dict[T, int]:
    """Return what has grown, and by how much."""
    grown = {name: count - before.get(name, 0) for name, count in now.items()}
    return {name: count for name, count in grown.items() if count}


def _towards(built: Stage, pod: Pod) -> str:
    return "cni0" if built.lab.mode == "bridged" else pod.interface


def know(where: Namespace, address: str, device: str, owner: Namespace, interface: str) -> None:
    """Make a neighbour known for good."""
    mac = raw_packets.mac(owner, interface)
    where.run(*f"ip neigh replace {address} lladdr {mac} dev {device} nud permanent".split())
