# SPDX-License-Identifier: Apache-2.0
"""Rings, a producer on one CPU, the exporter in a process on another, a counting collector behind a cable.

`python -m tests.bench.export_rig exporter MAPS` and `... receiver PINS` are the processes of the rig.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import platform
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hostint_agent import bpf_calls, exporter, loader
from hostint_agent.node_rules import Destination
from tests.agent import cable, rings
from tests.bench.node import WrongCount
from tests.lab.namespace import Namespace

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
PORT = 32766
# as on a node with two CPUs
RING_RECORDS, _RINGS = 16384, 4
# the flow ring of the second CPU
_RING = 2
_XDP_ATTACH, _XDP_NATIVE = 37, 4
_WAIT_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What one run of the producer came to. `lost`: found the ring full, and was counted as that."""

    per_s: float
    cpu_ns: float
    lost: int


class _Seen(ctypes.Structure):
    """struct seen of export_receiver.c."""

    _fields_ = (
        ("packets", ctypes.c_uint64),
        ("reports", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
    )


class _Receiver:
    """The counting program on the far end's interface."""

    def __init__(self, far: Namespace, pins: Path, *, cut: bool) -> None:
        self.whole = not cut
        index = far.inside(lambda: socket.if_nametoindex("eth0"))
        program = bpf_calls.obj_get(pins / ("cut" if cut else "whole"))

        def attach() -> int:
            if not cut:
                return bpf_calls.tcx_link_create(program, index, bpf_calls.TCX_INGRESS)
            attr = struct.pack("=IIII", program, index, _XDP_ATTACH, _XDP_NATIVE)
            return bpf_calls.bpf(bpf_calls.LINK_CREATE, attr, "xdp link")

        self._link = far.inside(attach)
        os.close(program)
        opened = bpf_calls.Map.open(pins / "seen")
        self.seen = _Seen.from_buffer(opened.memory())
        opened.close()

    def close(self) -> None:
        os.close(self._link)


class _Exporter:
    """The exporter in a process of its own; it tells its figures when asked."""

    def __init__(self, near: Namespace, maps: Path, cpu: int) -> None:
        command = ["taskset", "-c", str(cpu), sys.executable, "-m", "tests.bench.export_rig"]
        self._process = near.popen(
            *(*command, "exporter", str(maps)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
        )

    def ask(self) -> dict[str, int]:
        """Reports sent and failed until now, and the CPU time of its thread."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        told: dict[str, int] = json.loads(self._process.stdout.readline())
        return told

    def close(self) -> None:
        self._process.communicate()


class Rig:
    """See `rig`."""

    def __init__(
        self, maps: rings.Rings, producer: list[str], sender: _Exporter, receiver: _Receiver
    ) -> None:
        self._maps = maps
        self._producer = producer
        self._exporter = sender
        self._receiver = receiver
        self._whole = receiver.whole

    def run(self, count: int, rate: int, lengths: Sequence[int]) -> Run:
        """Write `count` reports, `rate` a second or (0) as fast as the exporter makes room, and wait until they have come.

        Raises WrongCount unless every report that was written was sent, came, and was as long as it should be. Batches that
        are cut may lose some on the way: the far interface takes them into a queue of 256.
        """
        seen_before = self._seen()
        command = [*self._producer, str(self._maps.maps), str(_RING), str(count), str(rate)]
        command += map(str, lengths)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as producer:
            assert producer.stdin
            assert producer.stdout
            if producer.stdout.readline() != "ready\n":
                raise RuntimeError(f"the producer cannot begin: {' '.join(command)}")
            # which wakes it
            before = self._exporter.ask()
            produced = json.loads(producer.communicate("\n")[0])
        self._settle()
        after, seen_after = self._exporter.ask(), self._seen()
        sent, failed = (after[key] - before[key] for key in ("sent", "failed"))
        came, bytes_came = (now - was for now, was in zip(seen_after, seen_before, strict=True))
        if (sent, failed) != (produced["written"], 0):
            raise WrongCount(f"{produced['written']} reports: {sent} sent, {failed} failed")
        if self._whole and (came, bytes_came) != (sent, produced["bytes"]):
            raise WrongCount(
                f"{sent} reports of {produced['bytes']} bytes in all: {came} of {bytes_came} came"
            )
        return Run(
            per_s=(sent - produced["left"]) / produced["ns"] * 1e9,
            cpu_ns=(after["cpu_ns"] - before["cpu_ns"]) / sent,
            lost=produced["full"],
        )

    def idle_cpu_percent(self, for_s: float) -> float:
        """CPU time of the exporter when nothing is reported, in percent of a core."""
        before, since = self._exporter.ask(), time.monotonic()
        time.sleep(for_s)
        after = self._exporter.ask()
        return (after["cpu_ns"] - before["cpu_ns"]) / (time.monotonic() - since) / 1e7

    def _seen(self) -> tuple[int, int]:
        seen = self._receiver.seen
        return seen.reports, seen.bytes

    def _settle(self) -> None:
        """Wait until the ring is empty, and until what was sent has come."""
        deadline = time.monotonic() + _WAIT_S
        while self._maps.waiting(_RING):
            if time.monotonic() > deadline:
                raise WrongCount(f"{self._maps.waiting(_RING)} reports wait for ever")
            time.sleep(0.005)
        came = -1
        while came != (came := self._seen()[0]):
            time.sleep(0.05)


@contextlib.contextmanager
def rig(*, cut: bool = False) -> Iterator[Rig]:
    """Build it; nothing of it is left behind. `cut`: the collector's interface takes no batches."""
    cpus = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hostint-bench-")))
        producer = _build_producer(directory)
        near, far = stack.enter_context(cable.cable())
        maps = stack.enter_context(rings.rings(_RINGS, RING_RECORDS))
        _in_a_process("receiver", str(maps.maps))
        receiver = _Receiver(far, maps.maps, cut=cut)
        stack.callback(receiver.close)
        sender = _Exporter(near, maps.maps, cpus[0])
        stack.callback(sender.close)
        yield Rig(maps, ["taskset", "-c", str(cpus[-1]), str(producer)], sender, receiver)


def _build_producer(directory: Path) -> Path:
    to = directory / "producer"
    include = f"-I{loader.default_bpf_dir()}"
    command = ["gcc", "-O2", include, "-o", str(to), str(_HERE / "export_producer.c")]
    subprocess.run(command, check=True)
    return to


def _in_a_process(*arguments: str) -> None:
    command = [sys.executable, "-m", "tests.bench.export_rig", *arguments]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])


def _compile_receiver(pins: Path) -> None:
    os.environ["BCC_KERNEL_SOURCE"] = str(loader.default_bpf_dir() / "headers")
    import bcc

    include = f"/usr/include/{platform.machine()}-linux-gnu"
    flags = [f'-DPIN_MAPS="{pins}/"', f"-DPORT={PORT}", "-I/usr/include", f"-I{include}", "-w"]
    module: Any = bcc.BPF(text=(_HERE / "export_receiver.c").read_text(), cflags=flags)
    for name, kind in (("whole", bcc.BPF.SCHED_CLS), ("cut", bcc.BPF.XDP)):
        bpf_calls.obj_pin(module.load_func(name, kind).fd, pins / name)


def _export(maps: Path) -> None:
    """Run the exporter until the input ends; every line of it asks for the figures."""
    exports = exporter.Exporter(maps, renumber=False)
    exports.set_destinations({0: Destination("bench", cable.FAR, PORT, 0)})
    exports.start()
    assert exports._thread and exports._thread.ident
    clock = time.pthread_getcpuclockid(exports._thread.ident)
    for _ in sys.stdin:
        # who asks is about to write reports, and no program of the kernel that could ring the bell
        exports.poke()
        sent, failed = exports.counters().get(0, (0, 0))
        told = {"sent": sent, "failed": failed, "cpu_ns": time.clock_gettime_ns(clock)}
        print(json.dumps(told), flush=True)
    exports.stop()


if __name__ == "__main__":
    {"exporter": _export, "receiver": _compile_receiver}[sys.argv[1]](Path(sys.argv[2]))
