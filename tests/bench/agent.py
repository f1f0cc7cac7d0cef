# SPDX-License-Identifier: Apache-2.0
"""What the agent takes when nothing happens: CPU, memory; and how long its loader takes, which then is gone."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hostint_agent
import hostint_api
from hostint_agent import loader
from tests.bench import measure
from tests.bench.figure import Figure
from tests.bench.measure import Say
from tests.bench.node import bpf_dir
from tests.lab.agent import LabAgent
from tests.lab.topology import Lab

TAKES_S = (8, 40)
_IDLE_S = (2, 20)
_LOADS = (1, 5)
_PODS = 5
_SETTLE_S = 1.0
_COMPILER = ("libbcc", "libLLVM", "libclang")
_OBJECTS = """
apiVersion: hostint.dev/v1alpha1
kind: IntCollector
metadata: {{name: default}}
spec: {{address: {address}, port: 32766}}
---
apiVersion: hostint.dev/v1alpha1
kind: IntWatchlist
metadata: {{name: pods}}
spec:
  rules:
  - {{name: pods, source: {{cidrs: [10.244.0.0/16, 'fd44::/16']}}, bidirectional: true}}
"""
# as in its image: without the hooks of a development environment's site-packages, and without rich, which structlog loads where it is
_AS_IN_IMAGE = """
import sys
sys.path[:0] = {paths!r}
sys.modules["rich"] = None
from hostint_agent.__main__ import main
sys.exit(main())
"""


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    say(f"loading into an empty pin directory, {_LOADS[not quick]} time(s)")
    loads = [_load(number) for number in range(_LOADS[not quick])]
    with Lab(nodes=1, pods=_PODS) as lab:
        objects = _OBJECTS.format(address=lab.collector_address)
        with LabAgent(lab, lab.nodes[0], objects, command=_as_in_image()) as agent:
            time.sleep(_SETTLE_S)
            say(f"an idle agent on a node with {_PODS} pods, for {_IDLE_S[not quick]} s")
            core = _cpu_share(agent.pid, _IDLE_S[not quick])
            processes = family(agent.pid)
            memory = _memory(processes)
            gone = len(processes) == 1 and not any(map(has_compiler, processes))
    return _figures(measure.spread(loads), gone, core, memory)


def _figures(
    loads: measure.Spread, gone: bool, core: float, memory: dict[str, float]
) -> list[Figure]:
    return [
        Figure("idle_agent_cpu", "idle agent, CPU", 100 * core, "% of a core", "<=", 0.3),
        Figure("idle_agent_rss", "idle agent, resident memory", memory["Rss"], "MB", "<=", 30),
        Figure("idle_agent_pss", "idle agent, its part of shared pages", memory["Pss"], "MB"),
        Figure("idle_agent_private", "idle agent, private memory", memory["Private"], "MB"),
        loads.figure(
            "loader_time", "compile, load and pin the programs", "s", compare="<=", goal=1.5
        ),
        Figure("loader_gone", "the compiler is gone afterwards", int(gone), "1: yes", "==", 1),
    ]


def _as_in_image() -> tuple[str, ...]:
    packages = [str(Path(package.__file__).parents[1]) for package in (hostint_agent, hostint_api)]
    paths = [*packages, *(path for path in sys.path if path.endswith("-packages"))]
    return (sys.executable, "-I", "-S", "-c", _AS_IN_IMAGE.format(paths=paths))


def _load(number: int) -> float:
    """Seconds that one load takes, child process and all."""
    pins = Path(f"/sys/fs/bpf/hostint-bench-{os.getpid()}-load{number}")
    pins.mkdir()
    try:
        started = time.monotonic()
        loader.load(pins, bpf_dir())
        return time.monotonic() - started
    finally:
        shutil.rmtree(pins)


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                # the name, in brackets, may hold anything
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def _cpu_share(pid: int, seconds: float) -> float:
    """Part of a core that a process with its descendants takes."""
    started, before = time.monotonic(), cpu_s(pid)
    time.sleep(seconds)
    return (cpu_s(pid) - before) / (time.monotonic() - started)


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process and its descendants: their CPU clocks, which count ns where /proc/PID/stat
    counts ticks of 10 ms. Descendants that ended are in utime and stime of who waited for them.
    """
    return sum(time.clock_gettime(_cpu_clock(member)) for member in family(pid)) + _reaped_s(pid)


def _cpu_clock(pid: int) -> int:
    """clock_getcpuclockid(3): the scheduler's clock of a process."""
    return (~pid << 3) | 2


def _reaped_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")


def _memory(processes: Sequence[int]) -> dict[str, float]:
    """MB of processes together, by kind, from smaps_rollup."""
    total = {"Rss": 0.0, "Pss": 0.0, "Private": 0.0}
    for pid in processes:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split(":")
            for kind in total:
                if name == kind or (kind == "Private" and name.startswith("Private_")):
                    total[kind] += int(value.split()[0]) / 1024
    return total


def has_compiler(pid: int) -> bool:
    """Whether a process has bcc or LLVM mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return any(library in maps for library in _COMPILER)
