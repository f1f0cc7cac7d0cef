# SPDX-License-Identifier: Apache-2.0
"""It harms nothing: whatever a packet is, the programs let it go on as it was, and count it as what it is.

HOSTINT_FUZZ_PACKETS=100000000 for a long run; each packet goes through both programs. What a packet is says reference_parser.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from hostint_agent import bpf_calls, bpf_types, classifier, loader
from hostint_report import v05
from tests.datapath import frames, reference_parser, runner
from tests.lab import datapath as datapaths
from tests.lab.namespace import Namespace, ip

PACKETS = int(os.environ.get("HOSTINT_FUZZ_PACKETS", "1000000"))
pytestmark = [pytest.mark.bpf, pytest.mark.timeout(300 + PACKETS // 2000)]
# the verifier gives up at 1,000,000
MOST_INSTRUCTIONS = 700_000
GO_ON = -1
NODE_ID = 1
BATCH = 8000
INTERFACE = "fuzz0"


@pytest.fixture(scope="module")
def namespace():
    name = f"hl{os.getpid()}-fuzz"
    ip(f"netns add {name}", f"-n {name} link add {INTERFACE} type veth peer name fuzz1")
    yield Namespace(name)
    ip(f"netns del {name}")


@pytest.fixture
def datapath(namespace):
    with datapaths.loaded(namespace) as loaded:
        loaded.enable()
        yield loaded


@pytest.fixture
def one_cpu():
    """Stay on one CPU, so that all reports are in one ring, in order."""
    before = os.sched_getaffinity(0)
    cpu = max(before)
    yield cpu
    os.sched_setaffinity(0, before)


@dataclass
class Expected:
    """What the model says of the packets so far."""

    watched: dict[int, int] = field(default_factory=dict)
    not_ip: int = 0
    truncated: int = 0

    def count(self, watchlist: int, times: int) -> None:
        self.watched[watchlist] = self.watched.get(watchlist, 0) + times


def contexts(ifindex: int, ingress_ifindex: int) -> list[bytes]:
    """What may be told of a packet beside its bytes: marks, priorities, what large packets have, words of others."""
    large = ((0, 0, 0), (1448, 3, 60000), (1, 65535, 65535), (65535, 2, 0))
    return [
        runner.context(
            ifindex=ifindex,
            ingress_ifindex=ingress_ifindex,
            mark=value,
            priority=value,
            control_block=value,
            timestamp=value,
            gso_size=size,
            gso_segments=segments,
            wire_length=wire,
        )
        for size, segments, wire in large
        for value in (0, 1, 0x8000, 0xFFFFFFFF)
    ]


def acceptable(frame: bytes) -> bytes:
    """The kernel itself refuses an IP packet without a whole header; behind a tag it does not look."""
    if runner.is_accepted(frame):
        return frame
    return frame[:12] + b"\x81\x00\x20\x07" + frame[12 : runner.MAX_FRAME_BYTES - 4]


class Fuzz:
    """Sends every packet through the programs, and has the model say what that must do."""

    def __init__(
        self,
        datapath: datapaths.Datapath,
        seed: int,
        programs: tuple[str, ...] = ("ingress", "egress"),
    ) -> None:
        self.datapath = datapath
        self._programs = {name: datapath.program(name) for name in programs}
        self._runners = {name: runner.Runner(fd) for name, fd in self._programs.items()}
        self._mill = frames.Mill(seed)

    def close(self) -> None:
        for program in self._programs.values():
            os.close(program)

    def packets(self, count: int) -> Iterator[bytes]:
        for frame in self._mill.frames(count):
            yield acceptable(frame)

    def send(self, frame: bytes, ingress: bytes, egress: bytes) -> None:
        """Through ingress, then egress: each must let it go on and leave it alone."""
        for name, program in self._runners.items():
            given = ingress if name == "ingress" else egress
            verdict = program.run(frame, given)
            assert verdict == GO_ON, (verdict, frame.hex())
            assert program.left_alone(frame, given), frame.hex()


def run(fuzz, namespace, count, judge, ingress_ifindex=0, batch_done=lambda: None) -> None:
    """Send `count` packets; `judge` is told each one after it went."""
    index = namespace.inside(lambda: socket.if_nametoindex(INTERFACE))
    given = list(
        zip(contexts(index, 0), contexts(index, index if ingress_ifindex else 0), strict=True)
    )

    def send_all() -> None:
        for number, frame in enumerate(fuzz.packets(count), start=1):
            ingress, egress = given[number % len(given)]
            fuzz.send(frame, ingress, egress)
            judge(frame)
            if number % BATCH == 0:
                batch_done()

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    namespace.inside(send_all)
    batch_done()


def check_counts(datapath, expected: Expected) -> None:
    """What was counted is what the model says, and it adds up."""
    counted = datapath.counters.datapath()
    assert (counted["not_ip"], counted["truncated"]) == (expected.not_ip, expected.truncated)
    for watchlist, watched in expected.watched.items():
        identity = datapath.identity(watchlist)
        assert identity.counters["watched"] == watched, (watchlist, identity)
        assert identity.watched_difference == 0, (watchlist, identity)
        assert identity.drops_difference == 0, (watchlist, identity)


class Reports:
    """Decodes what is in the rings, and holds it against what was sent."""

    def __init__(self, datapath: datapaths.Datapath, cpu: int) -> None:
        self._datapath = datapath
        self._cpu = cpu
        self.count = 0
        self.due: list[bytes] = []

    def take(self, every_one: bool) -> None:
        """Each report shows the packet that it is due for; with `every_one`, each packet that is due has its report."""
        waiting = iter(self.due)
        for data in self._datapath.drain():
            report = v05.decode(data)
            self.count += 1
            assert (report.hw_id, report.sequence, report.switch_id) == (
                self._cpu,
                self.count,
                NODE_ID,
            )
            assert (report.flow, report.queue) == (True, False)
            for frame in waiting:
                if frame[: bpf_types.SNAP_BYTES] == report.packet:
                    break
                assert not every_one, (frame.hex(), report)
            else:
                raise AssertionError(f"a report of no packet: {report}")
        assert not (every_one and list(waiting))
        self.due = []


def net(text: str) -> classifier.Network:
    return ipaddress.ip_network(text)


def rule(number: int, watchlist: int, action=bpf_types.RuleAction.REPORT, **fields):
    return classifier.Rule(number, watchlist, action, **fields)


# some packets match and others do not; a watchlist each for what a watchlist may ask
SOME = [
    rule(1, 1, sources=(net("10.0.0.0/23"), net("fd00::/17")), destination_ports=((80, 80),)),
    rule(2, 0, bpf_types.RuleAction.IGNORE, destinations=(net("10.9.1.0/24"), net("2001::/16"))),
    rule(3, 2, protocol=frames.TCP, source_ports=((1024, 65535),), destination_ports=((0, 1023),)),
    rule(4, 3, protocol=frames.UDP, destinations=(net("10.1.0.0/16"), net("fd01::/16"))),
    rule(5, 4, protocol=frames.SCTP),
    rule(6, 5, sources=(net("10.0.1.0/29"), net("fd01::/120")), destinations=(net("10.0.0.0/9"),)),
    rule(7, 6, protocol=frames.ICMPV6, sources=(net("::/0"),)),
    rule(8, 6, sources=(net("fd00::/16"),), destinations=(net("fd00::/16"),)),
    rule(9, 6, sources=(net("0.0.0.0/0"),), destinations=(net("10.0.0.4/32"),)),
]
HOUR_NS = 3600 * 10**9
POLICIES = {
    1: datapaths.policy(),
    2: datapaths.policy(interval_ns=HOUR_NS),
    3: datapaths.policy(sample=3),
    4: datapaths.policy(events=bpf_types.ReportEvent.DROP),
    5: datapaths.policy(collector=1),
    6: datapaths.policy(interval_ns=1000, latency_change_ns=1, congestion_latency_ns=1),
}
COLLECTORS = {
    0: bpf_types.Collector(snap_length=bpf_types.SNAP_BYTES),
    1: bpf_types.Collector(snap_length=34, reports_per_second=50),
}


def test_the_verifier_is_far_from_giving_up_on_any_program(datapath):
    for name in loader.PROGRAMS:
        opened = datapath.program(name)
        walked = bpf_calls.program_info(opened).verified_instructions
        os.close(opened)
        assert 0 < walked < MOST_INSTRUCTIONS, name


def test_packets_that_come_and_leave_are_left_alone_and_reported_as_they_were(
    namespace, datapath, one_cpu
):
    """Egress knows the packet by the address of its skb and its fingerprint: one observation a packet."""
    datapath.watch([datapaths.everything()])
    fuzz, expected = Fuzz(datapath, 1), Expected()
    reports = Reports(datapath, one_cpu)

    def judge(frame: bytes) -> None:
        packet = reference_parser.parse(frame)
        if packet is reference_parser.NOT_IP:
            expected.not_ip += 1
        elif packet is reference_parser.TRUNCATED:
            expected.truncated += 1
        else:
            expected.count(1, 1)
            reports.due.append(frame)

    count = PACKETS * 6 // 10
    run(fuzz, namespace, count, judge, ingress_ifindex=1, batch_done=lambda: reports.take(False))
    fuzz.close()
    check_counts(datapath, expected)
    found = datapath.identity().counters
    assert found["reported"] == reports.count
    # the kernel gives the memory of one test run to the next, seldom to another packet in between
    assert reports.count > expected.watched[1] * 0.9
    assert found["watched"] > count // 4
    assert min(expected.not_ip, expected.truncated) > count // 100


def test_packets_of_the_host_itself_are_left_alone_and_each_has_its_report(
    namespace, datapath, one_cpu
):
    """They have the memory of those before them, and some are like those in every byte: every single report is due."""
    datapath.watch([datapaths.everything()])
    fuzz, expected = Fuzz(datapath, 2, ("egress",)), Expected()
    reports = Reports(datapath, one_cpu)

    def judge(frame: bytes) -> None:
        if not isinstance(reference_parser.parse(frame), str):
            expected.count(1, 1)
            reports.due.append(frame)

    run(fuzz, namespace, max(60_000, PACKETS // 10), judge, batch_done=lambda: reports.take(True))
    fuzz.close()
    identity = datapath.identity()
    assert identity.counters["watched"] == expected.watched[1]
    assert identity.watched_difference == 0, identity
    assert identity.counters["reported"] == reports.count == expected.watched[1]


@pytest.mark.usefixtures("one_cpu")
def test_rules_take_the_packets_that_they_say_and_every_one_is_accounted_for(namespace, datapath):
    datapath.watch(SOME, POLICIES, COLLECTORS)
    first_match = reference_parser.matcher(SOME)
    expected = Expected()
    unmatched = 0

    def judge(frame: bytes) -> None:
        nonlocal unmatched
        packet = reference_parser.parse(frame)
        if packet is reference_parser.NOT_IP:
            expected.not_ip += coming
        elif packet is reference_parser.TRUNCATED:
            expected.truncated += coming
        else:
            taken = first_match(packet)
            if taken and taken.action == bpf_types.RuleAction.REPORT:
                expected.count(taken.watchlist, 1)
            else:
                unmatched += 1

    def decode() -> None:
        for data in datapath.drain():
            v05.decode(data)

    # once as they come, and once as if the host had sent them
    for coming, program in ((True, "ingress"), (False, "egress")):
        fuzz = Fuzz(datapath, 3, (program,))
        run(fuzz, namespace, PACKETS * 3 // 20, judge, batch_done=decode)
        fuzz.close()
    check_counts(datapath, expected)
    assert set(expected.watched) == set(POLICIES)
    assert unmatched > 1000
    found = {watchlist: datapath.identity(watchlist).counters for watchlist in POLICIES}
    outcomes = {2: "suppressed", 3: "sampled_out", 4: "not_asked", 5: "rate_limited"}
    for watchlist, outcome in outcomes.items():
        assert found[watchlist][outcome] > 0, (watchlist, found[watchlist])
    assert datapath.counters.datapath()["snapshot_failed"] == 0


@pytest.mark.usefixtures("one_cpu")
def test_unwatched_packet_ends_whoever_had_its_address(namespace, datapath):
    """A packet whose end was not seen waits in its slot until another has its address, watched or not."""
    rounds = 50
    ends = (net("10.0.0.1/32"),), (net("10.0.0.2/32"),)
    datapath.watch([rule(1, 1, sources=ends[0], destinations=ends[1])])
    segment = frames.transport(frames.UDP, 1000, 2000)
    watched, unwatched = (
        frames.ethernet(
            frames.ipv4(bytes([10, 0, 0, a]), bytes([10, 0, 0, b]), frames.UDP, segment)
        )
        for a, b in ((1, 2), (3, 4))
    )
    waiting = []

    def send() -> None:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        ingress = datapath.program("ingress")
        program = runner.Runner(ingress)
        given = runner.context(ifindex=socket.if_nametoindex(INTERFACE))
        for _ in range(rounds):
            program.run(watched, given)
            program.run(unwatched, given)
            waiting.append(datapath.identity().pending)
        os.close(ingress)

    namespace.inside(send)
    identity = datapath.identity()
    assert identity.watched_difference == 0
    assert identity.counters["watched"] == rounds
    # the kernel gives the memory of one test run to the next, if to no other packet in between
    assert waiting.count(0) > 0
