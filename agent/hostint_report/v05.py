# SPDX-License-Identifier: Apache-2.0
"""Telemetry Report v0.5: encode, and decode strictly. Pure.

Source: P4.org Telemetry Report Format Specification v0.5, "Telemetry Report Header" and the drop and switch-local headers.
"""

import struct
from dataclasses import dataclass

VERSION = 0
NPROTO_ETHERNET = 0
NPROTO_DROP = 1
NPROTO_LOCAL = 2

_FIXED = struct.Struct("!III")
_LOCAL = struct.Struct("!IHHII")
_DROP = struct.Struct("!IHHBBH")
FIXED_BYTES = _FIXED.size
LOCAL_BYTES = _FIXED.size + _LOCAL.size
DROP_BYTES = _FIXED.size + _DROP.size

_D, _Q, _F = 1 << 23, 1 << 22, 1 << 21
_HW_ID = 0x3F
_MASK32 = (1 << 32) - 1
_MAX = {8: (1 << 8) - 1, 16: (1 << 16) - 1, 24: (1 << 24) - 1, 32: _MASK32}


class MalformedReport(Exception):
    """The bytes are not a report; says why, and at which byte."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"{reason} (byte {offset})")
        self.reason = reason
        self.offset = offset


class EncodeError(ValueError):
    """A field does not fit the report; says which, its value and what is allowed."""


@dataclass(frozen=True, slots=True)
class LocalReport:
    """A flow or queue report: switch-local header. Times are nanoseconds, low 32 bits; `packet` starts with Ethernet."""

    hw_id: int
    sequence: int
    ingress_timestamp: int
    switch_id: int
    ingress_port: int
    egress_port: int
    egress_timestamp: int
    queue_id: int = 0
    queue_occupancy: int = 0
    flow: bool = True
    queue: bool = False
    packet: bytes = b""

    @property
    def hop_latency(self) -> int:
        """Nanoseconds between the two stamps, modulo 2^32."""
        return (self.egress_timestamp - self.ingress_timestamp) & _MASK32


@dataclass(frozen=True, slots=True)
class DropReport:
    """A drop report: drop header; there is no egress time. `packet` starts with Ethernet."""

    hw_id: int
    sequence: int
    ingress_timestamp: int
    switch_id: int
    ingress_port: int
    egress_port: int
    drop_reason: int
    queue_id: int = 0
    queue: bool = False
    flow: bool = False
    packet: bytes = b""


Report = LocalReport | DropReport


def _check(field: str, value: int, bits: int) -> None:
    if not 0 <= value <= _MAX.get(bits, (1 << bits) - 1):
        raise EncodeError(f"{field} {value} is not in 0..{(1 << bits) - 1}")


def encode(report: Report) -> bytes:
    """Write a report. Timestamps are cut to 32 bits, the occupancy saturates at 24. Raises EncodeError."""
    _check("hw_id", report.hw_id, 6)
    _check("sequence", report.sequence, 32)
    _check("switch_id", report.switch_id, 32)
    _check("ingress_port", report.ingress_port, 16)
    _check("egress_port", report.egress_port, 16)
    _check("queue_id", report.queue_id, 8)
    flags = (_Q if report.queue else 0) | (_F if report.flow else 0)
    stamp = report.ingress_timestamp & _MASK32
    ports = (report.switch_id, report.ingress_port, report.egress_port)
    if isinstance(report, DropReport):
        _check("drop_reason", report.drop_reason, 8)
        word = NPROTO_DROP << 24 | _D | flags | report.hw_id
        header = _DROP.pack(*ports, report.queue_id, report.drop_reason, 0)
    else:
        if not (report.flow or report.queue):
            raise EncodeError("flow and queue are both false: one of them must be true")
        word = NPROTO_LOCAL << 24 | flags | report.hw_id
        queue = report.queue_id << 24 | min(report.queue_occupancy, _MAX[24])
        header = _LOCAL.pack(*ports, queue, report.egress_timestamp & _MASK32)
    return _FIXED.pack(word, report.sequence, stamp) + header + report.packet


def decode(data: bytes) -> Report:
    """Read a report. Reserved bits are ignored, as the specification wants; all else that is not a report is refused.

    Raises MalformedReport, and nothing else, whatever the bytes are.
    """
    if len(data) < FIXED_BYTES:
        raise MalformedReport(f"{len(data)} bytes, the fixed header has {FIXED_BYTES}", len(data))
    word, sequence, stamp = _FIXED.unpack_from(data)
    if word >> 28 != VERSION:
        raise MalformedReport(f"version {word >> 28} is not 0", 0)
    nproto = word >> 24 & 15
    if nproto == NPROTO_LOCAL:
        return _decode_local(data, word, sequence, stamp)
    if nproto == NPROTO_DROP:
        return _decode_drop(data, word, sequence, stamp)
    raise MalformedReport(f"next protocol {nproto} is not 1 (drop) or 2 (switch-local)", 0)


def _decode_local(data: bytes, word: int, sequence: int, stamp: int) -> LocalReport:
    if len(data) < LOCAL_BYTES:
        raise MalformedReport(
            f"{len(data)} bytes, a switch-local report has {LOCAL_BYTES}", len(data)
        )
    if word & _D:
        raise MalformedReport("D is set in a switch-local report", 1)
    if not word & (_Q | _F):
        raise MalformedReport("neither Q nor F is set in a switch-local report", 1)
    switch_id, ingress_port, egress_port, queue, egress = _LOCAL.unpack_from(data, FIXED_BYTES)
    return LocalReport(
        hw_id=word & _HW_ID,
        sequence=sequence,
        ingress_timestamp=stamp,
        switch_id=switch_id,
        ingress_port=ingress_port,
        egress_port=egress_port,
        egress_timestamp=egress,
        queue_id=queue >> 24,
        queue_occupancy=queue & _MAX[24],
        flow=bool(word & _F),
        queue=bool(word & _Q),
        packet=data[LOCAL_BYTES:],
    )


def _decode_drop(data: bytes, word: int, sequence: int, stamp: int) -> DropReport:
    if len(data) < DROP_BYTES:
        raise MalformedReport(f"{len(data)} bytes, a drop report has {DROP_BYTES}", len(data))
    if not word & _D:
        raise MalformedReport("D is not set in a drop report", 1)
    switch_id, ingress_port, egress_port, queue_id, reason, _ = _DROP.unpack_from(data, FIXED_BYTES)
    return DropReport(
        hw_id=word & _HW_ID,
        sequence=sequence,
        ingress_timestamp=stamp,
        switch_id=switch_id,
        ingress_port=ingress_port,
        egress_port=egress_port,
        drop_reason=reason,
        queue_id=queue_id,
        queue=bool(word & _Q),
        flow=bool(word & _F),
        packet=data[DROP_BYTES:],
    )
