# SPDX-License-Identifier: Apache-2.0
"""Packets made inside the kernel (generator.c) and the time that a batch of them takes through the stack."""

import array
import concurrent.futures
import ctypes
import itertools
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hostint_agent import bpf_calls, loader
from tests.lab.namespace import Namespace

BATCH = 64
MAX_TUPLES = 65536
MAX_BATCHES = 8192
NR_GENERATORS = 2
FRAME_BYTES = 64
TUPLE_BYTES = 16
TCP, UDP = 6, 17
XDP_DROP, XDP_PASS = 1, 2
_ROOT = Path(__file__).parents[2]
_KINDS = {"generate": "XDP", "pass": "XDP", "empty": "SCHED_CLS", "clock": "SCHED_CLS"}
_LIVE_FRAMES = 2
_ATTACH_XDP = 37
_XDP_NATIVE = 4
# version and header length, TOS, length, id, fragment, TTL
_HEADER = (0x45, 0, FRAME_BYTES - 14, 0, 0, 64)
_CONSTANT_SUM = sum(struct.unpack("!5H", struct.pack("!BBHHHBx", *_HEADER)))
_MIN_BATCHES = 32
_GATEWAY_MAC, _HOST_MAC = bytes.fromhex("020000000102"), bytes.fromhex("020000000101")
T = TypeVar("T")


class NotTogether(Exception):
    """One generator had ended before another one began: something else had its CPU."""


@dataclass(frozen=True, slots=True)
class Tuple:
    """One packet; addresses as numbers."""

    source: int
    destination: int
    source_port: int
    destination_port: int
    protocol: int = UDP


class _State(ctypes.Structure):
    """struct generator."""

    _fields_ = (
        ("made", ctypes.c_uint64),
        ("tuples", ctypes.c_uint32),
        ("next", ctypes.c_uint32),
        ("action", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("frame", ctypes.c_uint8 * FRAME_BYTES),
    )


def _checksum(packet: Tuple) -> int:
    """RFC 1071, of an IPv4 header of which only these fields differ."""
    total = _CONSTANT_SUM + packet.protocol
    for address in (packet.source, packet.destination):
        total += (address >> 16) + (address & 0xFFFF)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame_of(packet: Tuple) -> bytes:
    """The frame that generator.c makes for a packet."""
    header = struct.pack(
        "!BBHHHBBHII",
        *_HEADER,
        packet.protocol,
        _checksum(packet),
        packet.source,
        packet.destination,
    )
    transport = struct.pack(
        "!HHHH", packet.source_port, packet.destination_port, FRAME_BYTES - 34, 0
    )
    frame = _HOST_MAC + _GATEWAY_MAC + b"\x08\x00" + header + transport
    return frame.ljust(FRAME_BYTES, b"\0")


def _packed(packet: Tuple) -> bytes:
    """struct tuple."""
    return struct.pack(
        "!IIHHHBx",
        packet.source,
        packet.destination,
        packet.source_port,
        packet.destination_port,
        _checksum(packet),
        packet.protocol,
    )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Packets as the generator wants them; see `traffic`."""

    frame: bytes
    tuples: bytes

    @property
    def count(self) -> int:
        """How many different packets."""
        return len(self.tuples) // TUPLE_BYTES


def traffic(packets: Sequence[Tuple]) -> Traffic:
    """Prepare packets for `Generator.send`. Raises ValueError."""
    if not 0 < len(packets) <= MAX_TUPLES:
        raise ValueError(f"{len(packets)} packets, 1..{MAX_TUPLES} are possible")
    return Traffic(frame_of(packets[0]), b"".join(map(_packed, packets)))


def compile_and_pin(directory: Path) -> None:
    """Compile generator.c and pin programs and maps; in this process, which maps LLVM from then on."""
    sources = loader.default_bpf_dir()
    os.environ["BCC_KERNEL_SOURCE"] = str(sources / "headers")
    import bcc

    cpus = bpf_calls.possible_cpus()
    flags = [
        f'-DPIN_MAPS="{directory}/"',
        f"-DNR_CPUS={cpus}",
        f"-DNR_TUPLES={NR_GENERATORS * MAX_TUPLES}",
        f"-DNR_BATCH_TIMES={NR_GENERATORS * MAX_BATCHES}",
        "-I/usr/include",
        f"-I/usr/include/{os.uname().machine}-linux-gnu",
        "-Wno-everything",
    ]
    module = bcc.BPF(text=Path(__file__).with_name("generator.c").read_text(), cflags=flags)
    for name, kind in _KINDS.items():
        function = module.load_func(name, getattr(bcc.BPF, kind))
        bpf_calls.obj_pin(function.fd, directory / name)


def load(directory: Path) -> None:
    """Compile and pin in a process of its own. Raises RuntimeError with what the compiler says."""
    command = [sys.executable, "-m", "tests.bench.generator", str(directory)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"generator.c: {done.stderr.strip()[-2000:]}")


def choose_cpus(allowed: Sequence[int] | None = None) -> list[int]:
    """The CPUs that generators are pinned to: the last ones, since interrupts are most often on the first."""
    cpus = sorted(allowed if allowed is not None else os.sched_getaffinity(0))
    return cpus[::-1][:NR_GENERATORS]


class Generator:
    """One of the generators, in a thread that is pinned to a CPU and lives in a namespace."""

    def __init__(self, directory: Path, number: int, cpu: int, node: Namespace, entry: str) -> None:
        """`entry` is the interface that the packets come in on. Raises OSError."""
        self.cpu = cpu
        self._number = number
        self._states = bpf_calls.Map.open(directory / "generators").memory()
        self._tuples = bpf_calls.Map.open(directory / "tuples").memory()
        self._batches = bpf_calls.Map.open(directory / "batches").memory()
        self._state = _State.from_buffer(self._states, number * ctypes.sizeof(_State))
        bpf_calls.Map.open(directory / "generator_of_cpu").update(
            struct.pack("=I", cpu), struct.pack("=Q", number)
        )
        self._program = bpf_calls.obj_get(directory / "generate")
        self._worker = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._worker.submit(node.enter).result()
        self._worker.submit(os.sched_setaffinity, 0, {cpu}).result()
        self._ifindex = self._call(lambda: socket.if_nametoindex(entry))
        self._link = self._call(lambda: self._enable_live_frames(directory))

    def _call(self, function: Callable[[], T]) -> T:
        return self._worker.submit(function).result()

    def _enable_live_frames(self, directory: Path) -> int:
        program = bpf_calls.obj_get(directory / "pass")
        attr = struct.pack("=IIII", program, self._ifindex, _ATTACH_XDP, _XDP_NATIVE)
        try:
            return bpf_calls.bpf(bpf_calls.LINK_CREATE, attr, "xdp link")
        finally:
            os.close(program)

    def close(self) -> None:
        """End the thread, let go of the interface."""
        self._worker.shutdown()
        os.close(self._link)
        os.close(self._program)

    def send(self, traffic: Traffic) -> None:
        """What `run` sends from now on: these packets one after the other, then from the start again."""
        start = self._number * MAX_TUPLES * TUPLE_BYTES
        self._tuples[start : start + len(traffic.tuples)] = traffic.tuples
        self._state.frame = type(self._state.frame)(*traffic.frame)
        self._state.next = 0
        self._state.tuples = traffic.count

    def start(
        self, count: int, *, action: int = XDP_PASS, together: threading.Barrier | None = None
    ) -> concurrent.futures.Future[tuple[int, ...]]:
        """Send `count` packets, `together` with others; the result is when each batch of 64 began, ns of CLOCK_MONOTONIC."""
        if not BATCH < count <= BATCH * MAX_BATCHES:
            raise ValueError(f"{count} packets, {BATCH + 1}..{BATCH * MAX_BATCHES} are possible")
        return self._worker.submit(self._run, count, action, together)

    def run(self, count: int, *, action: int = XDP_PASS) -> float:
        """Send `count` packets and return ns a packet: the median over batches of 64."""
        return ns_per_packet(self.start(count, action=action).result())

    def _run(self, count: int, action: int, together: threading.Barrier | None) -> tuple[int, ...]:
        self._state.made = 0
        self._state.action = action
        frame = ctypes.create_string_buffer(bytes(self._state.frame), FRAME_BYTES)
        context = ctypes.create_string_buffer(
            struct.pack("=IIIIII", 0, FRAME_BYTES, 0, self._ifindex, 0, 0), 24
        )
        attr = struct.pack(
            "=IIIIQQIIIIQQIII",
            self._program,
            0,
            FRAME_BYTES,
            0,
            ctypes.addressof(frame),
            0,
            count,
            0,
            24,
            0,
            ctypes.addressof(context),
            0,
            _LIVE_FRAMES,
            0,
            BATCH,
        )
        if together:
            together.wait()
        bpf_calls.bpf(bpf_calls.PROG_TEST_RUN, attr, "generator")
        if self._state.made != count:
            raise RuntimeError(f"the generator made {self._state.made} packets of {count}")
        begin = self._number * MAX_BATCHES * 8
        times = array.array("Q", self._batches[begin : begin + 8 * -(-count // BATCH)])
        return tuple(times)


def ns_per_packet(begins: Sequence[int]) -> float:
    """Median over batches. A batch that an interrupt or another process fell into is an outlier, not part of the cost."""
    return statistics.median(b - a for a, b in itertools.pairwise(begins)) / BATCH


def ns_together(all_begins: Sequence[Sequence[int]]) -> float:
    """The same over the batches of all generators that began and ended while every generator ran.

    Raises NotTogether when there are too few.
    """
    start = max(begins[0] for begins in all_begins)
    end = min(begins[-1] for begins in all_begins)
    durations = [
        b - a
        for begins in all_begins
        for a, b in itertools.pairwise(begins)
        if a >= start and b <= end
    ]
    if len(durations) < _MIN_BATCHES:
        raise NotTogether(f"the generators ran together for {len(durations)} batches only")
    return statistics.median(durations) / BATCH


if __name__ == "__main__":
    compile_and_pin(Path(sys.argv[1]))
