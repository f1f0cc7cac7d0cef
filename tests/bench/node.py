# SPDX-License-Identifier: Apache-2.0
"""A node that forwards what the generators make: in on a veth, through the stack, out on an ifb that drops.

    generator -> in0 (TC ingress) -> ip_forward -> out0 (TC egress) -> gone

The second generator has in1 and out1, so that two CPUs share nothing but what the programs make them share.
"""

import contextlib
import ctypes
import functools
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from hostint_agent import attach, bpf_calls, bpf_types, classifier, loader
from tests.bench import generator
from tests.lab import datapath, topology
from tests.lab.namespace import Namespace, ip

_PINS = "/sys/fs/bpf/hostint-bench-"
WATCHLIST = 1
HOUR_NS = 3600 * 10**9
# as watchlists are by default, so the clock is read at egress for each packet, but never with any news
NO_NEWS = {"interval_ns": HOUR_NS, "latency_change_ns": HOUR_NS}
EVERY_PACKET = {"interval_ns": 0, "latency_change_ns": HOUR_NS}
_INTERFACES = ("in0", "out0", "in1", "out1")
# what is attached: the datapath as the agent does it, the least that a watched packet can cost (floor.c), programs that
# return at once or read the clock on the same hooks, nothing
Programs = Literal["ours", "floor", "empty", "clock", "none"]
# where packets of each generator go
WAYS_OUT = ("10.96.0.0/16", "10.97.0.0/16")
_ENABLE_STATS = 32
_PROGRAM_INFO_BYTES = 232
_RUN_TIME = 192  # struct bpf_prog_info: run_time_ns, then run_cnt
_SYSCTLS = (
    "net.ipv4.ip_forward=1",
    "net.ipv4.conf.all.rp_filter=0",
    "net.ipv4.conf.default.rp_filter=0",
    "net.ipv6.conf.all.disable_ipv6=1",
    "net.ipv6.conf.default.disable_ipv6=1",
)


class WrongCount(Exception):
    """A run did not do what it was to measure; its figures would be lies."""


class Node:
    """The namespace, the datapath in it, and the generators; see `node`."""

    def __init__(
        self,
        namespace: Namespace,
        pins: Path,
        loaded: datapath.Datapath,
        floor: Callable[[], datapath.Datapath],
    ) -> None:
        self.namespace = namespace
        self.datapath = loaded
        # loaded for those who ask: it takes two seconds
        self._load_floor = functools.cache(floor)
        self._pins = pins
        self._attached: tuple[Programs, int] = ("none", 1)
        cpus = generator.choose_cpus()
        self.generators = [
            generator.Generator(pins, number, cpu, namespace, f"in{number}")
            for number, cpu in enumerate(cpus)
        ]
        self._heads = bpf_calls.Map.open(loaded.maps / "ring_heads").memory()
        self._tails = bpf_calls.Map.open(loaded.maps / "ring_tails").memory()
        indexes = self._indexes()
        attach.Ports(loaded.maps).assign(indexes.values())
        loaded.enable()

    def _indexes(self) -> dict[str, int]:
        shown = self.namespace.run("ip", "-o", "link", "show")
        pairs = (line.split(":")[:2] for line in shown.splitlines())
        return {name.strip().split("@")[0]: int(index) for index, name in pairs}

    def close(self) -> None:
        """Let go of the generators' interfaces."""
        for made in self.generators:
            made.close()

    def program(self, name: str) -> int:
        """A descriptor of one of generator.c's programs; the caller closes it."""
        return bpf_calls.obj_get(self._pins / name)

    def use(self, programs: Programs, generators: int = 1) -> None:
        """Attach these programs to the interfaces of the first generators, and nothing else."""
        if self._attached == (programs, generators):
            return
        self.datapath.detach()
        if self._attached[0] == "floor":
            self._load_floor().detach()
        indexes = self._indexes() if programs in ("empty", "clock") else {}
        for interface in _INTERFACES[: 2 * generators] if programs != "none" else ():
            if programs in ("ours", "floor"):
                (self.datapath if programs == "ours" else self._load_floor()).attach(interface)
            else:
                for kind in (bpf_calls.TCX_INGRESS, bpf_calls.TCX_EGRESS):
                    self.datapath.attach_program(self.program(programs), indexes[interface], kind)
        if programs == "ours":
            self.datapath.attach_drop()
        self._attached = (programs, generators)

    def commit(self, image: classifier.Image, **policy: int) -> None:
        """Make compiled rules live; their reports go to one collector without limit."""
        self._commit(self.datapath, image, policy)

    def commit_floor(self, image: classifier.Image) -> None:
        """The same for floor.c."""
        self._commit(self._load_floor(), image, {})

    @staticmethod
    def _commit(to: datapath.Datapath, image: classifier.Image, policy: dict[str, int]) -> None:
        to.tables.commit(
            image,
            {WATCHLIST: datapath.policy(**policy)},
            {0: bpf_types.Collector(snap_length=bpf_types.SNAP_BYTES)},
        )

    def empty_rings(self) -> None:
        """Throw all reports away that wait."""
        self._tails[:] = self._heads[:]

    def came_out(self) -> list[int]:
        """How many packets reached the end of each generator's way: the drops of its ifb."""
        table = self.namespace.inside(lambda: Path("/proc/thread-self/net/dev").read_text())
        rows = dict(line.strip().split(":", 1) for line in table.splitlines() if ":" in line)
        return [int(rows[f"out{n}"].split()[3]) for n in range(len(self.generators))]

    def run(self, count: int) -> float:
        """Have the first generator send `count` packets; ns a packet. Raises WrongCount if one of them went astray."""
        before = self.came_out()
        found = self.generators[0].run(count)
        self._compare(before, [count])
        return found

    def run_together(self, count: int) -> float:
        """Have all generators send their part of `count` packets, at the same time; ns a packet on each CPU meanwhile.

        Raises WrongCount, generator.NotTogether.
        """
        share = count // len(self.generators)
        before = self.came_out()
        together = threading.Barrier(len(self.generators))
        running = [made.start(share, together=together) for made in self.generators]
        begins = [started.result() for started in running]
        self._compare(before, [share] * len(begins))
        return generator.ns_together(begins)

    def _compare(self, before: list[int], wanted: list[int]) -> None:
        for was, now, count in zip(before, self.came_out(), wanted, strict=False):
            if now - was != count:
                raise WrongCount(f"{now - was} of {count} packets came through")


def _build(namespace: Namespace) -> None:
    name = namespace.name
    ip(f"netns add {name}")
    namespace.run("sysctl", "-qw", *_SYSCTLS)
    ip(f"-n {name} link set lo up")
    for number in range(generator.NR_GENERATORS):
        ip(
            f"-n {name} link add in{number} address 02:00:00:00:01:01 type veth peer name peer{number}",
            f"-n {name} link set in{number} up",
            f"-n {name} link set peer{number} up",
            f"-n {name} link add out{number} type ifb",
            f"-n {name} link set out{number} up",
            f"-n {name} addr add 10.76.{number}.1/24 dev out{number}",
        )
    ip(
        f"-n {name} route add default via 10.76.0.2 dev out0",
        f"-n {name} route add {WAYS_OUT[1]} via 10.76.1.2 dev out1",
    )


def bpf_dir() -> Path | None:
    """Which sources to load: HOSTINT_BPF_DIR as everywhere."""
    text = os.environ.get("HOSTINT_BPF_DIR")
    return Path(text) if text else None


def remove_leftover_pins() -> None:
    """Remove what benches that were killed have pinned."""
    directory, prefix = Path(_PINS).parent, Path(_PINS).name
    for left in directory.glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix).split("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left)


class _Kept:
    """The node that benches share, once there is one."""

    until: contextlib.ExitStack | None = None
    node: Node | None = None


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within, all who ask for a node get the same one: loading takes as long as a quick bench."""
    with contextlib.ExitStack() as stack:
        _Kept.until = stack
        try:
            yield
        finally:
            _Kept.until = _Kept.node = None


@contextlib.contextmanager
def node() -> Iterator[Node]:
    """A forwarding node with a loaded datapath, nothing attached; all of it is gone afterwards."""
    if _Kept.until is None:
        with _made() as made:
            yield made
        return
    _Kept.node = _Kept.node or _Kept.until.enter_context(_made())
    try:
        yield _Kept.node
    finally:
        _Kept.node.use("none")


@contextlib.contextmanager
def _made() -> Iterator[Node]:
    topology.remove_leftovers()
    remove_leftover_pins()
    namespace = Namespace(f"hl{os.getpid()}-bench")  # what a killed process leaves goes as a lab's
    pins = Path(f"{_PINS}{os.getpid()}")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, pins, ignore_errors=True)
        pins.mkdir()
        stack.callback(topology.remove_namespaces, namespace.name)
        _build(namespace)
        generator.load(pins)
        loaded = stack.enter_context(datapath.loaded(namespace, bpf_dir()))

        def floor() -> datapath.Datapath:
            sources = Path(
                shutil.copytree(bpf_dir() or loader.default_bpf_dir(), temporary / "bpf")
            )
            shutil.copy(Path(__file__).with_name("floor.c"), sources / loader.MAIN_SOURCE)
            return stack.enter_context(datapath.loaded(namespace, sources))

        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made = Node(namespace, pins, loaded, floor)
        stack.callback(made.close)
        yield made


@contextlib.contextmanager
def run_times() -> Iterator[None]:
    """Have the kernel count runs and run time of every program; that makes them slower."""
    opened = bpf_calls.bpf(_ENABLE_STATS, struct.pack("=I", 0), "enable statistics")
    try:
        yield
    finally:
        os.close(opened)


def program_times(program: int) -> tuple[int, int]:
    """ns that a program ran and how often, while `run_times` was on."""
    info = ctypes.create_string_buffer(_PROGRAM_INFO_BYTES)
    attr = struct.pack("=IIQ", program, len(info), ctypes.addressof(info))
    bpf_calls.bpf(bpf_calls.OBJ_GET_INFO_BY_FD, attr, "program info")
    ns, runs = struct.unpack_from("=QQ", info, _RUN_TIME)
    return ns, runs
