# SPDX-License-Identifier: Apache-2.0
"""Pins removed below a running agent come back, and all commands agree on what is loaded."""

import fcntl
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, delivery, loader
from tests.lab import scene as scenes
from tests.lab import traffic
from tests.lab.agent import LabAgent
from tests.lab.scene import Scene

pytestmark = pytest.mark.lab
PODS = scenes.watchlist("protocol: UDP, source: {cidrs: [10.244.0.0/16]}")
WITHIN_S = 10.0
COUNT = 50
_PORTS = itertools.count(7000)


@pytest.fixture(scope="module", params=["tcx", "clsact"])
def scene(request) -> Iterator[Scene]:
    with scenes.scene("routed", 1, "--attach", request.param) as built:
        built.watch(PODS)
        send(built)
        yield built


def send(scene: Scene) -> int:
    """Send from pod to pod; return what is watched in all."""
    client, server = scene.nodes[0].pods
    with traffic.udp_sink(server.namespace, server.address, port := next(_PORTS)):
        traffic.send_udp(client.namespace, server.address, port, count=COUNT)
    return scene.agents[0].settled().counters["watched"]


def command(agent: LabAgent, *words: str) -> subprocess.CompletedProcess[str]:
    where = ["--pin-dir", str(agent.pin_dir), "--state-dir", str(agent.file.parent)]
    where += ["--node", agent.node.namespace.name]
    whole = agent.node.namespace.command(sys.executable, "-m", "hostint_agent", *words, *where)
    return subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)


def remove(directory: Path) -> None:
    """At one moment: the agent pins again within a quarter of a second."""
    aside = directory.with_name(f"{directory.name}-removed")
    directory.rename(aside)
    shutil.rmtree(aside)


def remove_everything(pins: Path) -> None:
    remove(pins)


def remove_build(pins: Path) -> None:
    for build in loader.builds(pins):
        remove(build)


def remove_maps(pins: Path) -> None:
    for build in loader.builds(pins):
        remove(build / "maps")


def remove_program(pins: Path) -> None:
    for build in loader.builds(pins):
        (build / "programs" / "ingress").unlink()


REMOVALS = [remove_everything, remove_build, remove_maps, remove_program]


@pytest.mark.parametrize("remove", REMOVALS, ids=lambda f: f.__name__)
def test_pins_come_back_and_nothing_counted_is_lost(scene, remove):
    agent = scene.agents[0]
    before = send(scene)
    remove(agent.pin_dir)
    wait_for(lambda: whole(agent))
    shown = command(agent, "status", "--json", "--interval", "0")
    assert shown.returncode == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert told["agent_running"]
    assert told["watchlists"][0]["counters"]["watched"] == before
    places = [hook["place"] for each in told["interfaces"] for hook in each["hooks"]]
    assert places
    assert set(places) == {1}
    found = {each["check"]: each for each in json.loads(command(agent, "doctor", "--json").stdout)}
    assert found["datapath"]["result"] == "ok", found["datapath"]
    assert found["interfaces"]["result"] == "ok"
    assert found["delivery"]["result"] == "ok", found["delivery"]
    assert agent.log.read_text().count("pins were removed below the running agent") >= 1
    assert send(scene) == before + COUNT
    # the next process goes on where this one was
    agent.kill()
    agent.start()
    assert send(scene) == before + 2 * COUNT


def test_no_second_agent_starts_once_the_directory_was_removed(scene):
    agent = scene.agents[0]
    remove(agent.pin_dir)
    wait_for(lambda: whole(agent))
    second = command(agent, "standalone", str(agent.file), "--http", "none", "--keep")
    assert second.returncode == 1
    assert "is in use by another hostint-agent" in second.stderr


def test_an_agent_whose_directory_another_has_ends_and_says_why(scene):
    agent = scene.agents[0]
    removed = agent.pin_dir.with_name(f"{agent.pin_dir.name}-removed")
    agent.pin_dir.rename(removed)
    agent.pin_dir.mkdir()
    descriptor = os.open(agent.pin_dir, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        assert agent._process.wait(20) == 1
        assert list(agent.pin_dir.iterdir()) == []
    finally:
        os.close(descriptor)
        agent.pin_dir.rmdir()
        removed.rename(agent.pin_dir)
    words = f"pin directory {agent.pin_dir} was removed, and another hostint-agent works with"
    assert words in agent.log.read_text()
    agent.start()


def whole(agent: LabAgent) -> bool:
    """Return True if everything is pinned that an agent pins."""
    source = loader.read_source(agent.bpf_dir)
    build = agent.pin_dir / source.build
    names = [build / "maps" / name for name in source.maps]
    names += [build / "programs" / name for name in loader.programs()]
    links = agent.pin_dir / "links"
    names += [links / name for name in ("kfree_skb", *delivery.LINK_PINS)]
    if "tcx" in agent.options:
        indexes = agent.node.namespace.inside(socket.if_nameindex)
        watched = [index for index, name in indexes if name in ("eth0", "pod0", "pod1")]
        names += [links / f"tcx-{i}-{hook}" for i in watched for hook in bpf_calls.TCX_TYPE]
    return all(pin.exists() for pin in names)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
