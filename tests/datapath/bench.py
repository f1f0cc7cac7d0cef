# SPDX-License-Identifier: Apache-2.0
"""A node with pods, a datapath whose outcomes can be forced, and senders that know how many packets really came in."""

import contextlib
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from hostint_agent import bpf_calls, bpf_types, classifier, counters
from tests.lab import datapath as datapaths
from tests.lab.namespace import Namespace
from tests.lab.topology import Lab, Mode, Node, Pod

CPUS = sorted(os.sched_getaffinity(0))[:2]
WAIT_S = 20.0
# the kernel drops before any hook what comes while 1,000 packets wait for a CPU
MOST_WAITING = 300
HOUR_NS = 3600 * 10**9
NEVER_SAMPLED = 0xFFFFFFFF
Destination = Callable[[int], tuple[str, int]]


def until(check: Callable[[], bool], what: str) -> None:
    """Wait for something. Raises TimeoutError."""
    deadline = time.monotonic() + WAIT_S
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {WAIT_S} s: {what}")
        time.sleep(0.002)


def udp_to(watchlist: int, port: int, last: int | None = None) -> classifier.Rule:
    """A rule that reports UDP to a port, or to a range of them."""
    return classifier.Rule(
        rule_id=watchlist,
        watchlist=watchlist,
        action=bpf_types.RuleAction.REPORT,
        protocol=17,
        destination_ports=((port, last or port),),
    )


@dataclass
class Bench:
    """One node and its datapath. Every test takes watchlists that no other had, so their counters begin at 0."""

    lab: Lab
    datapath: datapaths.Datapath
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _ports: Iterator[int] = field(default_factory=lambda: itertools.count(20_000, 8))

    @property
    def node(self) -> Node:
        return self.lab.nodes[0]

    @property
    def client(self) -> Pod:
        return self.node.pods[0]

    @property
    def server(self) -> Pod:
        return self.node.pods[1]

    def number(self) -> int:
        """A watchlist that nobody had."""
        return next(self._numbers)

    def port(self) -> int:
        """A UDP port that nobody had, and seven more behind it: flows that the flow table does not know."""
        return next(self._ports)

    def watched(self, *watchlists: int) -> int:
        return sum(self.datapath.counters.watchlist(n)["watched"] for n in watchlists)

    def settled(self, watchlist: int, watched: int) -> counters.Identity:
        """The identity once so many packets were watched and all of them have an outcome."""

        # counters and slots are not read at one moment: a packet that waits may get its outcome in between, so what was
        # found to be settled is what is returned
        last: list[counters.Identity] = []

        def is_settled() -> bool:
            found = self.datapath.identity(watchlist)
            last[:] = [found]
            settled = not (found.watched_difference or found.drops_difference)
            return settled and found.counters["watched"] == watched

        with contextlib.suppress(TimeoutError):  # the assertion below says more
            until(is_settled, "")
        found = last[0]
        assert found.counters["watched"] == watched, found
        assert (found.watched_difference, found.drops_difference) == (0, 0), found
        return found

    def outcome(self, watchlist: int, watched: int) -> dict[str, int]:
        """Every counter that is not 0, beside `watched`; `pending` is one of them."""
        found = self.settled(watchlist, watched)
        listed = {**found.counters, "pending": found.pending}
        return {name: value for name, value in listed.items() if value and name != "watched"}

    def sequence(self, ring: int, collector: int = 0) -> int:
        """Numbers taken so far."""
        index = ring * bpf_types.MAX_COLLECTORS + collector
        return self._word("sequences", index)

    def head(self, ring: int) -> int:
        """Records written so far."""
        return self._word("ring_heads", ring)

    def _word(self, name: str, index: int) -> int:
        table = bpf_calls.Map.open(self.datapath.maps / name)
        try:
            return int(struct.unpack_from("=Q", table.lookup(struct.pack("=I", index)))[0])
        finally:
            table.close()


@contextlib.contextmanager
def bench(mode: Mode = "routed", interfaces: Sequence[str] = ("pod0", "pod1", "eth0")):
    """Build one; it watches nothing yet. Neighbours are known for good, so that no ARP is in the counts."""
    with Lab(nodes=1, mode=mode) as lab:
        node = lab.nodes[0]
        for pod in node.pods:
            device = "cni0" if mode == "bridged" else pod.interface
            _know(node.namespace, pod.address, device, pod.namespace, "eth0")
            gateway = f"10.244.{node.number}.1"
            _know(pod.namespace, gateway, "eth0", node.namespace, device)
        _know(node.namespace, lab.collector_address, "eth0", lab.collector, "eth0")
        _know(lab.collector, node.address, "eth0", node.namespace, "eth0")
        with datapaths.loaded(node.namespace) as datapath:
            for interface in interfaces:
                datapath.attach(interface)
            datapath.attach_drop()
            datapath.enable()
            yield Bench(lab, datapath)


def _know(where: Namespace, address: str, device: str, owner: Namespace, interface: str) -> None:
    shown = owner.run("ip", "-o", "link", "show", "dev", interface)
    mac = shown.split("link/ether ")[1].split()[0]
    where.run(*f"ip neigh replace {address} lladdr {mac} dev {device} nud permanent".split())


class Sender:
    """Sends datagrams, from the first pod by default, on CPUs of its choice and no faster than they come in."""

    def __init__(self, bench: Bench, *watchlists: int, source: Namespace | None = None) -> None:
        self._bench = bench
        self._source = source or bench.client.namespace
        self._watchlists = watchlists
        # of its own, since a map's buffers are for one thread at a time
        self._counters = counters.Counters(bench.datapath.maps)
        self._lock = threading.Lock()
        self._before = self._watched()
        self._sent: dict[int, int] = {}

    @property
    def sent(self) -> int:
        """How many packets so far."""
        return sum(self._sent.values())

    def _watched(self) -> int:
        with self._lock:
            return sum(self._counters.watchlist(n)["watched"] for n in self._watchlists)

    def _pace(self) -> None:
        """Do not send on before the node has seen nearly all."""
        enough = lambda: self._watched() - self._before >= self.sent - MOST_WAITING  # noqa: E731
        until(enough, "the node sees what was sent")

    def send(self, count: int, to: Destination, *, cpu: int = CPUS[0], paced: bool = True) -> None:
        """Send from the source, in a thread that stays on one CPU; softirqs of its packets run there too."""
        self._sent.setdefault(cpu, 0)

        def work() -> None:
            os.sched_setaffinity(0, {cpu})
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                for number in range(count):
                    sock.sendto(b"0123456789abcdef", to(number))
                    self._sent[cpu] += 1
                    if paced and number % 100 == 99:
                        self._pace()

        self._source.inside(work)

    def send_on_each_cpu(self, count: int, to: Destination, *, paced: bool = True) -> None:
        """`count` from each of the CPUs, at the same time."""
        failures: list[BaseException] = []

        def one(cpu: int) -> None:
            try:
                self.send(count, to, cpu=cpu, paced=paced)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=(cpu,)) for cpu in CPUS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
