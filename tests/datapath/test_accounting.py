# SPDX-License-Identifier: Apache-2.0
"""Nothing is lost silently: every outcome that a watched packet can have is forced, and counted exactly."""

import ctypes
import math
import os
import socket
import struct
import threading
import time
from collections import Counter

import pytest

from hostint_agent import bpf_calls, bpf_types, classifier, counters, loader
from hostint_report import v05
from tests.datapath import bench as benches
from tests.datapath import frames, runner
from tests.lab import datapath as datapaths
from tests.lab.namespace import Namespace, ip

pytestmark = pytest.mark.lab
RING_RECORDS = loader.ring_records(bpf_calls.possible_cpus())
FLOW, DROP = bpf_types.RingKind.FLOW, bpf_types.RingKind.DROP
HOUR = {"interval_ns": benches.HOUR_NS}
NOBODY = {"sample": benches.NEVER_SAMPLED}


@pytest.fixture(scope="module")
def routed():
    with benches.bench() as built:
        yield built


@pytest.fixture(scope="module")
def bridged():
    with benches.bench("bridged") as built:
        yield built


@pytest.fixture
def firewall(routed):
    """Drops UDP to a port in the forward chain."""
    host = routed.node.namespace

    def drop(port: int | str) -> None:
        host.run("nft", "add", "table", "inet", "test")
        host.run("nft", "add chain inet test forward { type filter hook forward priority 0; }")
        host.run("nft", f"add rule inet test forward udp dport {port} drop")

    yield drop
    host.run("nft", "delete", "table", "inet", "test", check=False)


def watch_port(bench, **policy) -> tuple[int, int]:
    """Watch UDP to a port of its own; (watchlist, port)."""
    watchlist, port = bench.number(), bench.port()
    bench.datapath.drain()
    bench.datapath.watch([benches.udp_to(watchlist, port)], {watchlist: datapaths.policy(**policy)})
    return watchlist, port


def server(bench, port: int) -> benches.Destination:
    return lambda number: (bench.server.address, port)


def ring(cpu: int, kind: bpf_types.RingKind) -> int:
    return cpu * bpf_types.RINGS_PER_CPU + kind


@pytest.mark.parametrize(
    ("policy", "outcome"),
    [
        ({}, {"reported": 500}),
        (HOUR, {"reported": 1, "suppressed": 499}),
        (NOBODY, {"sampled_out": 500}),
        ({"events": bpf_types.ReportEvent.DROP}, {"not_asked": 500}),
        # a queue report is asked for, and no packet waits so long
        (
            {"events": bpf_types.ReportEvent.QUEUE, "congestion_latency_ns": benches.HOUR_NS},
            {"suppressed": 500},
        ),
    ],
    ids=["reported", "suppressed", "sampled_out", "not_asked", "not_congested"],
)
def test_a_forwarded_packet_has_exactly_one_outcome(routed, policy, outcome):
    watchlist, port = watch_port(routed, **policy)
    benches.Sender(routed, watchlist).send(500, server(routed, port))
    assert routed.outcome(watchlist, 500) == outcome
    assert len(routed.datapath.drain()) == outcome.get("reported", 0)


@pytest.mark.parametrize(
    ("policy", "outcome"),
    [
        ({}, {"drops_reported": 300}),
        (HOUR, {"drops_reported": 1, "drops_suppressed": 299}),
        (NOBODY, {"drops_sampled_out": 300}),
        ({"events": bpf_types.ReportEvent.FLOW}, {"drops_not_asked": 300}),
    ],
    ids=["reported", "suppressed", "sampled_out", "not_asked"],
)
def test_a_dropped_packet_has_exactly_one_outcome(routed, firewall, policy, outcome):
    watchlist, port = watch_port(routed, **policy)
    firewall(port)
    benches.Sender(routed, watchlist).send(300, server(routed, port))
    assert routed.outcome(watchlist, 300) == {"dropped": 300, **outcome}
    assert len(routed.datapath.drain()) == outcome.get("drops_reported", 0)


def test_a_full_ring_loses_what_it_counts_and_the_gap_shows_how_much(routed):
    """Both CPUs, each its own ring; nobody drains."""
    beyond = 700
    watchlist, port = watch_port(routed)
    rings = [ring(cpu, FLOW) for cpu in benches.CPUS]
    numbers, heads = map(routed.sequence, rings), map(routed.head, rings)
    before = list(zip(numbers, heads, strict=True))
    sender = benches.Sender(routed, watchlist)
    sender.send_on_each_cpu(RING_RECORDS + beyond, server(routed, port))
    sent = len(rings) * (RING_RECORDS + beyond)
    outcome = {"reported": len(rings) * RING_RECORDS, "ring_full": len(rings) * beyond}
    assert routed.outcome(watchlist, sent) == outcome
    for one, (number, head) in zip(rings, before, strict=True):
        assert routed.head(one) - head == RING_RECORDS
        assert routed.sequence(one) - number == RING_RECORDS + beyond
    seen = sequences(routed.datapath.drain())
    for cpu, (number, _) in zip(benches.CPUS, before, strict=True):
        assert seen.pop(cpu) == list(range(number + 1, number + RING_RECORDS + 1))
    assert not seen
    sender.send_on_each_cpu(1, server(routed, port))
    routed.settled(watchlist, sent + len(rings))
    seen = sequences(routed.datapath.drain())
    for cpu, (number, _) in zip(benches.CPUS, before, strict=True):
        assert seen.pop(cpu) == [number + RING_RECORDS + beyond + 1]


def sequences(reports: list[bytes]) -> dict[int, list[int]]:
    """Sequence numbers of reports by hw id, as they came."""
    found: dict[int, list[int]] = {}
    for data in reports:
        report = v05.decode(data)
        found.setdefault(report.hw_id, []).append(report.sequence)
    return found


def test_a_full_ring_of_drop_reports_counts_its_own_losses(routed, firewall):
    beyond = 300
    watchlist, port = watch_port(routed)
    firewall(port)
    one = ring(benches.CPUS[0], DROP)
    number, head = routed.sequence(one), routed.head(one)
    sent = RING_RECORDS + beyond
    benches.Sender(routed, watchlist).send(sent, server(routed, port))
    outcome = {"dropped": sent, "drops_reported": RING_RECORDS, "drops_ring_full": beyond}
    assert routed.outcome(watchlist, sent) == outcome
    assert routed.head(one) - head == RING_RECORDS
    assert routed.sequence(one) - number == sent
    seen = sequences(routed.datapath.drain())
    assert seen == {32 + benches.CPUS[0]: list(range(number + 1, number + RING_RECORDS + 1))}


@pytest.mark.parametrize("dies", [False, True], ids=["flow", "drop"])
def test_a_rate_limit_holds_on_all_cpus_together_and_takes_no_sequence_numbers(
    routed, firewall, dies
):
    # of its own: all packets may fall into one window, and another case may have used that up
    limited = 3 + dies
    watchlist, port = routed.number(), routed.port()
    routed.datapath.drain()
    routed.datapath.watch(
        [benches.udp_to(watchlist, port)],
        {watchlist: datapaths.policy(collector=limited)},
        {limited: bpf_types.Collector(snap_length=64, reports_per_second=400)},
    )
    if dies:
        firewall(port)
    rings = [ring(cpu, DROP if dies else FLOW) for cpu in benches.CPUS]
    before = sum(routed.sequence(one, limited) for one in rings)
    started = time.monotonic()
    benches.Sender(routed, watchlist).send_on_each_cpu(4000, server(routed, port))
    # those that the time from the first packet to the last can touch
    windows = int((time.monotonic() - started) / 0.1) + 2
    sent = 4000 * len(rings)
    outcome = routed.outcome(watchlist, sent)
    reports = routed.datapath.drain()
    prefix = "drops_" if dies else ""
    assert 40 <= len(reports) <= 40 * windows, outcome
    assert outcome[f"{prefix}reported"] == len(reports)
    assert outcome[f"{prefix}rate_limited"] == sent - len(reports)
    assert outcome.get("dropped", 0) == (sent if dies else 0)
    assert sum(routed.sequence(one, limited) for one in rings) - before == len(reports)
    assert {len(data) for data in reports} == {(24 if dies else 28) + 58}
    if not dies:
        offset_ns = routed.datapath.config._config.wall_offset_ns
        assert max(Counter(window_of(each, offset_ns) for each in reports).values()) == 40


def window_of(report: bytes, wall_offset_ns: int) -> int:
    """Number of the 100 ms in which a flow report was made; of the time only the low half is in the report."""
    decoded = v05.decode(report)
    assert isinstance(decoded, v05.LocalReport)
    now = time.monotonic_ns()
    made = decoded.egress_timestamp - wall_offset_ns
    return (now - ((now - made) & 0xFFFFFFFF)) // 100_000_000


class HostSender:
    """Has the egress program see packets as if the host had sent them: the cheapest way to very many flows."""

    def __init__(self, datapath: datapaths.Datapath) -> None:
        self._datapath = datapath
        self._program = datapath.program("egress")
        self._runner = runner.Runner(self._program)
        self._context = runner.context()
        self.reported: list[bytes] = []

    def send(self, packets: list[bytes]) -> None:
        for number, packet in enumerate(packets):
            assert self._runner.run(packet, self._context) == -1
            if number % 8000 == 7999:
                self.reported += self._datapath.drain()
        self.reported += self._datapath.drain()
        os.close(self._program)


def flows(count: int, version: int = 4) -> list[bytes]:
    """One packet each of so many flows."""
    found = []
    for number in range(count):
        source, sport = divmod(number, 40_000)
        segment = frames.transport(frames.UDP, 10_000 + sport, 4242)
        if version == 4:
            packet = frames.ipv4(
                bytes((10, 7, source >> 8, source & 255)), b"\x0a\x08\0\1", 17, segment
            )
        else:
            address = b"\xfd\x07" + bytes(12) + struct.pack("!H", source)
            packet = frames.ipv6(address, b"\xfd\x08" + bytes(13) + b"\1", 17, segment)
        found.append(frames.ethernet(packet))
    return found


def flows_known(datapath) -> int:
    table = bpf_calls.Map.open(datapath.maps / "flows")
    data = table.values()
    table.close()
    size = ctypes.sizeof(bpf_types.Flow)
    return sum(any(data[at : at + 8]) for at in range(0, len(data), size))


def test_flows_beyond_the_table_push_out_others_and_are_counted_and_reported_again(routed):
    watchlist, count = routed.number(), 150_000
    places = bpf_types.NR_FLOW_SETS * bpf_types.FLOW_WAYS
    routed.datapath.drain()
    routed.datapath.watch([datapaths.everything(watchlist)], {watchlist: datapaths.policy(**HOUR)})
    known = flows_known(routed.datapath)
    before = routed.datapath.counters.datapath()["flow_evicted"]
    packets = flows(count)
    HostSender(routed.datapath).send(packets)
    found = routed.settled(watchlist, routed.watched(watchlist)).counters
    evicted = routed.datapath.counters.datapath()["flow_evicted"] - before
    # others' packets, of IPv6 between the pods, may be among those watched: they are flows too
    assert found["watched"] >= found["reported"] >= count
    assert evicted == found["reported"] - (flows_known(routed.datapath) - known)
    assert evicted >= count - places
    # nine flows for every set of four: hardly a place is left
    assert flows_known(routed.datapath) > places * 0.95
    # the oldest are pushed out first: of the last few, less than one in a hundred has had four behind it in its set
    for again, share_known in ((packets[-bpf_types.NR_FLOW_SETS :], 0.97), (packets[:1000], 0.05)):
        before_again = routed.settled(watchlist, routed.watched(watchlist)).counters
        HostSender(routed.datapath).send(again)
        found = routed.settled(watchlist, routed.watched(watchlist)).counters
        known_still = found["suppressed"] - before_again["suppressed"]
        assert (known_still >= share_known * len(again)) == (share_known > 0.5)


def test_drops_of_more_flows_than_the_table_holds_push_out_others_and_are_counted(routed, firewall):
    """The same table, which is full: every flow's first drop takes the place of another."""
    filler, watchlist, first, count = routed.number(), routed.number(), 40_000, 2000
    policies = {number: datapaths.policy(**HOUR) for number in (filler, watchlist)}
    routed.datapath.watch([datapaths.everything(filler)], policies)
    HostSender(routed.datapath).send(flows(150_000))
    routed.datapath.watch([benches.udp_to(watchlist, first, first + count - 1)], policies)
    firewall(f"{first}-{first + count - 1}")
    known, before = flows_known(routed.datapath), routed.datapath.counters.datapath()
    to = lambda number: (routed.server.address, first + number)  # noqa: E731
    benches.Sender(routed, watchlist).send(count, to)
    assert routed.outcome(watchlist, count) == {"dropped": count, "drops_reported": count}
    assert len(routed.datapath.drain()) == count
    evicted = routed.datapath.counters.datapath()["drop_evicted"] - before["drop_evicted"]
    assert evicted == count - (flows_known(routed.datapath) - known)
    assert evicted > count * 0.9


def test_a_packet_whose_slot_another_cpu_is_taking_is_counted_and_goes_on(routed):
    """Between two instructions of a CPU; here a mark that a CPU has left in every slot makes it last."""
    watchlist, port = watch_port(routed)
    slots = bpf_calls.Map.open(routed.datapath.maps / "slots")
    taken = bytes(bpf_types.Slot(owner=bpf_types.SlotState.TAKEN))
    before = routed.datapath.counters.datapath()["slot_busy"]
    try:
        for index in range(bpf_types.NR_SLOTS):
            slots.update(struct.pack("=I", index), taken)
        send_plainly(routed, 100, (routed.server.address, port))
        assert routed.outcome(watchlist, 100) == {"unverified": 100}
        assert routed.datapath.counters.datapath()["slot_busy"] - before >= 100
    finally:
        for index in range(bpf_types.NR_SLOTS):
            slots.update(struct.pack("=I", index), bytes(len(taken)))
        slots.close()


@pytest.fixture(scope="module")
def elsewhere():
    """The datapath of another node."""
    name = f"hl{os.getpid()}-other"
    ip(f"netns add {name}")
    with datapaths.loaded(Namespace(name)) as datapath:
        datapath.enable()
        yield datapath
    ip(f"netns del {name}")


@pytest.mark.parametrize("sample", [2, 10, 100])
@pytest.mark.parametrize("version", [4, 6])
def test_sampling_takes_one_flow_in_n_and_the_same_ones_on_every_node(
    routed, elsewhere, version, sample
):
    count, watchlist = 20_000, routed.number()
    packets = flows(count, version)
    shown: list[set[bytes]] = []
    for datapath in (routed.datapath, elsewhere):
        datapath.drain()
        rules = [benches.udp_to(watchlist, 4242)]
        datapath.watch(rules, {watchlist: datapaths.policy(sample=sample)})
        sender = HostSender(datapath)
        sender.send(packets)
        shown.append({v05.decode(data).packet for data in sender.reported})
        found = datapath.identity(watchlist)
        assert found.watched_difference == 0
        assert found.counters["watched"] == count
        assert found.counters["reported"] == len(sender.reported) == len(shown[-1])
        assert found.counters["sampled_out"] == count - len(sender.reported)
    assert shown[0] == shown[1]
    share = 1 / sample
    spread = math.sqrt(count * share * (1 - share))
    assert abs(len(shown[0]) - count * share) <= 5 * spread


def test_a_protocol_that_nobody_knows_is_reported_and_has_no_ports(routed):
    watchlist, ported = routed.number(), routed.number()
    odd, count = 253, 50
    with_ports = classifier.Rule(
        1, ported, bpf_types.RuleAction.REPORT, destination_ports=((0, 65535),)
    )
    any_port = classifier.Rule(2, watchlist, bpf_types.RuleAction.REPORT, protocol=odd)
    policies = {number: datapaths.policy() for number in (watchlist, ported)}
    routed.datapath.drain()
    routed.datapath.watch([with_ports, any_port], policies)
    with routed.client.namespace.socket(socket.AF_INET, socket.SOCK_RAW, odd) as sender:
        for number in range(count):
            sender.sendto(struct.pack("!HHI", 80, 80, number), (routed.server.address, 0))
    assert routed.outcome(watchlist, count) == {"reported": count}
    assert routed.outcome(ported, 0) == {}
    packets = [v05.decode(data).packet for data in routed.datapath.drain()]
    assert [packet[14 + 9] for packet in packets] == [odd] * count


def test_frames_that_are_no_ip_or_cut_off_are_counted_and_nothing_else(routed):
    watchlist = routed.number()
    rules = [classifier.Rule(1, watchlist, bpf_types.RuleAction.REPORT, protocol=17)]
    routed.datapath.watch(rules, {watchlist: datapaths.policy()})
    whole = frames.ethernet(
        frames.ipv4(b"\x0a\0\0\1", b"\x0a\0\0\2", 17, frames.transport(frames.UDP, 1, 2))
    )
    cut = [whole[:length] for length in range(15, 34)]
    other = [
        frames.ethernet(bytes(46), kind)
        for kind in frames.OTHER_TYPES
        if kind not in (0x0806, 0x88CC)
    ]
    before = routed.datapath.counters.datapath()
    packet_socket = routed.client.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with packet_socket as sender:
        sender.bind(("eth0", 0))
        for frame in cut + other:
            sender.send(frame)
        sender.send(whole)
    assert routed.settled(watchlist, 1)
    after = routed.datapath.counters.datapath()
    found = {name: after[name] - before[name] for name in ("not_ip", "truncated")}
    assert found == {"not_ip": len(other), "truncated": len(cut)}


def test_a_filter_that_overwrites_metadata_changes_nothing(bridged):
    """A CNI's filter overwrites tc_index, and the bridge makes itself the ingress interface."""
    port = bridged.port()
    host, away = bridged.node.namespace, (bridged.lab.collector_address, port)

    def send(count: int) -> dict[str, int]:
        watchlist = bridged.number()
        bridged.datapath.watch([benches.udp_to(watchlist, port)], {watchlist: datapaths.policy()})
        benches.Sender(bridged, watchlist).send(count, lambda number: away)
        found = bridged.outcome(watchlist, count)
        assert len(bridged.datapath.drain()) == found.get("reported", 0)
        return found

    assert send(400) == {"reported": 400}
    host.run(*"tc qdisc add dev pod0 clsact".split())
    host.run(*"tc filter add dev pod0 ingress protocol all u32 match u32 0 0 classid 1:7".split())
    try:
        assert send(400) == {"reported": 400}
    finally:
        host.run(*"tc qdisc del dev pod0 clsact".split())


def test_the_interface_speaks_for_a_packet_whose_tag_is_gone(routed):
    watchlist, port = watch_port(routed)
    host = routed.node.namespace
    host.run(*"tc qdisc add dev pod0 clsact".split())
    host.run(*"tc filter add dev pod0 ingress protocol all u32 match u32 0 0 classid 1:7".split())
    try:
        benches.Sender(routed, watchlist).send(400, server(routed, port))
        assert routed.outcome(watchlist, 400) == {"reported": 400}
    finally:
        host.run(*"tc qdisc del dev pod0 clsact".split())


@pytest.fixture(scope="module")
def blind(routed):
    """An address behind an interface of the node that has no hook: what goes there is not seen again."""
    host, pod = routed.node.namespace, routed.server.namespace
    ip(
        f"-n {host.name} link add blind0 type veth peer name blind1 netns {pod.name}",
        f"-n {host.name} link set blind0 up",
        f"-n {pod.name} link set blind1 up",
        f"-n {host.name} route add 10.250.0.0/24 dev blind0",
        f"-n {host.name} neigh replace 10.250.0.1 lladdr 02:00:00:00:00:99 dev blind0 nud permanent",
    )
    return "10.250.0.1"


def test_a_packet_that_is_not_seen_again_is_unresolved_once_its_slot_is_taken(routed, blind):
    watchlist, port = watch_port(routed)
    sender, sent = benches.Sender(routed, watchlist), 0

    def some_are_unresolved() -> bool:
        nonlocal sent
        sender.send(400, lambda number: (blind, port))
        sent += 400
        found = routed.outcome(watchlist, sent)
        assert set(found) <= {"unresolved", "pending"}
        assert sum(found.values()) == sent
        return found.get("unresolved", 0) >= 400

    benches.until(some_are_unresolved, "slots taken over")
    assert routed.datapath.drain() == []


def test_a_strangers_death_at_the_same_address_is_no_drop_of_a_watched_packet(routed, blind):
    """The kernel gives the address of what went out of sight to a packet of another namespace, and that one dies."""
    watchlist, port = watch_port(routed)
    sender, sent = benches.Sender(routed, watchlist), 0
    before = routed.datapath.counters.datapath()["stale_drop"]

    def a_stranger_died() -> bool:
        nonlocal sent
        sender.send(50, lambda number: (blind, port))
        sent += 50
        routed.lab.collector.inside(refused)
        found = routed.outcome(watchlist, sent)
        assert set(found) <= {"unresolved", "pending"}
        return routed.datapath.counters.datapath()["stale_drop"] > before

    benches.until(a_stranger_died, "a drop at the address of a watched packet")


def refused() -> None:
    """Datagrams to a port of this namespace that nobody has, on the CPU of the sender."""
    os.sched_setaffinity(0, {benches.CPUS[0]})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(50):
            sender.sendto(b"x", ("127.0.0.1", 9))


def test_a_packet_that_dies_behind_the_egress_hook_is_reported_twice_and_counted_once(routed):
    """What the queue of the egress device says it dropped is what was counted."""
    watchlist, port = watch_port(routed)
    host = routed.node.namespace
    host.run(*"tc qdisc replace dev pod1 root tbf rate 64kbit burst 2000 limit 3000".split())
    try:
        benches.Sender(routed, watchlist).send(300, server(routed, port))
        found = routed.outcome(watchlist, 300)
        shown = host.run(*"tc -s qdisc show dev pod1 root".split())
    finally:
        host.run(*"tc qdisc del dev pod1 root".split())
    dropped = int(shown.split("(dropped ")[1].split(",")[0])
    assert 0 < dropped < 300
    assert found == {"reported": 300, "dropped_late": dropped, "drops_reported": dropped}


def test_a_death_behind_the_egress_device_is_no_drop_of_the_node(routed):
    """Sent out, and refused at the other end of the cable, which is in the node as well: it was forwarded."""
    watchlist, port = watch_port(routed)
    host = routed.node.namespace
    ip(
        f"-n {host.name} link add away0 type veth peer name away1",
        f"-n {host.name} link set away0 up",
        f"-n {host.name} link set away1 up",
        f"-n {host.name} route add 10.251.0.0/24 dev away0",
        f"-n {host.name} neigh replace 10.251.0.1 lladdr 02:00:00:00:00:99 dev away0 nud permanent",
    )
    routed.datapath.attach("away0", ("egress",))
    benches.Sender(routed, watchlist).send(200, lambda number: ("10.251.0.1", port))
    assert routed.outcome(watchlist, 200) == {"reported": 200}


@pytest.fixture
def unreadable(routed):
    """Not to be had from a sane kernel: the programs are told that the memory of packets is at an address that is none."""
    table = bpf_calls.Map.open(routed.datapath.maps / "config")
    memory = table.memory()
    table.close()
    config = bpf_types.Config.from_buffer(memory)
    right = config.skb_head
    config.skb_head = 0  # the first word, which links packets in a list: NULL
    yield
    config.skb_head = right


def test_late_drop_that_cannot_be_read_is_not_reported(routed, unreadable):
    """Without its headers nothing says that it is the packet which left."""
    watchlist, port = watch_port(routed)
    host = routed.node.namespace
    host.run(*"tc qdisc replace dev pod1 root tbf rate 64kbit burst 2000 limit 3000".split())
    try:
        benches.Sender(routed, watchlist).send(300, server(routed, port))
        found = routed.outcome(watchlist, 300)
    finally:
        host.run(*"tc qdisc del dev pod1 root".split())
    assert found == {"reported": 300}


def test_what_died_before_it_left_and_cannot_be_read_is_not_reported(routed, firewall, unreadable):
    """Without its addresses nothing says that it is the packet which came in."""
    watchlist, port = watch_port(routed)
    firewall(port)
    before = routed.datapath.counters.datapath()
    benches.Sender(routed, watchlist).send(100, server(routed, port))
    outcome = routed.outcome(watchlist, 100)
    assert outcome.get("unresolved", 0) + outcome.get("pending", 0) == 100
    assert "drops_reported" not in outcome
    after = routed.datapath.counters.datapath()
    assert after["stale_drop"] - before["stale_drop"] >= 100


NAT = "type nat hook prerouting priority -100;"


@pytest.fixture
def virtual_ip(routed):
    """An address that NAT makes the server's."""
    host = routed.node.namespace
    host.run("nft", "add", "table", "ip", "testnat")
    host.run("nft", f"add chain ip testnat pre {{ {NAT} }}")
    rule = f"add rule ip testnat pre ip daddr 10.96.0.7 dnat to {routed.server.address}"
    host.run("nft", rule)
    yield "10.96.0.7"
    host.run("nft", "delete", "table", "ip", "testnat")


def to_address(number: int, watchlist: int, address: str, action=bpf_types.RuleAction.REPORT):
    network = classifier.host_network(address)
    return classifier.Rule(number, watchlist, action, protocol=17, destinations=(network,))


def test_a_packet_counts_for_the_watchlist_that_matches_after_nat(routed, virtual_ip):
    """Watched as it came by one, as it leaves by another; or ignored as it leaves; or watched only then."""
    came, leaves, port = routed.number(), routed.number(), routed.port()
    policies = {number: datapaths.policy() for number in (came, leaves)}
    ignore = bpf_types.RuleAction.IGNORE
    inner = routed.server.address
    source = (classifier.host_network(routed.client.address),)
    only_then = classifier.Rule(
        1,
        leaves,
        bpf_types.RuleAction.REPORT,
        protocol=17,
        sources=source,
        destinations=(classifier.host_network(inner),),
    )
    cases = [
        ([to_address(1, came, virtual_ip), to_address(2, leaves, inner)], 0, 200),
        ([to_address(1, came, virtual_ip), to_address(2, 0, inner, ignore)], 0, 0),
        ([to_address(1, came, virtual_ip)], 200, 0),
        ([only_then], 0, 200),
    ]
    seen = {came: 0, leaves: 0}
    routed.datapath.drain()
    for rules, for_came, for_leaves in cases:
        routed.datapath.watch(rules, policies)
        send_plainly(routed, 200, (virtual_ip, port))
        for watchlist, more in ((came, for_came), (leaves, for_leaves)):
            seen[watchlist] += more
            found = routed.outcome(watchlist, seen[watchlist])
            assert found == ({"reported": seen[watchlist]} if seen[watchlist] else {})
    assert len(routed.datapath.drain()) == sum(seen.values())


def send_plainly(bench, count: int, to: tuple[str, int]) -> None:
    """Send and wait until the server has all of it; few enough never to wait in a queue."""
    with bench.server.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind((bench.server.address, to[1]))
        sink.settimeout(benches.WAIT_S)
        with bench.client.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for number in range(count):
                sender.sendto(struct.pack("!I", number), to)
                sink.recv(16)


def test_watchlists_that_share_packets_of_both_cpus_each_add_up(routed):
    """Six watchlists, each with another fate of its packets, in one stream from two CPUs."""
    first, count = routed.port(), 3000
    each = count // 6 * len(benches.CPUS)
    # every CPU's sender has a socket, so a flow, of its own
    seldom = {"reported": len(benches.CPUS), "suppressed": each - len(benches.CPUS)}
    fates = [
        ({}, {"reported": each}),
        (HOUR, seldom),
        (NOBODY, {"sampled_out": each}),
        ({"events": bpf_types.ReportEvent.DROP}, {"not_asked": each}),
        ({"collector": 5}, {"reported": each}),
        (HOUR | {"collector": 5}, seldom),
    ]
    watchlists = [routed.number() for _ in fates]
    routed.datapath.drain()
    routed.datapath.watch(
        [benches.udp_to(number, first + place) for place, number in enumerate(watchlists)],
        {n: datapaths.policy(**policy) for n, (policy, _) in zip(watchlists, fates, strict=True)},
        {place: bpf_types.Collector(snap_length=64) for place in (0, 5)},
    )
    sender = benches.Sender(routed, *watchlists)
    sender.send_on_each_cpu(count, lambda number: (routed.server.address, first + number % 6))
    total = 0
    for watchlist, (_, outcome) in zip(watchlists, fates, strict=True):
        assert routed.outcome(watchlist, each) == outcome
        total += outcome.get("reported", 0)
    assert len(routed.datapath.drain()) == total


class Running:
    """Traffic that goes on until somebody has looked often enough."""

    def __init__(self, send) -> None:
        self._stop = threading.Event()
        self._failures: list[BaseException] = []

        def work() -> None:
            try:
                while not self._stop.is_set():
                    send()
            except BaseException as error:
                self._failures.append(error)

        self._thread = threading.Thread(target=work)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failures:
            raise self._failures[0]


def look(bench, watchlist: int) -> int:
    """What must be true at every moment; returns how many packets waited in slots."""
    first = bench.datapath.counters.watchlist(watchlist)
    between = bench.datapath.identity(watchlist)
    last = bench.datapath.counters.watchlist(watchlist)
    # no outcome without a packet: what had one at first has been watched, and died, by now
    known = {name: last[name] for name in ("watched", "dropped_late")}
    done = counters.Identity({**first, **known}, 0)
    assert done.watched_difference >= 0, (first, last)
    assert (
        counters.Identity({**first, **known, "dropped": last["dropped"]}, 0).drops_difference >= 0
    )
    # no packet without an outcome, but for those in a slot and those in the hands of a CPU right now
    open_ = counters.Identity({**last, "watched": first["watched"]}, between.pending)
    assert open_.watched_difference <= 2 * len(benches.CPUS), (first, between, last)
    return between.pending


def test_while_traffic_runs_only_what_is_in_flight_has_no_outcome(routed):
    watchlist, port = watch_port(routed, interval_ns=1_000_000)
    sender, target = benches.Sender(routed, watchlist), server(routed, port)
    with Running(lambda: sender.send_on_each_cpu(2000, target)):
        pending = [look(routed, watchlist) for _ in range(30)]
    assert max(pending) <= len(benches.CPUS)
    found = routed.outcome(watchlist, sender.sent)
    assert set(found) <= {"reported", "suppressed", "ring_full"}
    assert sender.sent > 2000


def test_packets_on_their_way_while_rules_change_are_accounted_for(routed):
    """One watchlist after the other has the traffic, and sometimes none: what one began to count, one must finish."""
    one, other, port = routed.number(), routed.number(), routed.port()
    policies = {one: datapaths.policy(), other: datapaths.policy(events=bpf_types.ReportEvent.DROP)}
    choices = [[benches.udp_to(one, port)], [benches.udp_to(other, port)], []]
    target = (routed.server.address, port)
    with Running(lambda: send_plainly(routed, 50, target)):
        for number in range(60):
            routed.datapath.watch(choices[number % 3], policies)
            routed.datapath.drain()
    for watchlist in (one, other):
        watched = routed.watched(watchlist)
        assert watched > 0
        found = routed.outcome(watchlist, watched)
        # with no rule left there is no policy either, which asks for nothing
        assert set(found) <= {"reported", "not_asked"}


def test_what_waits_in_a_queue_inside_the_node_is_pending(bridged):
    """A shaped bridge: packets wait there, some find no room; at every moment all are somewhere.

    Unresolved: two that are alive at addresses 16 MB apart share a slot, and the later one has it.
    """
    watchlist, port = watch_port(bridged, interval_ns=1_000_000)
    host = bridged.node.namespace
    host.run(*"tc qdisc replace dev cni0 root tbf rate 3mbit burst 3000 limit 12000".split())
    sender = benches.Sender(bridged, watchlist, source=bridged.lab.collector)
    target = (bridged.client.address, port)
    try:
        with Running(lambda: sender.send(2000, lambda number: target)):
            pending = [look(bridged, watchlist) for _ in range(30)]
        found = bridged.outcome(watchlist, sender.sent)
    finally:
        host.run(*"tc qdisc del dev cni0 root".split())
    assert max(pending) > 20
    assert set(found) <= {
        "reported",
        "suppressed",
        "ring_full",
        "unresolved",
        "dropped",
        "drops_reported",
        "drops_suppressed",
        "drops_ring_full",
    }
    assert found["dropped"] > 0
