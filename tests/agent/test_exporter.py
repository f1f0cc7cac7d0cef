# SPDX-License-Identifier: Apache-2.0
"""What is in the rings arrives, once, in order and at the right place; what does not is counted."""

import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time

import pytest

from hostint_agent import bpf_types, exporter
from tests.agent.rings import RING_SIZE, Receiver, Rings, closed_destination, eventually, rings

pytestmark = pytest.mark.bpf
SO_NO_CHECK = 11


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def sequence(report: bytes) -> int:
    return struct.unpack("!I", report[4:8])[0]


_MADE: list[tuple[Rings, exporter.Exporter]] = []


def exported(datapath, destinations, **options) -> exporter.Exporter:
    made = exporter.Exporter(datapath.maps, **{"renumber": False, **options})
    made.set_destinations(destinations)
    _MADE.append((datapath, made))
    return made


@pytest.fixture(autouse=True)
def accounts():
    """Reports written = sent + failed + waiting, exactly, after every test here, whatever went wrong in it."""
    _MADE.clear()
    yield
    for datapath, exports in _MADE:
        told = sum(sent + failed for sent, failed in exports.counters().values())
        assert datapath.written == told + sum(exports.fill())


def test_reports_arrive_in_order_and_byte_for_byte():
    with rings() as datapath, Receiver() as receiver:
        sent = [datapath.write(0, 3) for _ in range(100)]
        exports = exported(datapath, {3: receiver.destination})
        assert exports.poll() == 100
        assert receiver.take(100) == sent
        assert exports.counters() == {3: (100, 0)}
        assert exports.fill() == [0, 0]


def test_mixed_lengths_and_collectors_each_go_to_their_own():
    with rings() as datapath, Receiver("a") as one, Receiver("b") as two:
        written = [datapath.write(1, i % 3 % 2, 40 + i % 5) for i in range(90)]
        exported(datapath, {0: one.destination, 1: two.destination}).poll()
        for index, receiver in enumerate((one, two)):
            mine = [r for r in written if struct.unpack("!H", r[2:4])[0] == index]
            assert sorted(receiver.take(len(mine))) == sorted(mine)
            assert receiver.is_empty()


def test_a_batch_goes_over_the_end_of_the_ring():
    with rings() as datapath, Receiver() as receiver:
        datapath.begin_at(0, 10 * RING_SIZE - 7)
        written = [datapath.write(0, 0) for _ in range(20)]
        exports = exported(datapath, {0: receiver.destination})
        assert exports.poll() + exports.poll() == 20
        assert receiver.take(20) == written


def test_the_longest_reports_stay_within_one_datagram_each():
    with rings() as datapath, Receiver() as receiver:
        written = [datapath.write(0, 0, bpf_types.REPORT_BYTES) for _ in range(RING_SIZE)]
        exported(datapath, {0: receiver.destination}).poll()
        assert receiver.take(RING_SIZE) == written


def test_ipv6_collectors_get_reports_too():
    with rings() as datapath, Receiver(address="::1") as receiver:
        written = [datapath.write(0, 0) for _ in range(3)]
        exported(datapath, {0: receiver.destination}).poll()
        assert receiver.take(3) == written


def test_reports_carry_the_dscp():
    with rings() as datapath, Receiver(dscp=46) as receiver:
        datapath.write(0, 0)
        exported(datapath, {0: receiver.destination}).poll()
        _, control, _, _ = receiver.socket.recvmsg(2048, 64)
        assert control[0][2][0] == 46 << 2


def test_without_segmentation_offload_reports_go_one_by_one():
    with rings() as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        first = datapath.write(0, 0)
        exports.poll()
        # the kernel refuses UDP_SEGMENT with EIO on a socket that sends no checksums
        sender = exports._senders[0]
        sender._socket.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        written = [datapath.write(0, 0) for _ in range(30)]
        exports.poll()
        assert receiver.take(31) == [first, *written]
        assert sender._most == [1]
        assert exports.counters() == {0: (31, 0)}


def test_reports_without_a_destination_are_counted_as_failed():
    with rings() as datapath:
        for _ in range(5):
            datapath.write(0, 2)
        exports = exported(datapath, {})
        exports.poll()
        assert exports.counters() == {2: (0, 5)}
        assert exports.fill() == [0, 0]


def test_a_record_without_length_is_counted_as_failed_and_stops_nothing():
    with rings() as datapath, Receiver() as receiver:
        datapath.write(0, 0, 8)
        struct.pack_into("=Q", datapath._iovs, 8, 0)
        good = datapath.write(0, 0)
        exports = exported(datapath, {0: receiver.destination})
        exports.poll()
        assert receiver.take(1) == [good]
        assert exports.counters() == {0: (1, 1)}


def test_every_report_is_counted_when_the_network_refuses():
    with rings() as datapath, Receiver() as receiver:
        forbidden = exporter.Destination(
            "far", "255.255.255.255", 9, 0
        )  # EACCES without SO_BROADCAST
        exports = exported(datapath, {0: forbidden, 1: receiver.destination})
        for index in range(40):
            datapath.write(0, index % 2)
        exports.poll()
        assert exports.counters() == {0: (0, 20), 1: (20, 0)}
        assert exports.health()["far"].reachable is False
        assert exports.health()["here"].reachable is True


def test_a_closed_port_shows_in_health_after_one_report():
    with rings() as datapath:
        closed = closed_destination()
        exports = exported(datapath, {0: closed})
        assert exports.health()["nobody"].reachable
        datapath.write(0, 0)
        exports.poll()
        eventually(lambda: not exports.health()["nobody"].reachable)
        health = exports.health()["nobody"]
        assert health.reason == "PortUnreachable"
        assert health.message == f"127.0.0.1:{closed.port}: port unreachable: nothing listens there"


def test_an_error_of_an_earlier_report_costs_no_other_report():
    with rings() as datapath:
        exports = exported(datapath, {0: closed_destination()})
        for _ in range(10):
            datapath.write(0, 0)
            exports.poll()
        assert exports.counters() == {0: (10, 0)}


def test_a_collector_is_reachable_again_only_when_reports_have_gone_well_for_a_while():
    clock = Clock()
    with rings() as datapath:
        closed = closed_destination()
        exports = exported(datapath, {0: closed}, clock=clock)

        def report() -> None:
            datapath.write(0, 0)
            exports.poll()

        report()
        eventually(lambda: not exports.health()["nobody"].reachable)
        clock.now += 100
        assert not exports.health()["nobody"].reachable, "silence proves nothing"
        listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        listening.bind((closed.address, closed.port))
        report()
        assert exports.health()["nobody"].reachable
        listening.close()


def test_reports_that_wait_go_to_where_their_index_led_when_they_were_written():
    with rings() as datapath, Receiver("old") as old, Receiver("new") as new:
        exports = exported(datapath, {0: old.destination})
        before = [datapath.write(0, 0) for _ in range(4)]
        exports.set_destinations({0: new.destination})
        after = [datapath.write(0, 0) for _ in range(3)]
        exports.poll()
        assert old.take(4) == before
        assert new.take(3) == after
        assert old.is_empty()


def test_late_reports_of_a_removed_collector_still_go_there():
    with rings() as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        exports.set_destinations({})
        written = datapath.write(0, 0)
        exports.poll()
        assert receiver.take(1) == [written]
        assert exports.health() == {}


def test_stop_sends_what_waits():
    with rings() as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        exports.start()
        assert exports.alive
        written = [datapath.write(1, 0) for _ in range(50)]
        exports.stop()
        assert receiver.take(50) == written
        assert not exports.alive


def test_an_exporter_that_was_never_started_sends_what_waits_when_stopped():
    with rings() as datapath, Receiver() as receiver:
        written = [datapath.write(0, 0) for _ in range(RING_SIZE)]
        exported(datapath, {0: receiver.destination}).stop()
        assert receiver.take(RING_SIZE) == written


def test_stop_ends_within_two_seconds_under_traffic_that_does_not_end():
    with rings(1) as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        real, datapath_write = exports._drain, datapath.write

        def drain_and_refill(ring: int, waiting: int) -> int:
            taken = real(ring, waiting)
            datapath_write(ring, 0)
            return taken

        datapath.write(0, 0)
        exports._drain = drain_and_refill
        exports.start()
        began = time.monotonic()
        exports.stop()
        assert time.monotonic() - began < 2
        assert not exports.alive


CHILD = """
    import sys, pathlib, time
    from hostint_agent import exporter
    from hostint_agent.node_rules import Destination
    exports = exporter.Exporter(pathlib.Path(sys.argv[1]), renumber=False)
    exports.set_destinations({0: Destination("here", "127.0.0.1", int(sys.argv[2]), 0)})
    exports.start()
    print("started", flush=True)
    while exports.alive:
        time.sleep(1)
"""


def test_a_killed_exporter_is_followed_without_loss():
    with rings(1) as datapath, Receiver() as receiver:
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(datapath.maps)]
        command.append(str(receiver.destination.port))
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        written = []
        try:
            assert child.stdout
            assert child.stdout.readline() == "started\n"
            for _ in range(2000):
                eventually(lambda: datapath.head(0) - datapath.tail(0) < RING_SIZE - 1)
                written.append(datapath.write(0, 0))
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
        written += [
            datapath.write(0, 0) for _ in range(RING_SIZE - (datapath.head(0) - datapath.tail(0)))
        ]
        next_one = exported(datapath, {0: receiver.destination})
        while next_one.poll():
            pass
        received = []
        while not received or received[-1] != written[-1]:
            received += receiver.take(1)
        assert sorted(set(map(sequence, received))) == list(range(1, len(written) + 1))
        assert len(received) - len(written) <= min(exporter.CHUNK, RING_SIZE)


@pytest.mark.parametrize(
    ("restart", "expected"),
    # five numbers are taken and one report is lost: one number is missing, wherever the process stood
    [(False, [1, 2, 3, 5]), (True, [1, 2, 4, 5])],
    ids=["one-process", "restarted"],
)
def test_rings_that_share_a_hw_id_are_numbered_as_one_and_gaps_stay(restart, expected):
    shared = 32 * bpf_types.RINGS_PER_CPU  # the flow rings of CPU 0 and of CPU 32
    with rings(shared + 1) as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination}, renumber=True)
        datapath.write(0, 0)
        datapath.write(shared, 0)
        exports.poll()
        datapath.lose(shared, 0)
        datapath.write(shared, 0)
        datapath.write(0, 0)
        if restart:
            exports = exported(datapath, {0: receiver.destination}, renumber=True)
        exports.poll()
        assert [sequence(report) for report in receiver.take(4)] == expected


def test_numbering_leaves_the_ring_as_it_was():
    shared = 32 * bpf_types.RINGS_PER_CPU
    with rings(shared + 1) as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination}, renumber=True)
        datapath.write(0, 0)
        written = datapath.write(shared, 0)
        exports.poll()
        index = shared * RING_SIZE
        assert datapath._records.lookup(struct.pack("=I", index))[: len(written)] == written
        assert [sequence(r) for r in receiver.take(2)] == [1, 2]
