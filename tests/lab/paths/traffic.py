# SPDX-License-Identifier: Apache-2.0
"""Runs flood.c between a client and a server, and beside them what makes the allocator hand out addresses again at once."""

import contextlib
import dataclasses
import ipaddress
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from hostint_agent import bpf_calls
from tests.lab.namespace import Namespace
from tests.lab.paths import wiring

PORT = 9000
FIRST_CLIENT_PORT = 20000
FLOWS = 100
# in the range that the recorders take for background
BACKGROUND_PORTS = (21000, 21099)
_BACKGROUND_SERVER = 21900
_BLOCK_BYTES = 8192
_SUPER_PACKET_BYTES = 4200
_FRAGMENTED_BYTES = 3000
_SEGMENT_BYTES = 1104
_ANY = {4: "0.0.0.0", 6: "::"}
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of traffic: what flood.c is told, which protocol it is, and whether flows are told apart by address."""

    flood: str
    protocols: dict[int, int]
    by_address: bool = False
    super_packets: bool = False
    tags: int = 0
    options: tuple[tuple[str, int], ...] = ()
    answered: bool = True


def _ip_protocol(number: int) -> dict[int, int]:
    return {4: number, 6: number}


UDP = Kind("udp", _ip_protocol(17))
TCP = Kind("tcp", _ip_protocol(6), super_packets=True, options=(("bytes", _BLOCK_BYTES),))
UDP_SEGMENTS = Kind(
    "udp",
    _ip_protocol(17),
    options=(("bytes", 4 * _SEGMENT_BYTES), ("segment", _SEGMENT_BYTES), ("burst", 1)),
)
SCTP = Kind("sctp", _ip_protocol(132))
ICMP = Kind("icmp", {4: 1, 6: 58}, by_address=True, answered=False)
FRAGMENTS = Kind(
    "udp", _ip_protocol(17), by_address=True, options=(("bytes", _FRAGMENTED_BYTES), ("burst", 1))
)


def tagged(kind: Kind, tags: int) -> Kind:
    """The same as frames with VLAN tags."""
    options = (("bytes", _SUPER_PACKET_BYTES),) if kind.super_packets else ()
    return dataclasses.replace(kind, tags=tags, options=options)


class Traffic:
    """Senders and receivers of a scene, for one IP version. Background runs as long as this does, while the gate is open."""

    def __init__(
        self, scene: wiring.Scene, version: int, program: Path, truth_pins: Path, maps: Path
    ) -> None:
        self._scene = scene
        self._version = version
        self._program = program
        heads = bpf_calls.Map.open(maps / "ring_heads")
        self._shared = {
            "positions": truth_pins / "truth_positions",
            "cpus": bpf_calls.possible_cpus(),
            "heads": maps / "ring_heads",
            "tails": maps / "ring_tails",
            "rings": heads.max_entries,
        }
        heads.close()
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self._stop)
            self._start_background()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        for process in self._running:
            _end(process)
        self._running.clear()

    def _start(
        self, where: Namespace, role: str, kind: str, **options: object
    ) -> subprocess.Popen[str]:
        words = [f"{name}={value}" for name, value in (self._shared | options).items()]
        command = (str(self._program), role, kind, *words)
        process = where.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._running.append(process)
        if role == "serve" and process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{' '.join(command)}: {process.stderr.read()}")
        return process

    def _start_background(self) -> None:
        """The host talks to itself and to pods, some of whose packets nobody sees again, and a pod without hooks talks."""
        scene, version = self._scene, self._version
        node = scene.node.namespace
        host = scene.node.address if version == 4 else scene.node.address6
        port = {"port": _BACKGROUND_SERVER}
        for kind in ("udp", "tcp"):
            self._start(node, "serve", kind, **{"from": _ANY[version]}, bytes=512, **port)
        server = scene.listens[version]
        if scene.server is not node:
            self._start(scene.server, "serve", "udp", **{"from": server}, **port)
        pod, stranger = scene.client, scene.stranger
        senders = [
            (pod.namespace, "udp", pod.ip(version), host),
            (pod.namespace, "tcp", pod.ip(version), host),
            (node, "udp", _LOOPBACK[version], _LOOPBACK[version]),
            (node, "tcp", _LOOPBACK[version], _LOOPBACK[version]),
            (stranger.namespace, "udp", stranger.ip(version), server),
        ]
        for number, (where, kind, source, target) in enumerate(senders):
            ports = {"client_port": BACKGROUND_PORTS[0] + 4 * number, "flows": 4}
            addresses = {"from": source, "to": target, "bytes": 512 if kind == "tcp" else 32}
            self._start(where, "send", kind, burst=8, pause_us=1000, **ports, **addresses, **port)

    @contextlib.contextmanager
    def server(self, kind: Kind) -> Iterator[None]:
        """What answers."""
        if kind.tags or not kind.answered:
            yield
            return
        options = {"from": self._scene.listens[self._version], "port": PORT, **dict(kind.options)}
        process = self._start(self._scene.server, "serve", kind.flood, **options)
        try:
            yield
        finally:
            _end(process)
            self._running.remove(process)

    def send(self, kind: Kind, target: int) -> None:
        """Send until the recorders have seen `target` packets. Raises RuntimeError."""
        senders = self._frames(kind, target) if kind.tags else [self._sender(kind, target)]
        for process in senders:
            _, said = process.communicate()
            self._running.remove(process)
            if process.returncode:
                raise RuntimeError(f"{' '.join(process.args)}: {said}")

    def _common(self, kind: Kind, target: int) -> dict[str, object]:
        return {
            "port": PORT,
            "client_port": FIRST_CLIENT_PORT,
            "flows": FLOWS,
            "target": target,
            "super_packets": int(kind.super_packets),
            **dict(kind.options),
        }

    def _sender(self, kind: Kind, target: int) -> subprocess.Popen[str]:
        scene, version = self._scene, self._version
        options = self._common(kind, target)
        options["from"] = scene.client.ip(version)
        if kind.by_address:
            options["from"] = ipaddress.ip_network(wiring.CLIENTS[version])[0]
            options["sources"] = FLOWS
        options["to"] = scene.connects[version]
        return self._start(scene.client.namespace, "send", kind.flood, **options)

    def _frames(self, kind: Kind, target: int) -> list[subprocess.Popen[str]]:
        """Both ways at once: nobody answers frames that no device takes."""
        scene, version = self._scene, self._version
        ends = [scene.client, scene.node.pods[1]]
        started = []
        for reverse, (here, there) in enumerate((ends, ends[::-1])):
            options = self._common(kind, target)
            options |= {"from": here.ip(version), "to": there.ip(version), "tags": kind.tags}
            options |= {"interface": "eth0", "mac": wiring.mac(there).hex(":"), "reverse": reverse}
            started.append(self._start(here.namespace, "frames", kind.flood, **options))
        return started


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.wait()
    process.stdout.close()
    process.stderr.close()
