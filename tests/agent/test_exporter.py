# SPDX-License-Identifier: Apache-2.0
"""What is in the rings arrives, once, in order and at the right place; what does not is counted."""

import collections
import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import hostint_collector.sequence
from hostint_agent import bpf_types, exporter, senders
from tests.agent.exports import Clock, accounts, exported, sequence  # noqa: F401
from tests.agent.rings import RING_SIZE, Receiver, closed_destination, eventually, rings

pytestmark = pytest.mark.bpf
SO_NO_CHECK, SO_MEMINFO = 11, 55


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


POSITIONS = {
    "new": 0,
    "wraps": 10 * RING_SIZE - 30,
    "32 bits": (1 << 32) - 30,
    "64 bits": (1 << 64) - 30,
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
def test_whatever_is_written_arrives_once_unchanged_and_in_order_of_its_like(position, seed):
    random_ = random.Random(seed)
    lengths = random_.choices(range(28, bpf_types.REPORT_BYTES + 1), k=random_.randint(1, 30))
    with rings(3) as datapath, contextlib.ExitStack() as stack:
        receivers = [stack.enter_context(Receiver(str(i))) for i in range(3)]
        exports = exported(datapath, {i: to.destination for i, to in enumerate(receivers)})
        written: list[list[bytes]] = [[], [], []]
        for ring in range(3):
            datapath.begin_at(ring, position)
        for _ in range(6):
            # runs, as flows make them, so that chunks of one kind are among them
            for _ in range(random_.randint(1, 12)):
                ring, to, length = (
                    random_.randrange(3),
                    random_.randrange(3),
                    random_.choice(lengths),
                )
                for _ in range(
                    random_.randint(1, min(40, RING_SIZE - datapath.waiting(ring) or 1))
                ):
                    if datapath.waiting(ring) < RING_SIZE:
                        written[to].append(datapath.write(ring, to, length))
            exports.poll()
        while exports.poll():
            pass
        for to, receiver in enumerate(receivers):
            came = receiver.take(len(written[to]))
            assert by_kind(came) == by_kind(written[to])
            assert receiver.is_empty()


def by_kind(reports: list[bytes]) -> dict[tuple[bytes, int], list[bytes]]:
    """Reports by their ring and length, in order."""
    found = collections.defaultdict(list)
    for report in reports:
        found[report[:2], len(report)].append(report)
    return found


def test_reports_overtake_no_more_than_a_chunk_and_nothing_counts_as_lost():
    random_ = random.Random(1)
    with rings(1, 4096) as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        for _ in range(4000):
            datapath.write(0, 0, random_.choice((94, 106, 156)))
        while exports.poll():
            pass
        tracker = hostint_collector.sequence.SequenceTracker()
        highest = furthest = 0
        for number in map(sequence, receiver.take(4000)):
            tracker.see(number)
            highest = max(highest, number)
            furthest = max(furthest, highest - number)
        assert 0 < furthest < exporter.CHUNK
        assert furthest < hostint_collector.sequence.WINDOW
        counted = (tracker.lost, tracker.duplicates, tracker.restarts)
        assert counted == (0, 0, 0)
        assert tracker.reordered > 0


@pytest.mark.parametrize("collectors", [1, 2])
@pytest.mark.parametrize("gap", [1, 600, 3000])
def test_reports_that_found_no_room_are_told_from_those_that_come_late(gap, collectors):
    random_ = random.Random(2)
    with rings(1, 4096) as datapath, contextlib.ExitStack() as stack:
        receivers = [stack.enter_context(Receiver(str(i))) for i in range(collectors)]
        exports = exported(datapath, {i: to.destination for i, to in enumerate(receivers)})
        for place in range(3000):
            if place in (300, 1500, 1600):
                for _ in range(gap):
                    datapath.lose(0, 0)
            datapath.write(0, place % collectors, random_.choice((94, 106, 156)))
        while exports.poll():
            pass
        for index, receiver in enumerate(receivers):
            tracker = hostint_collector.sequence.SequenceTracker()
            for report in receiver.take(3000 // collectors):
                tracker.see(sequence(report))
            counted = (tracker.lost, tracker.duplicates, tracker.restarts)
            assert counted == (0 if index else 3 * gap, 0, 0)


def test_reports_of_one_length_keep_their_order():
    with rings(1, 4096) as datapath, Receiver() as receiver:
        written = [datapath.write(0, 0) for _ in range(4000)]
        exports = exported(datapath, {0: receiver.destination})
        while exports.poll():
            pass
        assert receiver.take(4000) == written


def test_the_bytes_of_a_ring_are_mapped_when_it_is_first_used():
    size = 512
    with rings(4, size) as datapath, Receiver() as receiver:
        written = datapath.write(1, 0)
        exports = exported(datapath, {0: receiver.destination})
        before = mapped_bytes()
        exports.poll()
        assert mapped_bytes() - before == size * bpf_types.REPORT_BYTES
        datapath.write(1, 0)
        exports.poll()
        assert mapped_bytes() - before == size * bpf_types.REPORT_BYTES
        assert receiver.take(1) == [written]


def mapped_bytes() -> int:
    """How much of BPF maps is mapped in this process."""
    spans = [
        line.split()[0].split("-")
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "bpf-map" in line
    ]
    return sum(int(end, 16) - int(begin, 16) for begin, end in spans)


def test_a_batch_that_is_too_large_for_the_kernel_goes_in_smaller_ones(monkeypatch):
    monkeypatch.setattr(senders, "_BATCHES", (1024, 64, 1))
    with rings(1, 512) as datapath, Receiver() as receiver:
        written = [datapath.write(0, 0) for _ in range(300)]
        exports = exported(datapath, {0: receiver.destination})
        exports.poll()
        assert receiver.take(300) == written
        assert exports._senders[0]._level == 1


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


@pytest.mark.parametrize("count", [1, 100])
def test_ipv6_collectors_get_reports_too(count):
    with rings() as datapath, Receiver(address="::1") as receiver:
        written = [datapath.write(0, 0) for _ in range(count)]
        exported(datapath, {0: receiver.destination}).poll()
        assert receiver.take(count) == written


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


def unreachable(exports: exporter.Exporter) -> bool:
    return not exports.health()["nobody"].reachable


def listening(at: senders.Destination) -> socket.socket:
    """A collector that has come back."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind((at.address, at.port))
    opened.settimeout(5)
    return opened


def test_collector_is_reachable_again_once_a_report_went_well():
    clock = Clock()
    with rings() as datapath:
        closed = closed_destination()
        exports = exported(datapath, {0: closed}, clock=clock)

        def report() -> None:
            datapath.write(0, 0)
            exports.poll()

        report()
        eventually(lambda: unreachable(exports))
        clock.now += 100
        assert unreachable(exports), "silence proves nothing"
        with listening(closed):
            report()
            assert unreachable(exports), "an error may still come"
            clock.now += 5
            assert not unreachable(exports)


def test_collector_stays_unreachable_between_errors_that_are_limited():
    clock = Clock()
    with rings() as datapath:
        closed = closed_destination()
        exports = exported(datapath, {0: closed}, clock=clock)
        datapath.write(0, 0)
        exports.poll()
        eventually(lambda: unreachable(exports))
        with listening(closed):
            for _ in range(9):
                clock.now += 1
                datapath.write(0, 0)
                exports.poll()
                assert unreachable(exports)
        # an error more, and the time begins again
        clock.now += 2
        datapath.write(0, 0)
        exports.poll()
        clock.now += 100
        assert unreachable(exports)


def test_collector_that_is_back_is_found_without_reports():
    clock = Clock()
    with rings() as datapath:
        closed = closed_destination()
        exports = exported(datapath, {0: closed}, clock=clock)
        datapath.write(0, 0)
        exports.poll()
        eventually(lambda: unreachable(exports))
        for _ in range(30):
            clock.now += 1
            exports.recheck()
            time.sleep(0.01)
            assert unreachable(exports), "nothing listens there yet"
        with listening(closed) as back:
            for _ in range(20):
                clock.now += 1
                exports.recheck()
            assert not unreachable(exports)
            assert back.recv(2048) == b""
            clock.now += 1000
            exports.recheck()
            back.settimeout(0.05)
            with pytest.raises(TimeoutError):
                back.recv(2048)
        assert exports.counters() == {0: (1, 0)}


def test_reachable_collector_gets_no_empty_datagrams():
    clock = Clock()
    with rings() as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination}, clock=clock)
        written = datapath.write(0, 0)
        exports.poll()
        for _ in range(100):
            clock.now += 1
            exports.recheck()
        assert receiver.take(1) == [written]
        assert receiver.is_empty()


def test_datagrams_sent_to_a_sender_take_no_memory():
    with rings() as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        datapath.write(0, 0)
        exports.poll()
        sender = exports._senders[0]._socket
        for _ in range(100):
            receiver.socket.sendto(bytes(1000), ("127.0.0.1", sender.getsockname()[1]))
        assert (
            struct.unpack_from("=I", sender.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[0] == 0
        )


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


def test_health_does_not_wait_for_what_is_being_sent():
    with rings() as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        datapath.write(0, 0)
        exports.poll()
        told = []
        with exports._turns.mine():
            asking = threading.Thread(target=lambda: told.append(exports.health()), daemon=True)
            asking.start()
            asking.join(10)
        assert told == [{"here": senders.Health(True, "Sending", told[0]["here"].message)}]


def test_health_of_a_collector_that_was_just_replaced_is_no_error():
    with rings() as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        datapath.write(0, 0)
        exports.poll()
        exports._senders[0].close()
        assert exports.health()["here"].reason == "Idle"


def test_who_waits_for_a_turn_has_it_before_who_asks_again():
    turns, took = exporter._Turns(), []

    def other() -> None:
        with turns.mine():
            took.append("other")

    waiting = threading.Thread(target=other, daemon=True)
    with turns.mine():
        waiting.start()
        eventually(turns._next.locked)
    with turns.mine():
        took.append("again")
    waiting.join(10)
    assert took == ["other", "again"]


@pytest.mark.parametrize(
    ("pause", "fullest", "then"),
    [
        (2, 0, 4),
        (32, 0, 50),
        (50, 0, 50),
        (2, 1, 4),
        (8, 1, 10),
        (50, 1, 10),
        (10, 1025, 5),
        (2, 9000, 2),
    ],
)
def test_the_fuller_a_ring_was_the_sooner_it_is_looked_after(pause, fullest, then):
    assert exporter._next_pause(pause, fullest, 16384) == then


def test_a_report_of_who_did_not_know_yet_that_it_sleeps_is_sent_all_the_same(monkeypatch):
    """A program that read the word just before it was written does not ring."""
    monkeypatch.setattr(exporter, "_ASLEEP_MS", 600_000)
    with rings() as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        say, written = exports._rings.set_asleep, []

        def late(asleep: bool) -> None:
            if asleep and len(written) < 3:
                written.append(datapath.write(1, 0))
            say(asleep)

        monkeypatch.setattr(exports._rings, "set_asleep", late)
        exports.start()
        assert receiver.take(3) == written
        exports.stop()


def test_what_an_older_version_left_is_sent_though_it_has_no_bell():
    with rings() as datapath, Receiver() as receiver:
        (datapath.maps / "bell").unlink()
        written = [datapath.write(0, 0) for _ in range(5)]
        exported(datapath, {0: receiver.destination}).stop()
        assert receiver.take(5) == written


def test_poked_it_looks_at_once(monkeypatch):
    monkeypatch.setattr(exporter, "_ASLEEP_MS", 600_000)
    with rings() as datapath, Receiver() as receiver:
        exports = exported(datapath, {0: receiver.destination})
        exports.start()
        eventually(lambda: all(exports._rings._asleep))
        # it looks once more
        time.sleep(0.1)
        written = [datapath.write(0, 0)]
        exports.poke()
        assert receiver.take(1) == written
        exports.stop()


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


@pytest.mark.parametrize("groups_before", [0, 1])
def test_a_process_that_dies_between_groups_leaves_the_whole_chunk_to_the_next(groups_before):
    with rings(1) as datapath, Receiver() as receiver:
        written = [datapath.write(0, 0, 40 + i % 2) for i in range(20)]
        exports = exported(datapath, {0: receiver.destination})
        real, left = exports._send, [groups_before]

        def die_in_time(*arguments: int) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            real(*arguments)

        exports._send = die_in_time
        with pytest.raises(KeyboardInterrupt):
            exports.poll()
        exported(datapath, {0: receiver.destination}).poll()
        came = receiver.take(20 + 10 * groups_before)
        assert set(came) == set(written)
        # what was sent twice was counted twice
        datapath.written += 10 * groups_before


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


@pytest.mark.parametrize("seed", range(3))
def test_reports_that_share_a_hw_id_are_numbered_without_repetition_and_keep_their_bytes(seed):
    random_ = random.Random(seed)
    cpus = [0, 32 * bpf_types.RINGS_PER_CPU, 1]  # the last one is another hw id
    with rings(cpus[1] + 1) as datapath, contextlib.ExitStack() as stack:
        receivers = [stack.enter_context(Receiver(str(i))) for i in range(2)]
        to = {i: receiver.destination for i, receiver in enumerate(receivers)}
        for ring in cpus:
            datapath.begin_at(ring, 3 * RING_SIZE - 20)
        written: list[list[bytes]] = [[], []]
        taken = collections.Counter()
        for _ in range(4):
            # each time another process, which knows the maps only
            exports = exported(datapath, to, renumber=True)
            for _ in range(random_.randint(1, 70)):
                ring, collector = random_.choice(cpus), random_.randrange(2)
                taken[collector, ring == 1] += 1
                if random_.random() < 0.1:
                    datapath.lose(ring, collector)
                else:
                    report = datapath.write(ring, collector, random_.choice((40, 60)))
                    written[collector].append(report)
            while exports.poll():
                pass
        for collector, receiver in enumerate(receivers):
            came = receiver.take(len(written[collector]))
            unnumbered = sorted(r[:4] + r[8:] for r in written[collector])
            assert sorted(r[:4] + r[8:] for r in came) == unnumbered
            for other in (False, True):
                numbers = [sequence(r) for r in came if (r[:2] == b"\0\1") is other]
                assert len(set(numbers)) == len(numbers)
                assert all(0 < number <= taken[collector, other] for number in numbers)


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
