# SPDX-License-Identifier: Apache-2.0
"""What a test run cannot show: packets of the kernel itself, cut short, with headers out of reach, or large, go through unharmed."""

import ctypes
import ipaddress
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, bpf_types, classifier, loader
from hostint_report import v05
from tests.datapath import frames, reference_parser, taps
from tests.lab import datapath as datapaths
from tests.pins import pin_directory

pytestmark = pytest.mark.lab
PACKETS = 60_000
BATCH = 4000
PAGE = 4096
VLAN_TYPES = (b"\x81\x00", b"\x88\xa8")
# the kernel takes a tag off before any hook, and itself drops what ends before the type behind a tag
SHORTEST_TAGGED, SHORTEST_TWICE_TAGGED = 20, 22


@pytest.fixture(scope="module")
def bridge():
    with taps.taps(f"hl{os.getpid()}-taps") as built:
        yield built


@pytest.fixture
def datapath(bridge):
    with datapaths.loaded(bridge.namespace) as loaded:
        for interface in (taps.INSIDE, taps.OUTSIDE):
            loaded.attach(interface)
        loaded.watch([datapaths.everything()])
        loaded.enable()
        yield loaded


@pytest.fixture(autouse=True)
def one_cpu():
    """Stay on one CPU: a tap's packets are handled where they are written, and all reports are in one ring, in order."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    yield
    os.sched_setaffinity(0, before)


def is_tagged(frame: bytes) -> bool:
    return frame[12:14] in VLAN_TYPES


def as_hooks_see_it(frame: bytes) -> bytes:
    """A tag is no longer in the packet but beside it."""
    return frame[:12] + frame[16:] if is_tagged(frame) else frame


def fit_for_a_bridge(frame: bytes) -> bytes:
    """From a sender and to a receiver that a bridge forwards."""
    frame = frames.MACS + frame[12:]
    if not is_tagged(frame):
        return frame
    frame = frame.ljust(SHORTEST_TAGGED, b"\0")
    return frame.ljust(SHORTEST_TWICE_TAGGED, b"\0") if frame[16:18] == VLAN_TYPES[0] else frame


class Watcher:
    """Sends frames over the bridge and holds what was counted and reported against the model."""

    def __init__(self, bridge: taps.Taps, datapath: datapaths.Datapath) -> None:
        self._bridge = bridge
        self._datapath = datapath
        self._due: list[bytes] = []
        self.watched = self.not_ip = self.truncated = 0

    def send(self, frame: bytes, how: bytes = taps.header(), linear: int | None = None) -> bytes:
        """Through the bridge, unchanged; `linear` bytes are what a program can look at. Returns what came with it."""
        given, came = self._bridge.through(frame, how)
        assert came == frame, (frame.hex(), came.hex())
        seen = as_hooks_see_it(frame)
        packet = reference_parser.parse(seen[:linear])
        if packet is reference_parser.NOT_IP:
            self.not_ip += 1
        elif packet is reference_parser.TRUNCATED:
            self.truncated += 1
        else:
            self.watched += 1
            self._due.append(seen[: bpf_types.SNAP_BYTES])
        if len(self._due) >= BATCH:
            self._take_reports()
        return given

    def _take_reports(self) -> None:
        reports = [v05.decode(data) for data in self._datapath.drain()]
        assert [report.packet for report in reports] == self._due
        assert all(0 < report.hop_latency < 10**9 for report in reports)
        self._due = []

    def check(self) -> None:
        """All came out, all was counted, and every watched packet was reported."""
        self._take_reports()
        assert self._bridge.is_empty
        counted = self._datapath.counters.datapath()
        assert (counted["not_ip"], counted["truncated"]) == (self.not_ip, self.truncated)
        identity = self._datapath.identity()
        assert identity.watched_difference == identity.drops_difference == 0
        assert identity.counters["watched"] == identity.counters["reported"] == self.watched


def test_frames_of_every_kind_and_length_come_out_as_they_went_in(bridge, datapath):
    watcher = Watcher(bridge, datapath)
    for frame in frames.Mill(4).frames(PACKETS):
        watcher.send(fit_for_a_bridge(frame))
    watcher.check()
    assert min(watcher.watched, watcher.not_ip, watcher.truncated) > PACKETS // 100


def jumbo(version: int, size: int) -> bytes:
    segment = frames.transport(frames.TCP, 40_000, 80, size)
    if version == 4:
        packet = frames.ipv4(b"\x0a\0\0\1", b"\x0a\0\0\2", frames.TCP, segment)
    else:
        packet = frames.ipv6(b"\xfd" + bytes(15), b"\xfd" + bytes(14) + b"\1", frames.TCP, segment)
    return frames.ethernet(packet)


@pytest.mark.parametrize("version", [4, 6])
def test_headers_out_of_reach_are_counted_as_truncated_and_the_packet_goes_on(
    bridge, datapath, version
):
    """A driver that leaves its packet in pages and next to nothing in the linear part, at every split."""
    watcher = Watcher(bridge, datapath)
    for linear in range(14, 120):
        for size in (PAGE + 100, 9000, 60_000):
            watcher.send(jumbo(version, size), taps.header(linear), linear)
    watcher.check()
    assert watcher.watched > 100
    assert watcher.truncated > 50


@pytest.mark.parametrize("version", [4, 6])
def test_a_packet_that_is_yet_to_be_cut_into_segments_stays_whole(bridge, datapath, version):
    watcher = Watcher(bridge, datapath)
    transport_at = 34 if version == 4 else 54
    for size in range(3000, 60_000, 500):
        how = taps.tcp_header(version, 1448, transport_at)
        given = watcher.send(jumbo(version, size), how, transport_at + 20)
        # what was left to be done is still left to be done; how much is in the linear part is the kernel's affair
        assert (given[:2], given[4:]) == (how[:2], how[4:])
    watcher.check()
    assert watcher.watched == len(range(3000, 60_000, 500))


_BEFORE_CONTROL_BLOCK = (
    "length linear_length packet_type mark queue_mapping protocol vlan_present vlan_tci vlan_protocol "
    "priority ingress_ifindex ifindex hash class_id"
)


class Metadata(ctypes.Structure):
    """struct metadata of metadata_probe.c."""

    _fields_ = (
        ("timestamp", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in _BEFORE_CONTROL_BLOCK.split()),
        ("control_block", ctypes.c_uint32 * 5),
        *((name, ctypes.c_uint32) for name in "wire_length gso_segments gso_size".split()),
        ("tc_index", ctypes.c_uint32),
        ("timestamp_type", ctypes.c_uint32),
        ("hardware_timestamp", ctypes.c_uint64),
        ("data_meta_bytes", ctypes.c_uint64),
    )


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """The programs that run before and after ours, and what they wrote down."""
    sources = tmp_path_factory.mktemp("probe") / "bpf"
    shutil.copytree(loader.default_bpf_dir(), sources)
    shutil.copy(Path(__file__).with_name("metadata_probe.c"), sources / loader.MAIN_SOURCE)
    with pin_directory("metadata") as pins:
        yield loader.load(pins, sources)


def written_down(probe: Path, name: str, packets: int) -> Sequence[Metadata]:
    table = bpf_calls.Map.open(probe / "maps" / name)
    data = table.values()
    table.close()
    return (Metadata * packets).from_buffer_copy(data)


_NOWHERE = tuple(ipaddress.ip_network(text) for text in ("203.0.113.1/32", "2001:db8::1/128"))
_REPORT, _IGNORE = bpf_types.RuleAction.REPORT, bpf_types.RuleAction.IGNORE
# rules that make every IP packet one of these
KINDS = {
    "watched": datapaths.everything(),
    "possible": classifier.Rule(1, 1, _REPORT, destinations=_NOWHERE),
    "ignored": classifier.Rule(1, 0, _IGNORE),
    "unwatched": classifier.Rule(1, 1, _REPORT, sources=_NOWHERE, destinations=_NOWHERE),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("interface", "hook"), [(taps.INSIDE, "ingress"), (taps.OUTSIDE, "egress")]
)
def test_no_field_of_the_metadata_is_written(bridge, probe, interface, hook, kind):
    """Around our program two others: whatever may be written holds noise before, and all that can be read is the same after."""
    count = 4000
    attach_type = {"ingress": bpf_calls.TCX_INGRESS, "egress": bpf_calls.TCX_EGRESS}[hook]
    index = bridge.namespace.inside(lambda: socket.if_nametoindex(interface))
    seen = bpf_calls.Map.open(probe / "maps" / "packets_seen")
    for program in range(2):
        seen.update(program.to_bytes(4, "little"), bytes(8))
    with datapaths.loaded(bridge.namespace) as datapath:
        datapath.watch([KINDS[kind]])
        datapath.enable()
        if hook == "egress":
            # so that packets have an arrival
            datapath.attach(taps.INSIDE, ("ingress",))
        # each is attached before those that are there
        for name in ("egress", None, "ingress"):
            program = (
                bpf_calls.obj_get(probe / "programs" / name) if name else datapath.program(hook)
            )
            datapath.attach_program(program, index, attach_type)
        sent = [fit_for_a_bridge(frame) for frame in frames.Mill(5).frames(count)]
        for frame in sent:
            assert bridge.through(frame, taps.header())[1] == frame
        counters = datapath.identity().counters
    assert (counters["watched"] > count // 10) == (kind == "watched")
    assert (counters["reported"] > count // 10) == (kind == "watched" and hook == "egress")
    assert [seen.lookup(p.to_bytes(4, "little"))[:8] for p in range(2)] == [
        count.to_bytes(8, "little")
    ] * 2
    seen.close()
    before = written_down(probe, "metadata_before", count)
    after = written_down(probe, "metadata_after", count)
    for frame, one, other in zip(sent, before, after, strict=True):
        assert bytes(one) == bytes(other), frame.hex()
    noise = ("mark", "priority", "tc_index", "hash", "queue_mapping", "timestamp", "class_id")
    for name in noise:
        assert sum(bool(getattr(one, name)) for one in before) > count // 3, name
    assert all(any(one.control_block) for one in before)
