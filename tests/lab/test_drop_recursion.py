# SPDX-License-Identifier: Apache-2.0
"""The kernel does not run the drop program within itself: a death in an interrupt of the program is missed, and counted.

That takes drops in a task (whose program run is what gets interrupted) and drops of packets that another CPU hands over: two CPUs.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from hostint_agent import bpf_calls, bpf_types, classifier
from tests.lab import datapath as datapaths
from tests.lab import deaths
from tests.lab.deaths import Stage
from tests.lab.delivery import Delivery

pytestmark = pytest.mark.lab
FIRST_CPU, LAST_CPU = sorted(os.sched_getaffinity(0))[0], sorted(os.sched_getaffinity(0))[-1]
WASTE_PORT = 9
_HOUR_NS = 3600 * 10**9


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with deaths.stage("routed") as built:
        rule = classifier.Rule(
            1,
            1,
            bpf_types.RuleAction.REPORT,
            protocol=17,
            sources=(classifier.host_network(built.client.address),),
            destination_ports=((WASTE_PORT, WASTE_PORT),),
        )
        built.datapath.watch([rule], {1: datapaths.policy(interval_ns=_HOUR_NS)})
        yield built


@pytest.fixture(scope="module")
def delivery(tmp_path_factory: pytest.TempPathFactory) -> Delivery:
    return Delivery(tmp_path_factory.mktemp("delivery"))


def steer(stage: Stage, interface: str, cpu: int) -> None:
    """Have packets of an interface handled by one CPU (RPS), whichever receives them."""
    queue = f"/sys/class/net/{interface}/queues/rx-0/rps_cpus"
    script = f"mount -t sysfs sysfs /sys && echo {1 << cpu:x} > {queue}"
    stage.host.run("unshare", "--mount", "sh", "-c", script)


def misses(fd: int) -> int:
    return bpf_calls.program_info(fd).recursion_misses


def told_by_bpftool(fd: int) -> int:
    """The same by another reader of the same struct."""
    shown = subprocess.run(
        ["bpftool", "--json", "prog", "show", "id", str(bpf_calls.program_id(fd))],
        capture_output=True,
        check=True,
    )
    return int(json.loads(shown.stdout).get("recursion_misses", 0))


def test_a_death_within_the_drop_program_is_missed_but_not_lost_silently(stage, delivery):
    """What the client sends dies on the last CPU, where a task's own packets die all the time."""
    assert FIRST_CPU != LAST_CPU, "this takes two CPUs"
    steer(stage, stage.client.interface, LAST_CPU)
    fd = stage.datapath.program("drop")
    refused = f"udp dport {WASTE_PORT} drop"
    client, host = stage.client.namespace, stage.host
    try:
        with (
            stage.nft("hook prerouting priority -300", refused),
            stage.nft("hook output priority 0", refused, "ip"),
            delivery.wasting(host, stage.far.address, cpu=LAST_CPU),
            delivery.wasting(client, stage.far.address, cpu=FIRST_CPU),
        ):
            deadline = time.monotonic() + 60
            while not misses(fd) or not missed(stage):
                assert time.monotonic() < deadline, "the program was never interrupted by itself"
                time.sleep(0.1)
        before = misses(fd)
        assert before <= told_by_bpftool(fd) <= misses(fd)
    finally:
        os.close(fd)
    identity = settled(stage)
    assert (identity.watched_difference, identity.drops_difference) == (0, 0)
    found = identity.counters
    assert found["watched"] == found["dropped"] + found["unresolved"] + identity.pending


def missed(stage: Stage) -> int:
    """Watched packets that died unseen."""
    return stage.datapath.counters.watchlist(1)["unresolved"]


def settled(stage: Stage) -> datapaths.counters.Identity:
    """The identity once packets that were still under way have ended."""
    deadline = time.monotonic() + deaths.WAIT_S
    while time.monotonic() < deadline:
        found = stage.datapath.identity()
        if not found.watched_difference:
            break
        time.sleep(0.05)
    return found


def test_a_program_that_nobody_interrupts_misses_nothing():
    fd = deaths.shooting_program()
    try:
        assert misses(fd) == told_by_bpftool(fd) == 0
    finally:
        os.close(fd)
