# SPDX-License-Identifier: Apache-2.0
"""Telemetry Report v0.5, against golden vectors and against anything."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostint_report import decode, inner, v05

GOLDEN = Path(__file__).with_name("golden")
SWITCH = 3232260884  # 192.168.99.20

EXPECTED = {
    "v05-flow-tcp": v05.LocalReport(
        hw_id=0,
        sequence=1,
        ingress_timestamp=1032178965,
        switch_id=SWITCH,
        ingress_port=7,
        egress_port=3,
        egress_timestamp=1032266619,
    ),
    "v05-flow-udp": v05.LocalReport(
        hw_id=5,
        sequence=0xFFFFFFFF,
        ingress_timestamp=4294967040,
        switch_id=SWITCH,
        ingress_port=7,
        egress_port=3,
        egress_timestamp=768,
        queue_id=2,
        queue_occupancy=291,
        queue=True,
    ),
    "v05-drop-tcp": v05.DropReport(
        hw_id=1,
        sequence=2,
        ingress_timestamp=1032178965,
        switch_id=SWITCH,
        ingress_port=7,
        egress_port=0,
        drop_reason=80,
    ),
    "v05-flow-ipv6": v05.LocalReport(
        hw_id=0,
        sequence=3,
        ingress_timestamp=1032178965,
        switch_id=SWITCH,
        ingress_port=7,
        egress_port=3,
        egress_timestamp=1032266619,
    ),
    "v05-quirk-ihr-drop": v05.DropReport(
        hw_id=1,
        sequence=4,
        ingress_timestamp=1032178965,
        switch_id=SWITCH,
        ingress_port=7,
        egress_port=0,
        drop_reason=0,
    ),
}
FLOWS = {
    "v05-flow-tcp": ("10.244.1.10", 40000, "10.244.2.20", 5201, 6),
    "v05-flow-udp": ("10.244.1.10", 53124, "10.96.0.10", 30053, 17),
    "v05-drop-tcp": ("10.244.1.10", 40000, "10.244.2.20", 5201, 6),
    "v05-flow-ipv6": ("fd00:10:244:1::a", 40001, "fd00:10:244:2::14", 443, 6),
}


def golden(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_vector_decodes(name):
    report = decode.decode(golden(name))
    assert dataclasses.replace(report, packet=b"") == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_vector_is_encoded_byte_for_byte(name):
    data = golden(name)
    header = v05.DROP_BYTES if isinstance(EXPECTED[name], v05.DropReport) else v05.LOCAL_BYTES
    assert v05.encode(dataclasses.replace(EXPECTED[name], packet=data[header:])) == data


@pytest.mark.parametrize("name", FLOWS)
def test_golden_vector_shows_its_flow(name):
    packet = inner.parse(decode.decode(golden(name)).packet)
    shown = (
        packet.source_address,
        packet.source_port,
        packet.destination_address,
        packet.destination_port,
        packet.protocol,
    )
    assert shown == FLOWS[name]


def test_hop_latency_survives_the_wrap_of_the_clock():
    assert EXPECTED["v05-flow-udp"].hop_latency == 1024


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty datagram"),
        (bytes.fromhex("02200000"), "4 bytes, the fixed header has 12"),
        (bytes.fromhex("12200000") + bytes(40), "version 1 is not supported"),
        (bytes.fromhex("03200000") + bytes(40), "next protocol 3 is not 1"),
        (bytes.fromhex("02200000") + bytes(20), "a switch-local report has 28"),
        (bytes.fromhex("01800000") + bytes(10), "a drop report has 24"),
        (bytes.fromhex("02a00000") + bytes(40), "D is set in a switch-local report"),
        (bytes.fromhex("02000000") + bytes(40), "neither Q nor F is set"),
        (bytes.fromhex("01000000") + bytes(40), "D is not set in a drop report"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_no_report_is_refused_with_the_reason(data, words):
    with pytest.raises(v05.MalformedReport, match=words):
        decode.decode(data)


def test_another_version_is_not_read_as_this_one():
    with pytest.raises(v05.MalformedReport, match="version 1 is not 0"):
        v05.decode(bytes.fromhex("12200000") + bytes(40))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hw_id", 64, r"hw_id 64 is not in 0\.\.63"),
        ("ingress_port", 65536, r"ingress_port 65536 is not in 0\.\.65535"),
        ("egress_port", -1, r"egress_port -1 is not in"),
        ("queue_id", 256, r"queue_id 256 is not in 0\.\.255"),
        ("sequence", 1 << 32, r"sequence 4294967296 is not in"),
    ],
)
def test_what_does_not_fit_is_not_encoded(field, value, words):
    report = dataclasses.replace(EXPECTED["v05-flow-tcp"], **{field: value})
    with pytest.raises(v05.EncodeError, match=words):
        v05.encode(report)


def test_queue_occupancy_saturates():
    full = dataclasses.replace(EXPECTED["v05-flow-tcp"], queue_occupancy=1 << 30)
    assert v05.decode(v05.encode(full)).queue_occupancy == (1 << 24) - 1


u8, u16, u32 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32))
common = {
    "hw_id": st.integers(0, 63),
    "sequence": u32,
    "ingress_timestamp": u32,
    "switch_id": u32,
    "ingress_port": u16,
    "egress_port": u16,
    "queue_id": u8,
    "queue": st.booleans(),
    "packet": st.binary(max_size=160),
}
local_reports = st.builds(
    v05.LocalReport,
    **common,
    egress_timestamp=u32,
    queue_occupancy=st.integers(0, (1 << 24) - 1),
    flow=st.just(True),
)
drop_reports = st.builds(v05.DropReport, **common, drop_reason=u8, flow=st.booleans())


@given(local_reports | drop_reports)
def test_reports_survive_the_wire(report):
    assert decode.decode(v05.encode(report)) == report


@given(st.binary(max_size=200))
def test_random_bytes_are_a_report_or_malformed_never_an_error(data):
    try:
        report = decode.decode(data)
    except v05.MalformedReport:
        return
    assert v05.encode(report)[12:] == data[12:] or isinstance(report, v05.DropReport)


@given(st.sampled_from(sorted(FLOWS)), st.integers(0, 200), st.integers(0, 7))
def test_the_inner_packet_may_end_or_break_anywhere(name, position, bit):
    frame = bytearray(decode.decode(golden(name)).packet)
    for length in range(len(frame)):
        inner.parse(bytes(frame[:length]))
    frame[position % len(frame)] ^= 1 << bit
    assert isinstance(inner.parse(bytes(frame)), inner.InnerPacket)
