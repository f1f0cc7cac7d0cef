# SPDX-License-Identifier: Apache-2.0
"""Slots and fingerprints, packet by packet: who may take a slot, who gives it up, and what tells packets apart."""

import ipaddress
import struct
import time

import pytest

from hostint_agent import bpf_calls, bpf_types, classifier
from tests.datapath.programs import Programs, udp, vxlan
from tests.lab import datapath as datapaths

pytestmark = pytest.mark.bpf
FRAME = udp(80, bytes(16))
PENDING = bpf_types.SlotState.PENDING


def put(programs: Programs, index: int, slot: bpf_types.Slot) -> None:
    table = bpf_calls.Map.open(programs.datapath.maps / "slots")
    table.update(struct.pack("=I", index), bytes(slot))
    table.close()


def occupy(programs: Programs, index: int, arrival_ns: int) -> bpf_types.Slot:
    """Have another packet of watchlist 2 wait in a slot."""
    owner = 2 << bpf_types.OWNER_WATCHLIST_SHIFT | 0x00FF_1234_5678_9A00 | PENDING
    other = bpf_types.Slot(owner=owner, arrival_ns=arrival_ns, ifindex=3)
    put(programs, index, other)
    return other


@pytest.mark.parametrize(("ahead_s", "stays"), [(0.5, True), (-0.5, True), (-2.0, False)])
def test_a_packet_that_waits_keeps_its_slot_for_a_second_whatever_clock_it_came_by(
    programs, ahead_s, stays
):
    """Another CPU may have read a later clock, and have taken the slot since."""

    def meet() -> tuple[bpf_types.Slot, dict[int, bpf_types.Slot]]:
        programs.come(FRAME)
        (first,) = programs.waiting()
        other = occupy(programs, first, time.monotonic_ns() + int(ahead_s * 1e9))
        programs.come(FRAME)
        return other, programs.waiting()

    programs.datapath.watch([datapaths.everything()])
    # until the second has the memory of the first
    for _ in range(100):
        other, waiting = programs.inside(meet)
        owners = [slot.owner for slot in waiting.values()]
        if stays and len(owners) == 2:
            assert other.owner in owners
        elif not stays and len(owners) == 1:
            assert other.owner not in owners
            break
        else:
            assert not stays or other.owner in owners
        for index in waiting:
            put(programs, index, bpf_types.Slot())
    unresolved = programs.datapath.identity(2).counters["unresolved"]
    assert unresolved == (0 if stays else 1)


def test_a_packet_that_no_rule_turns_out_to_be_about_waits_no_more(programs):
    """One side of it was in a class when it came in. It left, so nobody may take it for one that is still inside."""
    source = (ipaddress.ip_network("10.0.0.0/8"),)
    nowhere = (ipaddress.ip_network("192.0.2.0/24"),)
    rule = classifier.Rule(1, 1, bpf_types.RuleAction.REPORT, sources=source, destinations=nowhere)
    programs.datapath.watch([rule])

    def pass_by() -> bool:
        programs.come(FRAME)
        assert len(programs.waiting()) == 1
        programs.leave(FRAME)
        return not programs.waiting()

    assert any(programs.inside(pass_by) for _ in range(20))
    assert programs.datapath.identity().counters["watched"] == 0


def test_who_interrupts_the_writer_of_a_ring_leaves_the_ring_alone_and_counts(programs):
    """local_in may be called by a process (a verdict of NFQUEUE), and softirqs go on meanwhile."""
    programs.datapath.watch([datapaths.everything()])

    def set_busy(busy: int) -> None:
        table = bpf_calls.Map.open(programs.datapath.maps / "ring_heads")
        for index in range(table.max_entries):
            key = struct.pack("=I", index)
            head = bpf_types.RingPosition.from_buffer_copy(table.lookup(key))
            head.busy = busy
            table.update(key, bytes(head))
        table.close()

    def pass_by() -> None:
        programs.come(FRAME)
        programs.leave(FRAME)

    programs.repeat(pass_by, 1)
    before = programs.datapath.identity().counters
    set_busy(1)
    programs.inside(lambda: [pass_by() for _ in range(10)])
    found = programs.datapath.identity()
    assert programs.datapath.drain() == []
    assert found.counters["reported"] == before["reported"]
    assert found.counters["ring_full"] > 0
    assert found.watched_difference == 0
    set_busy(0)
    (report,) = programs.repeat(pass_by, 1)
    # a gap shows what was not written
    assert report.sequence == found.counters["reported"] + found.counters["ring_full"] + 1


def test_a_clock_that_is_behind_that_of_the_arrival_makes_no_latency(programs):
    """Another CPU's, by some ns; here by a tenth of a second, which would be 4.19 s on the wire."""
    programs.datapath.watch([datapaths.everything()])

    def pass_by() -> None:
        programs.come(FRAME)
        ((index, slot),) = programs.waiting().items()
        slot.arrival_ns += 100_000_000
        put(programs, index, slot)
        programs.leave(FRAME)
        # of a packet that did not leave with the memory that it came with
        for left in programs.waiting():
            put(programs, left, bpf_types.Slot())

    for report in programs.repeat(pass_by, 5):
        assert report.hop_latency == 0


def fingerprint(programs: Programs, frame: bytes) -> int:
    """What a packet leaves in its slot."""

    def come() -> int:
        programs.come(frame)
        ((index, slot),) = programs.waiting().items()
        put(programs, index, bpf_types.Slot())
        return int(slot.fingerprint)

    return programs.inside(come)


@pytest.mark.parametrize("length", range(1, 21))
def test_datagrams_that_differ_in_a_byte_have_different_fingerprints(programs, length):
    """As long as it is among the first 16, taken 4 at a time."""
    programs.datapath.watch([datapaths.everything()])
    payload = bytes(range(1, length + 1))
    first = fingerprint(programs, udp(80, payload))
    for at in range(min(length // 4 * 4, 16)):
        changed = bytearray(payload)
        changed[at] ^= 0x10
        assert fingerprint(programs, udp(80, bytes(changed))) != first, at
    assert fingerprint(programs, udp(80, payload)) == first


@pytest.mark.parametrize("length", range(21))
def test_a_socket_takes_what_came_in_whatever_its_length(programs, length):
    """Two readers of packets, one fingerprint."""
    frame = udp(80, bytes(range(length)))

    def pass_by() -> None:
        programs.come(frame)
        programs.taken(frame)

    programs.datapath.watch([datapaths.everything()])
    assert len(programs.repeat(pass_by, 5)) == 5


def nothing_inside(filling: bytes) -> bytes:
    """A datagram to the port of VXLAN in which no IP packet can be found, though a type says so."""
    return vxlan(bytes(12) + b"\x08\0" + filling)


@pytest.mark.parametrize("filling", [b"", b"\x15" + bytes(30)], ids=["short", "no version"])
def test_a_tunnel_with_nothing_inside_is_known_by_itself(programs, filling):
    """Otherwise all such packets would be one."""
    programs.datapath.watch([datapaths.everything()])
    whole = nothing_inside(filling)
    # of another VXLAN network each
    one, other = (whole[:46] + bytes([number]) + whole[47:] for number in (8, 9))
    assert fingerprint(programs, one) != fingerprint(programs, other)

    def pass_by() -> None:
        programs.come(one)
        programs.taken(one)

    assert len(programs.repeat(pass_by, 5)) == 5
