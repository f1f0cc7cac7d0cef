# SPDX-License-Identifier: Apache-2.0
"""One line a record, for programs (json) or for people (table); colours only on a terminal."""

import json
import os
from collections.abc import Callable, Mapping
from typing import TextIO

from hostint_collector.record import Record

HEADER = f"{'TIME':15} {'KIND':9} {'NODE':15} {'PORTS':>11} {'LATENCY':>9}  FLOW"
_COLOURS = {"flow": "\x1b[32m", "drop": "\x1b[31m", "queue": "\x1b[33m", "malformed": "\x1b[35m"}
_RESET = "\x1b[0m"


def use_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Colours on a terminal that does not refuse them (no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def latency(nanoseconds: int) -> str:
    """A time for a person, three digits or so."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds} ns"


def endpoint(address: str | None, port: int | None) -> str:
    """`10.0.0.1:80`, `[fd00::1]:80`, or the address alone."""
    if address is None:
        return "?"
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def flow(inner: Record) -> str:
    """`10.0.0.1:1234 > 10.0.0.2:80 TCP`."""
    source = endpoint(inner["sourceAddress"], inner["sourcePort"])
    destination = endpoint(inner["destinationAddress"], inner["destinationPort"])
    suffix = f" type {inner['icmpType']}" if inner["icmpType"] is not None else ""
    return f"{source} > {destination} {inner['protocol'] or ''}{suffix}"


def table_line(record: Record, coloured: bool) -> str:
    """One aligned line."""
    time = record["time"][11:26]
    kind = record["kind"]
    shown = f"{kind:9}"
    if coloured:
        shown = f"{_COLOURS[kind]}{shown}{_RESET}"
    if kind == "malformed":
        what = f"{record['bytes']} bytes: {record['reason']}"
        return f"{time:15} {shown} {record['source']:15} {'':>11} {'':>9}  {what}"
    ports = f"{record['ingressPort']} > {record['egressPort']}"
    taken = "" if kind == "drop" else latency(record["hopLatency"])
    text = flow(record["inner"])
    if kind == "drop":
        text += f"  DROPPED {record['dropReasonName']} ({record['dropReason']})"
    elif record["flags"]["q"]:
        text += "  congested"
    return f"{time:15} {shown} {record['node']:15} {ports:>11} {taken:>9}  {text}"


def json_line(record: Record) -> str:
    """One compact JSON object."""
    return json.dumps(record, separators=(",", ":"))


def printer(output: str, stream: TextIO) -> Callable[[Record], None]:
    """A function that shows records on `stream` as `output` says: json, table or none."""
    if output == "none":
        return lambda _: None
    if output == "json":
        return lambda record: print(json_line(record), file=stream)
    coloured = use_colour(stream)
    print(HEADER, file=stream)
    return lambda record: print(table_line(record, coloured), file=stream)
