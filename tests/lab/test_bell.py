# SPDX-License-Identifier: Apache-2.0
"""An exporter that is asleep is woken by the report that it must send, every time, and by no other."""

import os
import random
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from hostint_agent import bpf_calls, bpf_types, exporter
from hostint_agent.node_rules import Destination
from tests.datapath import frames, runner
from tests.lab import datapath as datapaths
from tests.lab.namespace import Namespace, ip

pytestmark = pytest.mark.lab
# longer than any test: only a bell that was rung ends it
NEVER_MS = 600_000
FRAME = frames.ethernet(
    frames.ipv4(b"\x0a\1\0\1", b"\x0a\2\0\1", 17, frames.transport(frames.UDP, 1000, 80))
)


@dataclass
class Station:
    """A datapath of which every packet is reported, its exporter, and who receives."""

    datapath: datapaths.Datapath
    exporter: exporter.Exporter
    receiver: socket.socket
    run: runner.Runner
    host: bytes

    def report(self, count: int = 1) -> None:
        """Have the egress program see packets that the host sent."""
        for _ in range(count):
            self.run.run(FRAME, self.host)

    @property
    def asleep(self) -> list[int]:
        opened = bpf_calls.Map.open(self.datapath.maps / "ring_tails")
        return [bpf_types.RingPosition.from_buffer_copy(each).asleep for each in opened.elements()]

    def wait_asleep(self) -> None:
        deadline = time.monotonic() + 10
        while not all(self.asleep):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def received(self, count: int = 1) -> int:
        """How many came, of so many that are waited for."""
        got = 0
        while got < count:
            try:
                self.receiver.recv(2048)
            except TimeoutError:
                break
            got += 1
        return got


@pytest.fixture
def station(monkeypatch) -> Iterator[Station]:
    monkeypatch.setattr(exporter, "_ASLEEP_MS", NEVER_MS)
    node = Namespace(f"hostint-bell-{os.getpid()}")
    ip(f"netns add {node.name}")
    try:
        with (
            datapaths.loaded(node) as loaded,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        ):
            receiver.bind(("127.0.0.1", 0))
            receiver.settimeout(5)
            loaded.watch([datapaths.everything()])
            loaded.enable()
            sender = exporter.Exporter(loaded.maps, renumber=False)
            port = receiver.getsockname()[1]
            sender.set_destinations({0: Destination("here", "127.0.0.1", port, 0)})
            sender.start()
            run = runner.Runner(loaded.program("egress"))
            try:
                yield Station(loaded, sender, receiver, run, runner.context())
            finally:
                sender.stop()
    finally:
        ip(f"netns del {node.name}")


def test_a_report_wakes_the_exporter_at_once_and_silence_does_not(station):
    for _ in range(20):
        station.wait_asleep()
        begun = time.monotonic()
        station.report()
        assert station.received() == 1
        assert time.monotonic() - begun < 0.5
    station.wait_asleep()
    time.sleep(0.3)
    assert all(station.asleep)
    assert station.exporter.counters() == {0: (20, 0)}


def test_no_moment_of_falling_asleep_loses_a_report(station):
    """Reports at any time after the one before, when the exporter may be about to look, to sleep, or asleep."""
    pick = random.Random(1)
    for number in range(200):
        time.sleep(pick.uniform(0.1, 0.135) if number % 4 else pick.uniform(0, 0.1))
        station.report()
        assert station.received() == 1, number


def test_bursts_out_of_silence_are_sent_whole(station):
    before = station.datapath.counters.watchlist(1)
    for _ in range(5):
        station.wait_asleep()
        burst = 8000
        station.report(burst)
        assert station.received(burst) > 0
    station.wait_asleep()
    after = station.datapath.counters.watchlist(1)
    assert after["ring_full"] == before["ring_full"] == 0
    assert after["reported"] - before["reported"] == 40_000
    assert station.exporter.counters() == {0: (40_000, 0)}


def test_what_rang_while_nobody_was_there_is_forgotten_by_who_comes(station):
    """An exporter that was killed leaves the word that it sleeps: the next report rings once, and the next exporter sends it."""
    station.wait_asleep()
    station.exporter.stop()
    rings = bpf_calls.Map.open(station.datapath.maps / "ring_tails").memory()
    for at in range(8, len(rings), 64):
        rings[at : at + 8] = (1).to_bytes(8, "little")
    station.report(3)
    sender = exporter.Exporter(station.datapath.maps, renumber=False)
    port = station.receiver.getsockname()[1]
    sender.set_destinations({0: Destination("here", "127.0.0.1", port, 0)})
    sender.start()
    try:
        assert station.received(3) == 3
        station.wait_asleep()
        station.report()
        assert station.received() == 1
    finally:
        sender.stop()


def test_once_awake_it_pauses_between_its_looks(station, monkeypatch):
    """What woke it must not keep it from sleeping: reports that go on coming are looked for now and then, not all the time."""
    looks, look = [], station.exporter._round

    def counted() -> tuple[int, list[int]]:
        looks.append(time.monotonic())
        return look()

    monkeypatch.setattr(station.exporter, "_round", counted)
    for wake in (station.report, station.exporter.poke):
        station.wait_asleep()
        looks.clear()
        wake()
        begun = time.monotonic()
        reports = int(wake == station.report)
        while time.monotonic() - begun < 1:
            station.report()
            reports += 1
            time.sleep(0.005)
            station.exporter.poke() if reports == 20 else None
        assert station.received(reports) == reports
        # every 2 ms at most
        assert 10 < len(looks) < 600
