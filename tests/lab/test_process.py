# SPDX-License-Identifier: Apache-2.0
"""An agent on a node whose address changes, and whose ports pods and others reach."""

import contextlib
import http.client
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import scene as scenes
from tests.lab import traffic
from tests.lab.namespace import Namespace

pytestmark = pytest.mark.lab
PORT, HEALTH = 9464, 9465
OPTIONS = ("--http", f"[::]:{PORT}", "--health", f"127.0.0.1:{HEALTH}")
PODS = "protocol: UDP, source: {cidrs: [10.244.0.0/16]}"
# a thousand clients that say nothing, a byte a second, or do not read
CLIENTS = """
    import resource, socket, sys, time
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    clients = [socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) for _ in range(1000)]
    for number, client in enumerate(clients):
        if number % 3 == 0:
            client.send(b"GET /api/v1/topology HTTP/1.1\\r\\n\\r\\n" * (number % 2))
    print("connected", flush=True)
    while True:
        for number, client in enumerate(clients):
            if number % 3 == 1:
                try:
                    client.send(b"G")
                except OSError:
                    pass
        time.sleep(1)
"""


@pytest.fixture
def scene():
    with scenes.scene("routed", 1, *OPTIONS) as built:
        yield built


@contextlib.contextmanager
def slow_clients(end: Namespace, address: str) -> Iterator[None]:
    command = [sys.executable, "-c", textwrap.dedent(CLIENTS), address, str(PORT)]
    with end.popen(*command, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout.readline() == "connected\n"
            yield
        finally:
            child.kill()


def get(end: Namespace, address: str, path: str, port: int = PORT) -> tuple[int, float]:
    """The status of an answer, and how long it took."""

    def ask() -> int:
        connection = http.client.HTTPConnection(address, port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().status

    begun = time.monotonic()
    return end.inside(ask), time.monotonic() - begun


def memory_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmRSS")]
    return int(line.split()[1])


def test_probes_are_answered_beside_slow_clients_of_pods_and_others(scene):
    node, agent = scene.nodes[0], scene.agents[0]
    pod, outside = node.pods[0].namespace, scene.lab.collector
    before = memory_kb(agent.pid)
    with slow_clients(pod, node.address), slow_clients(outside, node.address):
        for _ in range(5):
            for port in (PORT, HEALTH):
                status, took_s = get(node.namespace, "127.0.0.1", "/readyz", port)
                assert (status, took_s < 1) == (200, True)
            status, took_s = get(outside, node.address, "/healthz")
            assert (status, took_s < 1) == (200, True)
            time.sleep(0.5)
        assert memory_kb(agent.pid) - before < 10_000


def test_metrics_are_not_for_pods(scene):
    node = scene.nodes[0]
    pod = node.pods[0].namespace
    for path in ("/metrics", "/api/v1/topology"):
        for address in (node.address, node.address6):
            assert get(pod, address, path)[0] == 403
            assert get(node.namespace, address, path)[0] == 200
    with pytest.raises(OSError):
        get(pod, node.address, "/healthz", HEALTH)


def test_reports_come_from_the_new_address_of_a_node(scene):
    node = scene.nodes[0]
    client, server = node.pods
    scene.watch(scenes.watchlist(PODS))

    def sources(port: int) -> set[str]:
        traffic.send_udp(client.namespace, server.address, port)
        return {r["source"] for r in scene.wait_reports(node, destinationPort=port)}

    with traffic.udp_sink(server.namespace, server.address, 5001):
        assert sources(5001) == {node.address}
    node.namespace.run("ip", "addr", "del", f"{node.address}/24", "dev", "eth0")
    node.namespace.run("ip", "addr", "add", "10.99.0.77/24", "dev", "eth0")
    with traffic.udp_sink(server.namespace, server.address, 5002):
        assert sources(5002) == {"10.99.0.77"}
    failed = 'hostint_reports_failed_total{collector="default"} 0.0'
    assert failed in scene.agents[0].get("/metrics").splitlines()
