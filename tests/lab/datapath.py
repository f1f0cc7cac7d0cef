# SPDX-License-Identifier: Apache-2.0
"""The datapath without an agent process: loaded, configured and attached by the test, its rings read by the test.

For tests that need every single report, settings that the API does not allow (an interval of 0), or no process beside the traffic.
"""

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from hostint_agent import (
    attach,
    bpf_calls,
    bpf_types,
    classifier,
    counters,
    delivery,
    kernel,
    loader,
    tables,
)
from tests.lab.namespace import Namespace
from tests.pins import pin_directory

CGROUP_ROOT = Path("/sys/fs/cgroup")
ALL_EVENTS = 7
NO_CHANGE = 0
_TYPES = {"ingress": bpf_calls.TCX_INGRESS, "egress": bpf_calls.TCX_EGRESS}


def everything(watchlist: int = 1) -> classifier.Rule:
    """A rule that reports every IP packet."""
    return classifier.Rule(1, watchlist, bpf_types.RuleAction.REPORT)


def policy(**fields: int) -> bpf_types.Policy:
    """Report settings; every packet is due unless `interval_ns` says otherwise."""
    return bpf_types.Policy(**({"events": ALL_EVENTS, "sample": 1} | fields))


class Datapath:
    """Programs, maps and links of our own, in the network namespace of a node; see `loaded`."""

    def __init__(self, namespace: Namespace, pin_dir: Path, bpf_dir: Path | None = None) -> None:
        self.namespace = namespace
        self.directory = loader.load(pin_dir, bpf_dir)
        self.maps = self.directory / "maps"
        self.tables = tables.Tables(self.maps)
        self.counters = counters.Counters(self.maps)
        self.config = kernel.DatapathConfig(self.maps)
        namespace.inside(self.config.configure)
        self.config.set_node_id(1)
        self._links: list[int] = []
        self._rings = _RingReader(self.maps)

    def program(self, name: str) -> int:
        """A descriptor of `ingress`, `egress` or `drop`; the caller closes it."""
        return bpf_calls.obj_get(self.directory / "programs" / name)

    def watch(
        self,
        rules: Sequence[classifier.Rule],
        policies: dict[int, bpf_types.Policy] | None = None,
        collectors: dict[int, bpf_types.Collector] | None = None,
    ) -> None:
        """Make rules live. By default watchlist 1 reports every packet to collector 0, 128 bytes of it."""
        image = classifier.compile_rules(rules)
        self.tables.commit(
            image,
            policies or {1: policy()},
            collectors or {0: bpf_types.Collector(snap_length=bpf_types.SNAP_BYTES)},
        )

    def attach(self, interface: str, hooks: Sequence[str] = ("ingress", "egress")) -> None:
        """Attach first in order to an interface of the namespace."""
        index = self.namespace.inside(lambda: socket.if_nametoindex(interface))
        for hook in hooks:
            self.attach_program(self.program(hook), index, _TYPES[hook])

    def attach_program(
        self, program: int, ifindex: int, kind: int, where: Namespace | None = None
    ) -> None:
        """Attach any program to a TCX hook, ours to close; `where` if not in the node's own namespace."""
        create = lambda: bpf_calls.tcx_link_create(program, ifindex, kind)  # noqa: E731
        self._links.append((where or self.namespace).inside(create))
        os.close(program)

    def attach_drop(self) -> None:
        """Attach the drop program; it sees drops of the whole machine and takes those of this namespace."""
        program = self.program("drop")
        self._links.append(bpf_calls.raw_tracepoint_open(attach.DROP_TRACEPOINT, program))
        os.close(program)

    def attach_delivery(self, root: Path = CGROUP_ROOT) -> None:
        """Attach what sees packets being taken: by the sockets of the whole machine, and by this namespace itself."""
        self.attach_to_sockets(self.program("deliver"), root)
        program = self.program("local_in")
        for family in (socket.AF_INET, socket.AF_INET6):
            attach_it = lambda f=family: delivery.local_in(program, f)  # noqa: E731
            self._links.append(self.namespace.inside(attach_it))
        os.close(program)

    def attach_to_sockets(self, program: int, root: Path = CGROUP_ROOT) -> None:
        """Attach any cgroup_skb program, ours to close, to what the sockets of the whole machine receive."""
        self._links.append(delivery.sockets(program, delivery.cgroup_root(root)))
        os.close(program)

    def detach(self) -> None:
        """Detach everything."""
        while self._links:
            os.close(self._links.pop())

    def enable(self) -> None:
        """Let the programs look at packets."""
        self.config.set_enabled(True)

    def drain(self) -> list[bytes]:
        """Take every report that waits, ring after ring; each as it would go into a datagram."""
        return self._rings.drain()

    def identity(self, watchlist: int = 1) -> counters.Identity:
        """The accounting identity of a watchlist now."""
        return self.counters.identity(watchlist)


class _RingReader:
    """Reads the report rings as the exporter would, and moves their tails."""

    def __init__(self, maps: Path) -> None:
        def memory(name: str) -> tuple[memoryview, int, int]:
            opened = bpf_calls.Map.open(maps / name)
            mapped = memoryview(opened.memory())
            found = (mapped, opened.stride, opened.max_entries)
            opened.close()
            return found

        self._records, self._stride, total = memory("report_records")
        self._iovs, _, _ = memory("report_iovs")
        heads, self._position_bytes, self._count = memory("ring_heads")
        tails, _, _ = memory("ring_tails")
        self._heads, self._tails = heads, tails
        self._size = total // self._count

    def drain(self) -> list[bytes]:
        taken = []
        for ring in range(self._count):
            at = ring * self._position_bytes
            head = struct.unpack_from("=Q", self._heads, at)[0]
            tail = struct.unpack_from("=Q", self._tails, at)[0]
            for position in range(tail, head):
                index = ring * self._size + position % self._size
                length = struct.unpack_from("=Q", self._iovs, 16 * index + 8)[0]
                start = self._stride * index
                taken.append(bytes(self._records[start : start + length]))
            ctypes.c_uint64.from_buffer(self._tails, at).value = head
        return taken


@contextlib.contextmanager
def loaded(namespace: Namespace, bpf_dir: Path | None = None) -> Iterator[Datapath]:
    """A datapath for one node; everything of it is gone afterwards."""
    with pin_directory("datapath") as pins:
        datapath = Datapath(namespace, pins, bpf_dir)
        try:
            yield datapath
        finally:
            datapath.detach()
