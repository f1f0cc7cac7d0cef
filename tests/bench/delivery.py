# SPDX-License-Identifier: Apache-2.0
"""What a packet pays that a socket takes and nobody watches, against plain forwarding. One CPU.

Most of it is the kernel's for running a cgroup program at all: one that does nothing is measured as well.
"""

import contextlib
import os
import random
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hostint_agent import bpf_calls, classifier, delivery
from tests.bench import generator, measure, rule_sets
from tests.bench.figure import Figure
from tests.bench.measure import Say
from tests.bench.node import Node, node
from tests.lab import compiled, datapath

TAKES_S = (5, 30)
_CGROUP_SKB = 8
_ROUNDS = (6, 40)
_PACKETS = 64 * 1000
_SOURCE = Path(__file__).with_name("socket_loop.c")


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    rounds = _ROUNDS[not quick]
    shuffled = random.Random(1)
    with node() as made, tempfile.TemporaryDirectory() as directory:
        program = compiled.native(_SOURCE, Path(directory) / "socket_loop")
        say(f"a socket with our program, with an empty one, with none: {rounds} rounds")
        plain_ns = _plain_ns(made)
        variants = {"none": contextlib.nullcontext, "empty": _empty, "ours": lambda: _ours(made)}
        values: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(rounds):
            for name in shuffled.sample(list(variants), len(variants)):
                with variants[name]():
                    values[name].append(_socket_ns(made, program))
    added = {
        name: measure.spread([a - b for a, b in zip(values[name], values["none"], strict=True)])
        for name in ("ours", "empty")
    }
    loopback = f"{statistics.median(values['none']):.0f} ns/packet over the loopback interface"
    return [
        added["ours"]
        .scaled(1 / plain_ns)
        .figure(
            "delivery_unwatched",
            "unwatched packet that a socket takes, added / plain forwarding",
            "ratio",
            compare="<=",
            goal=0.02,
            baseline=f"{plain_ns:.0f} ns/packet, plain forwarding",
        ),
        added["ours"].figure(
            "delivery_unwatched_ns",
            "unwatched packet that a socket takes, added",
            "ns/packet",
            baseline=loopback,
        ),
        added["empty"].figure(
            "delivery_empty_ns",
            "cgroup program that does nothing, added",
            "ns/packet",
            baseline=loopback,
        ),
    ]


def _plain_ns(made: Node) -> float:
    sent = generator.traffic(rule_sets.watched(rule_sets.pods_and_services(64), 16))
    variant = measure.plain(sent)
    measure.make_ready(made, variant)
    return statistics.median(measure.checked_run(made, variant, measure.PACKETS) for _ in range(9))


@contextlib.contextmanager
def _attached(program: int) -> Iterator[None]:
    """Attach a program, ours to close, to what all sockets receive."""
    link = delivery.sockets(program, delivery.cgroup_root(datapath.CGROUP_ROOT))
    os.close(program)
    try:
        yield
    finally:
        os.close(link)
        bpf_calls.wait_for_programs()


def _ours(made: Node) -> contextlib.AbstractContextManager[None]:
    """The program that sees packets being taken, with rules that match none of them."""
    made.commit(classifier.compile_rules(rule_sets.pods_and_services(64, seed=2)))
    return _attached(made.datapath.program("deliver"))


def _empty() -> contextlib.AbstractContextManager[None]:
    code = bpf_calls.return_instructions(1)
    return _attached(bpf_calls.prog_load(_CGROUP_SKB, code, "load an empty program"))


def _socket_ns(made: Node, program: Path) -> float:
    pinned = ["taskset", "-c", str(generator.choose_cpus()[0])]
    done = subprocess.run(
        [*made.namespace.command(), *pinned, str(program), str(_PACKETS)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)
