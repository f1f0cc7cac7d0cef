# SPDX-License-Identifier: Apache-2.0
"""What the kernel frees as dropped although it has reached those whom it was for is not called dropped."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from hostint_agent import classifier, kernel
from tests.lab import datapath as datapaths
from tests.lab import deaths, raw_packets, traffic
from tests.lab.deaths import PORT, Stage

pytestmark = pytest.mark.lab
_HOUR_NS = 3600 * 10**9
GROUP = "239.4.4.4"


@pytest.fixture(scope="module", params=["routed", "bridged"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Everything of pods is watched."""
    with deaths.stage(request.param) as built:
        networks = map(classifier.host_network, ("10.244.0.0/16", "fd44::/16"))
        rule = datapaths.everything()
        rule = classifier.Rule(1, 1, rule.action, sources=tuple(networks))
        built.datapath.watch([rule], {1: datapaths.policy(interval_ns=_HOUR_NS)})
        yield built


def no_death(stage: Stage, do: Callable[[], object], count: int) -> None:
    """So many watched packets and more end, none of them as dropped; the accounts balance."""
    names, counters = kernel.drop_reason_names(), stage.datapath.counters
    stage.datapath.drain()
    reasons, before = counters.drops(names), counters.watchlist(1)["watched"]
    do()
    deadline = time.monotonic() + deaths.WAIT_S
    while counters.watchlist(1)["watched"] < before + count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    assert stage.drop_reports() == []
    assert counters.drops(names) == reasons
    identity = stage.datapath.identity()
    assert (identity.watched_difference, identity.drops_difference) == (0, 0)


@pytest.mark.parametrize("version", [4, 6])
def test_the_reply_to_a_ping_of_the_host(stage, version):
    """Who asked reads a clone from a raw socket; the kernel then finds no other socket for the reply."""

    def ping() -> None:
        assert traffic.ping(stage.host, stage.server.ip(version), 3)

    no_death(stage, ping, 3)


@pytest.mark.parametrize("version", [4, 6])
def test_a_frame_for_a_group_that_the_host_is_no_member_of(stage, version):
    """A bridge has given the others a copy; the host throws away its own."""
    here, group = stage.client.ip(version), GROUP if version == 4 else "ff15::4"
    content = raw_packets.udp(here, group, (stage.fresh_port(), PORT), b"hostint-lab")
    packet = raw_packets.packet(here, group, raw_packets.UDP, content)
    mac = "01:00:5e:04:04:04" if version == 4 else "33:33:00:00:00:04"
    no_death(stage, lambda: stage.send_frames([packet] * 5, mac), 5)


def test_a_neighbour_solicitation(stage):
    """It asks for the pod beside (or for no one), by a group address that the host has not joined."""
    inside, target = stage.client.namespace, "fd44:1::77"

    def ask() -> None:
        with inside.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", (target, PORT))

    if stage.lab.mode == "routed":
        inside.run(*f"ip -6 route replace {target} dev eth0".split())
    no_death(stage, ask, 1)
