# SPDX-License-Identifier: Apache-2.0
"""What a packet pays that a socket takes and nobody watches, against plain forwarding. One CPU."""

import contextlib
import os
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

TAKES_S = (5, 25)
_ROUNDS = (6, 40)
_PACKETS = 64 * 1000
_SOURCE = Path(__file__).with_name("socket_loop.c")


def run(quick: bool, say: Say) -> list[Figure]:
    """Take the figures."""
    rounds = _ROUNDS[not quick]
    with node() as made, tempfile.TemporaryDirectory() as directory:
        program = compiled.native(_SOURCE, Path(directory) / "socket_loop")
        say(f"a socket with the program and without it: {rounds} rounds")
        plain_ns = _plain_ns(made)
        without, added = [], []
        for number in range(rounds):
            pair = {}
            for attached in (True, False) if number % 2 else (False, True):
                with _attached(made) if attached else contextlib.nullcontext():
                    pair[attached] = _socket_ns(made, program)
            without.append(pair[False])
            added.append(pair[True] - pair[False])
    base = f"{plain_ns:.0f} ns/packet, plain forwarding"
    spread = measure.spread(added)
    return [
        spread.scaled(1 / plain_ns).figure(
            "delivery_unwatched",
            "unwatched packet that a socket takes, added / plain forwarding",
            "ratio",
            compare="<=",
            goal=0.02,
            baseline=base,
        ),
        spread.figure(
            "delivery_unwatched_ns",
            "unwatched packet that a socket takes, added",
            "ns/packet",
            baseline=f"{statistics.median(without):.0f} ns/packet over the loopback interface",
        ),
    ]


def _plain_ns(made: Node) -> float:
    sent = generator.traffic(rule_sets.watched(rule_sets.pods_and_services(64), 16))
    variant = measure.plain(sent)
    measure.make_ready(made, variant)
    return statistics.median(measure.checked_run(made, variant, measure.PACKETS) for _ in range(9))


@contextlib.contextmanager
def _attached(made: Node) -> Iterator[None]:
    """The program that sees packets being taken, with rules that match none of them."""
    made.commit(classifier.compile_rules(rule_sets.pods_and_services(64, seed=2)))
    program = made.datapath.program("deliver")
    link = delivery.sockets(program, delivery.cgroup_root(datapath.CGROUP_ROOT))
    os.close(program)
    try:
        yield
    finally:
        os.close(link)
        bpf_calls.wait_for_programs()


def _socket_ns(made: Node, program: Path) -> float:
    pinned = ["taskset", "-c", str(generator.choose_cpus()[0])]
    done = subprocess.run(
        [*made.namespace.command(), *pinned, str(program), str(_PACKETS)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)
