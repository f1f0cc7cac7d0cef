# SPDX-License-Identifier: Apache-2.0
"""The agent comes and goes; the node's traffic, and what others attached, stay."""

import os
import random
import time

import pytest

from hostint_agent import bpf_calls
from tests.lab import scene as scenes
from tests.lab import traffic
from tests.lab.agent import LabAgent
from tests.lab.topology import Lab

pytestmark = pytest.mark.lab
PODS = scenes.watchlist("protocol: UDP, destination: {cidrs: [10.244.0.0/16]}")


def send(scene, port: int, **more) -> int:
    client, server = scene.pods()
    with traffic.udp_sink(server.namespace, server.address, port):
        return traffic.send_udp(client.namespace, server.address, port, **more)


def test_what_happens_while_the_agent_is_dead_is_reported_when_it_is_back():
    with scenes.scene("routed") as scene:
        scene.watch(PODS)
        agent = scene.agents[0]
        agent.kill()
        port = send(scene, 5000)
        assert scene.wait_reports(scene.nodes[1], sourcePort=port)
        assert not scene.reports(scene.nodes[0], sourcePort=port)
        agent.start()
        assert scene.wait_reports(scene.nodes[0], sourcePort=port)
        assert agent.settled().watched_difference == 0
        assert scene.collector.lost == 0


def test_without_tcx_the_agent_uses_clsact_and_nothing_else_changes():
    with scenes.scene("routed", 2, "--attach", "clsact") as scene:
        node = scene.nodes[0]
        shown = node.namespace.run("tc", "filter", "show", "dev", "eth0", "ingress")
        assert "hostint" in shown
        scene.watch(PODS)
        port = send(scene, 5000)
        for one in scene.nodes:
            assert scene.wait_reports(one, sourcePort=port)


def test_a_filter_that_somebody_flushed_is_back_within_seconds():
    with scenes.scene("routed", 1, "--attach", "clsact") as scene:
        host = scene.nodes[0].namespace
        host.run("tc", "qdisc", "del", "dev", "eth0", "clsact")
        traffic_free = [
            lambda: "hostint" in host.run("tc", "filter", "show", "dev", "eth0", d, check=False)
            for d in ("ingress", "egress")
        ]
        deadline = time.monotonic() + 5
        while not all(check() for check in traffic_free):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_unload_leaves_what_others_attached():
    with Lab(nodes=1) as lab:
        node = lab.nodes[0]
        host = node.namespace
        objects = scenes.COLLECTOR.format(address=lab.collector_address, port=9) + scenes.NOTHING
        agent = LabAgent(lab, node, objects, "--attach", "clsact").start()
        pinned = str(agent.maps.parent / "programs" / "egress")
        other = (
            f"tc filter add dev eth0 ingress pref 8 handle 0x7 bpf direct-action pinned {pinned}"
        )
        host.run(*other.split())
        shown = host.run("tc", "filter", "show", "dev", "eth0", "ingress")
        assert "pref 8" in shown
        assert "hostint" in shown
        agent.remove()
        left = host.run("tc", "filter", "show", "dev", "eth0", "ingress")
        assert "pref 8" in left
        assert "hostint" not in left
        assert not agent.pin_dir.exists()


def test_our_program_is_first_in_order_and_is_so_again_after_another_came_before_it():
    with scenes.scene("routed", 1) as scene:
        node = scene.nodes[0]
        index = node.port("eth0")
        agent = scene.agents[0]
        program = bpf_calls.obj_get(agent.maps.parent / "programs" / "ingress")
        ours = bpf_calls.program_id(program)
        other = bpf_calls.obj_get(agent.maps.parent / "programs" / "egress")

        def order() -> list[int]:
            return node.namespace.inside(
                lambda: bpf_calls.tcx_program_ids(index, bpf_calls.TCX_INGRESS)
            )

        assert order()[0] == ours
        link = node.namespace.inside(
            lambda: bpf_calls.tcx_link_create(other, index, bpf_calls.TCX_INGRESS)
        )
        deadline = time.monotonic() + 5
        while order()[0] != ours:
            assert time.monotonic() < deadline, order()
            time.sleep(0.05)
        assert len(order()) == 2
        os.close(link)


def test_every_verdict_is_to_go_on_whatever_the_packet():
    """The programs as they run, on frames of every length and on noise: never a verdict, never a changed byte."""
    with scenes.scene("routed", 1) as scene:
        scene.watch(scenes.watchlist("source: {cidrs: [0.0.0.0/0, '::/0']}", "interval: 10ms"))
        pick = random.Random(1)
        whole = bytes.fromhex(
            "020000000001020000000002080045000054000040004006f70a0a0000010a000002"
            "1f9000500000000000000000500200000000" + "00" * 60
        )
        frames = [whole[:length] for length in range(34, len(whole))]
        frames += [pick.randbytes(pick.randint(34, 300)) for _ in range(3000)]
        for name in ("ingress", "egress"):
            program = bpf_calls.obj_get(scene.agents[0].maps.parent / "programs" / name)
            for frame in frames:
                verdict, after, _ = bpf_calls.test_run(program, frame)
                assert verdict == -1
                assert after == frame
