# SPDX-License-Identifier: Apache-2.0
"""Single packets in test runs of the programs: one comes in, and leaves, or is taken, as what a test makes of it."""

import os
import socket
from collections.abc import Callable
from typing import Any

from hostint_agent import bpf_calls, bpf_types
from hostint_report import v05
from tests.datapath import frames, runner
from tests.lab import datapath as datapaths
from tests.lab.namespace import Namespace

INTERFACE = "one0"
SOURCE, DESTINATION = b"\x0a\0\0\1", b"\x0a\0\0\2"
ROUNDS = 40
_MOST_ROUNDS = 20


class Programs:
    """Runs the TC programs on one CPU, in a namespace; the memory of a packet is seldom not that of the one before."""

    def __init__(self, namespace: Namespace, datapath: datapaths.Datapath) -> None:
        self.namespace = namespace
        self.datapath = datapath
        names = ("ingress", "egress", "deliver")
        self._fds = {name: datapath.program(name) for name in names}
        self._runners = {name: runner.Runner(fd) for name, fd in self._fds.items()}
        self._index = namespace.inside(lambda: socket.if_nametoindex(INTERFACE))

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def come(self, frame: bytes) -> None:
        assert self._runners["ingress"].run(frame, runner.context(ifindex=self._index)) == -1

    def leave(self, frame: bytes, *, sent: bool = False) -> None:
        """Forwarded, or sent by the host."""
        given = runner.context(ifindex=self._index, ingress_ifindex=0 if sent else self._index)
        assert self._runners["egress"].run(frame, given) == -1

    def taken(self, frame: bytes) -> None:
        """A socket takes it."""
        assert self._runners["deliver"].run(frame, runner.context()) == 1

    def inside(self, work: Callable[[], Any]) -> Any:
        """Do this in the namespace, on one CPU."""

        def pinned() -> Any:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            return work()

        return self.namespace.inside(pinned)

    def repeat(self, once: Callable[[], None], wanted: int) -> list[v05.Report]:
        """Do it, on one CPU, until there are so many reports; all of them.

        The memory of a packet is that of the one before unless something else took it meanwhile.
        """
        reports: list[v05.Report] = []

        def work() -> None:
            for _ in range(_MOST_ROUNDS * wanted):
                once()
                reports.extend(map(v05.decode, self.datapath.drain()))
                if len(reports) >= wanted:
                    return

        self.inside(work)
        assert len(reports) >= wanted, self.datapath.identity()
        return reports

    def waiting(self) -> dict[int, bpf_types.Slot]:
        """Slots in which a packet waits, by index."""
        table = bpf_calls.Map.open(self.datapath.maps / "slots")
        found = (bpf_types.Slot * table.max_entries).from_buffer_copy(table.values(4096))
        table.close()
        pending = bpf_types.SlotState.PENDING
        return {
            index: slot
            for index, slot in enumerate(found)
            if slot.owner & bpf_types.OWNER_STATE == pending
        }


def udp(
    port: int, payload: bytes = b"", *, source: bytes = SOURCE, destination: bytes = DESTINATION
) -> bytes:
    """A frame with a UDP datagram."""
    head = frames.transport(frames.UDP, 40000, port, 0)[:4]
    datagram = head + (8 + len(payload)).to_bytes(2, "big") + b"\0\0" + payload
    return frames.ethernet(frames.ipv4(source, destination, frames.UDP, datagram))


def vxlan(frame: bytes) -> bytes:
    """A frame in a VXLAN tunnel."""
    header = (8 << 24).to_bytes(4, "big") + (7 << 8).to_bytes(4, "big")
    return udp(frames.VXLAN_PORT, header + frame)
