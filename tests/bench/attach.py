# SPDX-License-Identifier: Apache-2.0
"""How long a node with 250 pods takes to be attached to, what its traffic notices of that, and what is left to do at a restart."""

import contextlib
import os
import re
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from hostint_agent import attach, bpf_calls, interfaces, loader
from tests.bench.figure import Figure
from tests.bench.measure import Say
from tests.bench.node import bpf_dir
from tests.lab import datapath
from tests.lab.namespace import Namespace, ip
from tests.lab.topology import Lab

TAKES_S = (10, 20)
PODS = 250
_HOOKS = 2
_BEFORE_S = (1.0, 5.0)
# of the pings that tell what traffic notices
_INTERVAL_S = 0.002
_WORK = {bpf_calls.LINK_CREATE, bpf_calls.LINK_UPDATE, bpf_calls.OBJ_PIN, bpf_calls.MAP_UPDATE_ELEM}
_ANSWER = re.compile(r"^\[([\d.]+)\].* time=([\d.]+) ms", re.MULTILINE)
_SUMMARY = re.compile(r"(\d+) packets transmitted, (\d+) received")


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    pins = Path(f"/sys/fs/bpf/hostint-bench-{os.getpid()}-attach")
    pins.mkdir()
    try:
        directory = loader.load(pins, bpf_dir())
        say(f"making a node with {PODS} pods")
        with _busy_node() as lab:
            node = lab.nodes[0].namespace
            say(
                f"attaching to {PODS} pods, with a ping every {1000 * _INTERVAL_S:.0f} ms meanwhile"
            )
            with _pings(lab) as told:
                time.sleep(_BEFORE_S[not quick])
                first = _attach(node, pins, directory)
            again = _attach(node, pins, directory)
    finally:
        shutil.rmtree(pins)
    return _figures(first, again, told)


def _figures(first: "_Attached", again: "_Attached", told: "_Pings") -> list[Figure]:
    before, during = told.between(0, first.begun), told.between(first.begun, first.ended)
    base = f"median {statistics.median(before):.3f} ms before"
    return [
        Figure(f"attach_{PODS}_s", f"attach {PODS} pods", first.seconds, "s", "<=", 6),
        Figure(
            f"attach_{PODS}_lost", "pings lost meanwhile", told.lost, f"of {told.sent}", "==", 0
        ),
        Figure(
            f"attach_{PODS}_ping_ms",
            "round trip of a ping meanwhile, median",
            statistics.median(during),
            "ms",
            baseline=base,
        ),
        Figure(
            f"attach_{PODS}_ping_p99_ms",
            "round trip of a ping meanwhile, 99 %",
            _percentile(during, 0.99),
            "ms",
            baseline=f"99 % {_percentile(before, 0.99):.3f} ms before",
        ),
        Figure(
            "attach_restart_work",
            "links made, changed or pinned when the agent starts again",
            again.work,
            "of " + str(first.work),
            "==",
            0,
        ),
        Figure("attach_restart_s", "look at all of them again", again.seconds, "s"),
    ]


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


@dataclass(frozen=True)
class _Attached:
    """One start of what attaches."""

    begun: float  # time.time()
    ended: float
    seconds: float
    work: int  # bpf(2) commands that change something


def _attach(node: Namespace, pins: Path, directory: Path) -> _Attached:
    commands: list[int] = []
    call = bpf_calls.bpf

    def counted(command: int, *arguments: object) -> int:
        commands.append(command)
        return call(command, *arguments)  # type: ignore[arg-type]

    def work() -> _Attached:
        attacher = attach.Attacher(
            pins,
            directory,
            patterns=interfaces.Patterns(),
            mode="tcx",
            cgroup=datapath.CGROUP_ROOT,
            on_change=lambda _: None,
        )
        begun, clock = time.time(), time.monotonic()
        state = attacher.reconcile()
        ended, seconds = time.time(), time.monotonic() - clock
        attacher.stop()
        assert len(state.attachments) >= PODS
        assert not state.failed
        return _Attached(begun, ended, seconds, sum(c in _WORK for c in commands))

    bpf_calls.bpf = counted  # type: ignore[assignment]
    try:
        # a line for each interface would bury the progress of the benches
        with structlog.testing.capture_logs():
            return node.inside(work)
    finally:
        bpf_calls.bpf = call


@dataclass
class _Pings:
    """What became of the pings from one pod to another: (when, round trip in ms) of each that was answered."""

    answers: list[tuple[float, float]] = field(default_factory=list)
    sent: int = 0
    lost: int = 0

    def between(self, begin: float, end: float) -> list[float]:
        """Round trips of those that were answered in this time."""
        return [round_trip for when, round_trip in self.answers if begin <= when <= end]


@contextlib.contextmanager
def _pings(lab: Lab) -> Iterator[_Pings]:
    """Ping until left."""
    one, other = lab.nodes[0].pods
    command = ["ping", "-n", "-D", "-i", str(_INTERVAL_S), other.address]
    told = _Pings()
    # not a pipe, which is full after some seconds, and then ping waits for us
    with tempfile.TemporaryFile("w+") as said:
        process = one.namespace.popen(*command, stdout=said)
        try:
            yield told
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(10)
        said.seek(0)
        text = said.read()
    told.answers += [(float(when), float(trip)) for when, trip in _ANSWER.findall(text)]
    sent, received = map(int, _SUMMARY.findall(text)[0])
    told.sent, told.lost = sent, sent - received


@contextlib.contextmanager
def _busy_node() -> Iterator[Lab]:
    """A node with two pods that talk and many that do not, which may as well share a namespace."""
    with Lab(nodes=1, pods=2) as lab:
        host, inside = lab.nodes[0].namespace.name, lab.nodes[0].pods[0].namespace.name
        idle = range(PODS - 2)
        ip(
            *(
                f"-n {host} link add idle{n} type veth peer name idle{n} netns {inside}"
                for n in idle
            )
        )
        yield lab
