# SPDX-License-Identifier: Apache-2.0
"""Two CPUs that fight for one slot: whatever happens, each packet has one outcome, and what is reported is one packet's."""

import ipaddress
import multiprocessing
import os
import shutil
import socket

import pytest

from hostint_agent import attach, loader
from hostint_report import decode
from tests.lab import datapath, traffic
from tests.lab.topology import Lab

pytestmark = pytest.mark.lab
PACKETS = 60_000
PORT = 4000


@pytest.fixture
def one_slot(tmp_path):
    """The programs with a single slot: every packet of every CPU needs the same one."""
    sources = tmp_path / "bpf"
    shutil.copytree(loader.default_bpf_dir(), sources)
    text = (sources / "types.h").read_text()
    fewer = text.replace("#define NR_SLOTS 65536", "#define NR_SLOTS 1")
    assert fewer != text
    (sources / "types.h").write_text(fewer)
    return sources


def flood(pod, cpu: int, address: str) -> None:
    """Send from one CPU: veth forwards on the CPU that sends."""
    os.sched_setaffinity(0, {cpu})
    with pod.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((address, PORT))
        for number in range(PACKETS):
            sender.send(traffic.payload(number))


def collect(node, server, watched) -> list[bytes]:
    """Every report of both pods sending at once, each from a CPU of its own."""
    cpus = sorted(os.sched_getaffinity(0))
    senders = [
        multiprocessing.Process(target=flood, args=(pod, cpus[i % len(cpus)], server.address))
        for i, pod in enumerate(node.pods)
    ]
    for sender in senders:
        sender.start()
    reports = []
    while any(sender.is_alive() for sender in senders):
        reports += watched.drain()
    return reports + watched.drain()


def test_each_packet_has_one_outcome_and_no_report_mixes_two(one_slot):
    with Lab(nodes=2) as lab, datapath.loaded(lab.nodes[0].namespace, one_slot) as watched:
        node, server = lab.nodes[0], lab.nodes[1].pods[0]
        watched.watch([datapath.everything()])
        indexes = {name: node.port(name) for name in ("eth0", "pod0", "pod1")}
        ports = attach.Ports(watched.maps).assign(indexes.values())
        for name in indexes:
            watched.attach(name)
        watched.enable()
        with traffic.udp_sink(server.namespace, server.address, PORT):
            reports = collect(node, server, watched)
        came_by = {pod.address: ports[indexes[pod.interface]] for pod in node.pods}
        seen = 0
        for report in map(decode.decode, reports):
            source = str(ipaddress.ip_address(report.packet[26:30]))
            if source in came_by:
                seen += 1
                assert report.ingress_port == came_by[source]
                assert report.hop_latency < 10**9
        assert seen > 0
        found = watched.identity()
        assert found.watched_difference == 0, found
        assert found.counters["watched"] >= 2 * PACKETS
        # they did fight: without a lost slot nothing was tried here
        assert found.counters["unresolved"] + found.counters["unverified"] > 0, found
