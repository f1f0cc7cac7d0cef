# SPDX-License-Identifier: Apache-2.0
"""From a datagram to the record that is shown: a dict with the stable keys of docs/collector.md."""

import datetime
import ipaddress
from typing import Any

from hostint_report import decode, drop_reasons, inner, v05

Record = dict[str, Any]


def _time(wall_ns: int) -> str:
    seconds, rest = divmod(wall_ns, 10**9)
    stamp = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{stamp:%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"


def kind_of(report: v05.Report) -> str:
    """flow, drop or queue: D is a drop; Q without F is a queue report; F is a flow report, congested or not."""
    if isinstance(report, v05.DropReport):
        return "drop"
    return "flow" if report.flow else "queue"


def from_datagram(data: bytes, source: str, wall_ns: int) -> Record:
    """Decode one datagram; what is no report becomes a record of kind `malformed`, never an exception."""
    try:
        report = decode.decode(data)
    except v05.MalformedReport as error:
        return {
            "time": _time(wall_ns),
            "source": source,
            "kind": "malformed",
            "reason": error.reason,
            "offset": error.offset,
            "bytes": len(data),
        }
    return from_report(report, source, wall_ns)


def from_report(report: v05.Report, source: str, wall_ns: int) -> Record:
    """The record of a decoded report. Times are nanoseconds."""
    dropped = isinstance(report, v05.DropReport)
    record: Record = {
        "time": _time(wall_ns),
        "source": source,
        "version": "0.5",
        "kind": kind_of(report),
        "nodeId": report.switch_id,
        "node": str(ipaddress.IPv4Address(report.switch_id)),
        "hwId": report.hw_id,
        "sequence": report.sequence,
        "flags": {"d": dropped, "q": report.queue, "f": report.flow},
        "ingressPort": report.ingress_port,
        "egressPort": report.egress_port,
        "ingressTimestamp": report.ingress_timestamp,
        "queueId": report.queue_id,
    }
    if isinstance(report, v05.DropReport):
        record["dropReason"] = report.drop_reason
        record["dropReasonName"] = drop_reasons.name_of(report.drop_reason)
    else:
        record["egressTimestamp"] = report.egress_timestamp
        record["hopLatency"] = report.hop_latency
        record["queueOccupancy"] = report.queue_occupancy
    record["inner"] = _inner(inner.parse(report.packet))
    return record


def _inner(packet: inner.InnerPacket) -> Record:
    return {
        "sourceAddress": packet.source_address,
        "destinationAddress": packet.destination_address,
        "protocol": packet.protocol_name if packet.protocol is not None else None,
        "sourcePort": packet.source_port,
        "destinationPort": packet.destination_port,
        "icmpType": packet.icmp_type,
        "icmpCode": packet.icmp_code,
        "length": packet.length,
        "truncated": packet.truncated,
    }
