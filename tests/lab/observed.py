# SPDX-License-Identifier: Apache-2.0
"""What the datapath says of each packet of a situation, and how much of that is false.

Packets are sent one by one, each after the one before was received. So a report's latency has a
bound that no recorder is needed for: the time between send and receive.
"""

import itertools
import re
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hostint_agent import bpf_types, classifier
from hostint_report import v05
from tests.lab import datapath as datapaths
from tests.lab import deaths, traffic
from tests.lab.deaths import Stage
from tests.lab.namespace import Namespace

# Every packet is due, also where another CPU has reported a later one of its flow.
_POLICY = datapaths.policy(latency_change_ns=1)
_SETTLE_S, _STILL_S, _RECEIVE_S = 5.0, 0.05, 5.0
_NUMBER = re.compile(re.escape(traffic.PAYLOAD_TAG) + rb"(....)", re.DOTALL)
# of `ping`, which rounds to three digits
_ECHO = re.compile(r"icmp_seq=(\d+) .*time=([\d.]+) ms")
Bounds = Mapping[int, int]


@dataclass(frozen=True)
class Observed:
    """Counters and reports of one situation. `bounds`: nanoseconds by number of the packet."""

    counters: Mapping[str, int]
    pending: int
    flows: Sequence[v05.LocalReport]
    drops: Sequence[v05.DropReport]
    bounds: Bounds
    wall_ns: int

    def false_flows(self, ports: tuple[int, int] | None, *, measured: bool = True) -> int:
        """Count flow reports that say what did not happen, or say it again.

        `ports` are those by which the packets came and left, None if none left. `measured`: they
        came in by a hook, so their latency is more than 0 and less than their bound.
        """
        seen: set[int] = set()
        false = 0
        for report in self.flows:
            number = number_of(report.packet)
            bound = self.bounds.get(number, 0) if self.bounds else self.wall_ns
            is_possible = 0 < report.hop_latency < bound if measured else not report.hop_latency
            is_first = not self.bounds or number not in seen
            seen.add(number)
            false += not (
                is_possible and is_first and (report.ingress_port, report.egress_port) == ports
            )
        return false


class Observer:
    """Watches one situation after the other, each with a watchlist of its own."""

    def __init__(self, stage: Stage) -> None:
        self._datapath = stage.datapath
        self._watchlists = itertools.count(1)

    def observe(self, rules: Iterable[Mapping[str, Any]], do: Callable[[], Bounds]) -> Observed:
        """Watch by these fields of rules while something is done; it returns bounds, or none."""
        watchlist = next(self._watchlists)
        report = bpf_types.RuleAction.REPORT
        made = [classifier.Rule(n, watchlist, report, **each) for n, each in enumerate(rules, 1)]
        self._datapath.watch(made, {watchlist: _POLICY})
        self._datapath.drain()
        begun = time.monotonic_ns()
        bounds = do()
        wall_ns = time.monotonic_ns() - begun
        counters, pending = self._settled(watchlist)
        reports = [v05.decode(data) for data in self._datapath.drain()]
        flows = [each for each in reports if isinstance(each, v05.LocalReport)]
        drops = [each for each in reports if isinstance(each, v05.DropReport)]
        return Observed(counters, pending, flows, drops, bounds, wall_ns)

    def _settled(self, watchlist: int) -> tuple[Mapping[str, int], int]:
        """Return counters that add up and no longer change. Raises AssertionError."""
        deadline = time.monotonic() + _SETTLE_S
        before, since = None, time.monotonic()
        while True:
            found = self._datapath.identity(watchlist)
            if found != before:
                before, since = found, time.monotonic()
            differences = (found.watched_difference, found.drops_difference)
            if differences == (0, 0) and time.monotonic() - since > _STILL_S:
                return found.counters, found.pending
            assert time.monotonic() < deadline, (differences, found)
            time.sleep(0.01)


def number_of(frame: bytes) -> int:
    """Return the number of the packet in a report: of `traffic.payload`, or of an echo, or -1."""
    if found := _NUMBER.search(frame):
        return int(struct.unpack("!I", found[1])[0])
    packet = deaths.inner.parse(frame)
    if packet.protocol_name == "SCTP":
        return packet.source_port or -1
    if packet.icmp_type is None:
        return -1
    header_bytes = 14 + (20 if packet.protocol_name == "ICMP" else 40)
    return int.from_bytes(frame[header_bytes + 6 : header_bytes + 8], "big")


def exchange(
    sender: socket.socket,
    target: tuple[str, int],
    receiver: socket.socket,
    packets: Sequence[bytes],
) -> list[int]:
    """Send packets one by one; return the nanoseconds until each was received."""
    receiver.settimeout(_RECEIVE_S)
    took = []
    for packet in packets:
        begun = time.monotonic_ns()
        sender.sendto(packet, target)
        receiver.recv(1 << 16)
        took.append(time.monotonic_ns() - begun)
    return took


def datagrams(
    source: Namespace, target: tuple[str, int], receiver: socket.socket, count: int, size: int = 64
) -> Bounds:
    """Send numbered datagrams to a socket; return the bound of each."""
    packets = [traffic.payload(number, size) for number in range(count)]
    with source.socket(traffic.family_of(target[0]), socket.SOCK_DGRAM) as sender:
        return dict(enumerate(exchange(sender, target, receiver, packets)))


def echoes(source: Namespace, address: str, count: int) -> Bounds:
    """Send echo requests; return the round trip of each."""
    shown = source.run(*f"ping -n -i 0.002 -W 2 -c {count} {address}".split())
    return {int(n): _longest_ns(ms) for n, ms in _ECHO.findall(shown)}


def _longest_ns(milliseconds: str) -> int:
    """The longest time that is printed like this."""
    decimals = len(milliseconds.partition(".")[2])
    return int((float(milliseconds) + 10**-decimals) * 1e6)


def conversation(source: Namespace, target: tuple[str, int], count: int) -> Bounds:
    """Have an echo server return so many messages, and end the connection from both ends."""
    with source.socket(traffic.family_of(target[0]), socket.SOCK_STREAM) as client:
        client.settimeout(_RECEIVE_S)
        client.connect(target)
        for number in range(count):
            client.sendall(traffic.payload(number))
            client.recv(1 << 16)
        # Both ends have a whole socket until the last segment: a TIME_WAIT one takes no part here.
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    return {}
