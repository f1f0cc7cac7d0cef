# SPDX-License-Identifier: Apache-2.0
"""Ground truth: which packet was on which hook when, by recorders around the programs under test, and what reports are held against it.

A report tells two times. Each lies between the two times that the recorders took right before and right after the program
that read the clock, on its CPU, so it names one packet on one hook. A report is true if both its times name the same
packet, that packet is the one in the report, and the ports are those of the hooks. Anything else is false.
"""

import ctypes
import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hostint_agent import bpf_calls, bpf_types, classifier, kernel
from tests.lab import compiled

HERE = Path(__file__).parent
PROGRAMS = tuple(
    f"{when}_{hook}" for hook in ("ingress", "egress", "deliver") for when in ("before", "after")
)
INGRESS, EGRESS, DELIVER = 0, 1, 2
IDENTITY = [
    *((name, "u8") for name in "abc"),
    *((name, "u4") for name in ("source", "destination")),
    *((name, "u2") for name in ("sport", "dport")),
    *((name, "u1") for name in ("protocol", "outer", "fragment", "complete")),
]
RECORD = np.dtype(
    [
        ("start_ns", "u8"),
        *IDENTITY,
        *((name, "u4") for name in ("ifindex", "ingress_ifindex", "duration_ns")),
        *((name, "u2") for name in ("segments", "hook")),
    ]
)
_POSITION = np.dtype(
    [
        (name, "u8")
        for name in "count overflow unpaired open packets super_packets first pad".split()
    ]
)
_LOCAL_BYTES, _DROP_BYTES = 28, 24
_STILL_S = 0.03
# of a packet's number, see flood.c
_REPLY = np.uint64(0x80 << 56)
_DROP_BIT = 1 << 23
_HW_ID_CPU = 31
_MASK32 = 0xFFFFFFFF


def key_of(events: np.ndarray) -> np.ndarray:
    """One number for each packet's identity."""
    mixed = events["a"] * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(31)
    mixed = (mixed ^ events["b"]) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(29)
    mixed = (mixed ^ events["c"]) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(32)) ^ events["protocol"]


class Recorder:
    """The recorders' maps. Loaded once; attached by whoever has the programs under test."""

    def __init__(self, pins: Path, records_per_cpu: int) -> None:
        self.pins = pins
        self.cpus = bpf_calls.possible_cpus()
        self._per_cpu = records_per_cpu
        offsets = kernel.offsets()
        sizes = {
            "NR_TRUTH_RECORDS": self.cpus * records_per_cpu,
            "TRUTH_RECORDS_PER_CPU": records_per_cpu,
            "NR_TRUTH_POSITIONS": self.cpus + 1,
            "SKB_DEV": offsets.skb_dev,
            "DEV_NET": offsets.dev_net,
            "NET_COOKIE": offsets.net_cookie,
        }
        compiled.bpf(HERE / "truth.c", pins, PROGRAMS, sizes)
        self._records = self._array("truth_records", RECORD)
        self._positions = self._array("truth_positions", _POSITION)
        self._protocol = self._array("truth_protocol", np.dtype("u8"))
        self.began_ns = 0

    def _array(self, name: str, kind: np.dtype) -> np.ndarray:
        opened = bpf_calls.Map.open(self.pins / name)
        memory = opened.memory()
        opened.close()
        count = opened.max_entries
        return np.frombuffer(memory, kind, count)

    def program(self, name: str) -> int:
        """A descriptor of one of PROGRAMS; the caller closes it."""
        return bpf_calls.obj_get(self.pins / name)

    def reset(self) -> None:
        """Forget what happened while the recorders were attached one after the other."""
        self._positions[: self.cpus] = np.zeros(1, _POSITION)

    def begin(self, protocol: int) -> None:
        """A run begins now, with the gate closed: packets of this protocol are its progress.

        What was sent before may still come; it is not of the run.
        """
        here = self._positions[: self.cpus]
        here["first"] = here["count"]
        self.began_ns = time.monotonic_ns()
        for column in ("packets", "super_packets", "overflow", "unpaired"):
            here[column] = 0
        self._protocol[0] = protocol

    def open_gate(self) -> None:
        """Let the senders send."""
        self._positions["count"][self.cpus] = 1

    def end(self, drain: "Drain") -> None:
        """Close the gate for the senders, and return when what was on its way has arrived."""
        self._positions["count"][self.cpus] = 0
        self.settle(drain)

    def settle(self, drain: "Drain", timeout_s: float = 20.0) -> None:
        """Return when no packet and no report has come for a while. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        before, still_since = None, time.monotonic()
        while time.monotonic() - still_since < _STILL_S:
            now = (self._positions["count"].tobytes(), drain.count)
            if now != before:
                before, still_since = now, time.monotonic()
            if time.monotonic() > deadline:
                raise TimeoutError("traffic goes on although the senders have stopped")
            time.sleep(0.005)

    def log(self) -> np.ndarray:
        """What was recorded, with the CPU of each record. Raises AssertionError if the recorders were not in order."""
        here = self._positions[: self.cpus]
        assert not here["overflow"].any(), "more packets than the recorders have room for"
        assert not here["unpaired"].any(), "a recorder ran without the other"
        parts = []
        for cpu in range(self.cpus):
            places = np.arange(int(here["first"][cpu]), int(here["count"][cpu])) % self._per_cpu
            parts.append(self._records[cpu * self._per_cpu + places])
        log = np.concatenate(parts)
        cpus = np.repeat(np.arange(self.cpus, dtype="u2"), [len(part) for part in parts])
        return _with(log, cpu=cpus)


def _with(table: np.ndarray, **columns: np.ndarray) -> np.ndarray:
    """The table with more columns."""
    kinds = table.dtype.descr + [(name, column.dtype.str) for name, column in columns.items()]
    wide = np.empty(len(table), np.dtype(kinds))
    for name in table.dtype.names:
        wide[name] = table[name]
    for name, column in columns.items():
        wide[name] = column
    return wide


@dataclasses.dataclass(frozen=True)
class Reports:
    """Reports in columns. Times are of CLOCK_MONOTONIC, as the recorders'."""

    cpu: np.ndarray
    ingress_ns: np.ndarray
    egress_ns: np.ndarray
    ingress_port: np.ndarray
    egress_port: np.ndarray
    shown: np.ndarray
    dropped: np.ndarray

    def __len__(self) -> int:
        return len(self.cpu)

    def since(self, at_ns: int) -> "Reports":
        """Without reports of packets that came before."""
        kept = self.ingress_ns >= at_ns
        columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        flows = {n: column[kept] for n, column in columns.items() if n != "dropped"}
        return Reports(**flows, dropped=self.dropped)


class Drain:
    """Empties the report rings in a thread, fast: the rings hold a fraction of a second of what the senders can do."""

    def __init__(self, maps: Path, library: Path) -> None:
        self._identify = ctypes.CDLL(str(library)).identify_reports
        self._records = _memory(maps / "report_records", np.dtype("u1"))
        self._iovs = _memory(maps / "report_iovs", np.dtype("u8"))
        self._heads = _memory(maps / "ring_heads", np.dtype("u8"))
        self._tails = _memory(maps / "ring_tails", np.dtype("u8"))
        self._size = len(self._records) // len(self._heads)
        self.count = 0
        self._taken: list[tuple[np.ndarray, np.ndarray, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Drain":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._turn():
                time.sleep(0.001)

    def _turn(self) -> int:
        moved = 0
        for ring in range(len(self._heads)):
            head, tail = int(self._heads[ring, 0]), int(self._tails[ring, 0])
            if head == tail:
                continue
            places = ring * self._size + np.arange(tail, head) % self._size
            records = self._records[places]
            # after the copy: no time in them is later
            self._taken.append((records, self._iovs[places, 1], time.monotonic_ns()))
            self._tails[ring, 0] = head
            moved += head - tail
        self.count += moved
        return moved

    def take(self, wall_offset_ns: int) -> Reports:
        """What has come since the last time."""
        self._turn_until_empty()
        taken, self._taken = self._taken, []
        records = np.concatenate([part for part, _, _ in taken] or [self._records[:0]])
        lengths = np.concatenate([part for _, part, _ in taken] or [self._iovs[:0, 1]])
        until = np.repeat(
            np.array([at for _, _, at in taken], "i8"), [len(part) for part, _, _ in taken]
        )
        return self._decode(records, lengths, until, wall_offset_ns)

    def _turn_until_empty(self) -> None:
        deadline = time.monotonic() + 10
        while (self._heads[:, 0] != self._tails[:, 0]).any():
            if time.monotonic() > deadline:
                raise TimeoutError("the rings are not drained")
            time.sleep(0.001)

    def _decode(
        self, records: np.ndarray, lengths: np.ndarray, until: np.ndarray, offset: int
    ) -> Reports:
        words = np.ascontiguousarray(records[:, :_LOCAL_BYTES]).view(">u4").astype("i8")
        flow = words[:, 0] & _DROP_BIT == 0
        dropped = self._identities(records[~flow], lengths[~flow], _DROP_BYTES)
        shown = self._identities(records[flow], lengths[flow], _LOCAL_BYTES)
        words, until = words[flow], until[flow]
        # 32 bits of each time came; a report is drained within four seconds of its packet
        egress = until - ((until - (words[:, 6] - offset)) & _MASK32)
        return Reports(
            cpu=words[:, 0] & _HW_ID_CPU,
            ingress_ns=egress - ((words[:, 6] - words[:, 2]) & _MASK32),
            egress_ns=egress,
            ingress_port=words[:, 4] >> 16,
            egress_port=words[:, 4] & 0xFFFF,
            shown=shown,
            dropped=dropped,
        )

    def _identities(
        self, records: np.ndarray, lengths: np.ndarray, header_bytes: int
    ) -> np.ndarray:
        """The packets in reports, as their headers show them."""
        packets = np.ascontiguousarray(records[:, header_bytes:])
        lengths = np.ascontiguousarray(lengths - header_bytes, "u4")
        shown = np.zeros(len(packets), IDENTITY)
        arrays = [ctypes.c_void_p(a.ctypes.data) for a in (packets, lengths, shown)]
        sizes = map(ctypes.c_long, (packets.shape[1], len(packets)))
        self._identify(*arrays[:2], *sizes, *arrays[2:])
        return shown


def _memory(path: Path, kind: np.dtype) -> np.ndarray:
    opened = bpf_calls.Map.open(path)
    memory = opened.memory()
    opened.close()
    table = np.frombuffer(memory, kind, opened.stride * opened.max_entries // kind.itemsize)
    return table.reshape(opened.max_entries, -1)


def wall_offset_ns(maps: Path) -> int:
    """What the programs add to their times."""
    opened = bpf_calls.Map.open(maps / "config")
    offset = bpf_types.Config.from_buffer_copy(opened.lookup(bytes(4))).wall_offset_ns
    opened.close()
    return int(offset)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Flows of one watchlist: by the client's ports, or where packets have none by the client's address; both directions."""

    protocol: int
    ports: tuple[int, int] | None = None
    clients: tuple[classifier.Network, ...] = ()
    server: classifier.Network | None = None

    def rules(self, watchlist: int) -> list[classifier.Rule]:
        """As rules, one for each direction."""
        server = (self.server,) if self.server else ()
        ports = (self.ports,) if self.ports else ()
        report = bpf_types.RuleAction.REPORT
        common = {"rule_id": watchlist, "watchlist": watchlist, "protocol": self.protocol}
        forth = {"sources": self.clients, "destinations": server, "source_ports": ports}
        back = {"sources": server, "destinations": self.clients, "destination_ports": ports}
        return [classifier.Rule(action=report, **common, **way) for way in (forth, back)]

    def forth(self, events: np.ndarray) -> np.ndarray:
        """Which events go from client to server."""
        return self._way(events, "source", "sport", "destination")

    def back(self, events: np.ndarray) -> np.ndarray:
        """Which events go from server to client."""
        return self._way(events, "destination", "dport", "source")

    def has(self, events: np.ndarray) -> np.ndarray:
        """Which events are of these flows."""
        return self.forth(events) | self.back(events)

    def _way(self, events: np.ndarray, client: str, port: str, server: str) -> np.ndarray:
        found = events["protocol"] == self.protocol
        if self.ports:
            found &= (events[port] >= self.ports[0]) & (events[port] <= self.ports[1])
        if self.clients:
            found &= np.logical_or.reduce([_within(events[client], n) for n in self.clients])
        if self.server:
            found &= _within(events[server], self.server)
        return found


def _within(addresses: np.ndarray, network: classifier.Network) -> np.ndarray:
    """By the last four bytes: addresses of the lab differ there."""
    first, last = (int(a) & _MASK32 for a in (network[0], network[-1]))
    return (addresses >= first) & (addresses <= last)


@dataclasses.dataclass
class Judgement:
    """What was due, what of it was reported, and how many reports were false, by what made them so."""

    packets: int
    due: dict[str, int]
    matched: dict[str, int]
    false: dict[str, int]
    false_reports: int
    watched: int


class Judge:
    """Holds the reports of one run against its log.

    `ends`: what reports of packets that a socket takes must name as egress port, by its network namespace (low half of the
    cookie): 0 for the host's, else the port of the pod's interface.
    """

    def __init__(
        self,
        log: np.ndarray,
        reports: Reports,
        wanted: Selection,
        others: Sequence[Selection],
        ends: Mapping[int, int],
    ) -> None:
        self._log = _without_later_looks(log)
        self._reports = reports
        self._wanted = wanted
        self._others = others
        self._ends = ends
        self._key = key_of(self._log)
        self._ingress = np.flatnonzero(self._log["hook"] == INGRESS)
        # where a packet is seen for the second time: as it leaves, or as a socket takes it
        self._second = np.flatnonzero(self._log["hook"] != INGRESS)
        self._egress = np.flatnonzero(self._log["hook"] == EGRESS)
        self._partner = self._partners()
        self._port = self._ports_of_departure()

    def _partners(self) -> np.ndarray:
        """For each event the one of the same packet on the other hook, -1 where there is none."""
        partner = np.full(len(self._log), -1)
        for ours, theirs in ((self._ingress, self._second), (self._second, self._ingress)):
            identified = theirs[self._log["protocol"][theirs] > 0]
            if not len(identified):
                continue
            by_key = identified[np.argsort(self._key[identified], kind="stable")]
            keys = self._key[by_key]
            at = np.searchsorted(keys, self._key[ours]).clip(max=len(keys) - 1)
            same = (keys[at] == self._key[ours]) & (self._log["protocol"][ours] > 0)
            partner[ours[same]] = by_key[at[same]]
        return partner

    def _bracket(self, cpu: np.ndarray, at_ns: np.ndarray) -> np.ndarray:
        """The event that a program saw at this time on this CPU, -1 if there was none."""
        found = np.full(len(at_ns), -1)
        starts, lasts = self._log["start_ns"].astype("i8"), self._log["duration_ns"].astype("i8")
        for number in np.unique(cpu):
            mine = np.flatnonzero(cpu == number)
            first, end = np.searchsorted(self._log["cpu"], [number, number + 1])
            if first == end:
                continue
            at = first + np.searchsorted(starts[first:end], at_ns[mine], "right") - 1
            inside = (at >= first) & (at_ns[mine] <= starts[at] + lasts[at])
            found[mine[inside]] = at[inside]
        return found

    def judge(self) -> Judgement:
        """Everything there is to say."""
        told, of_flows = self._check_reports()
        of_drops = self._check_drops()
        expected = self._expected()
        due, matched = {}, {}
        for name, events in expected.items():
            due[name] = len(events)
            matched[name] = int(np.isin(events, told).sum())
        selected = self._selected(self._wanted)
        return Judgement(
            packets=int((self._log["protocol"][self._ingress] == self._wanted.protocol).sum()),
            due=due,
            matched=matched,
            false={name: int(mask.sum()) for name, mask in (of_flows | of_drops).items()},
            false_reports=self._count_false(of_flows) + self._count_false(of_drops),
            watched=self._count_watched(selected, told),
        )

    def _selected(self, selection: Selection) -> np.ndarray:
        """Events of packets that the selection has, as they came in or as they left."""
        has = selection.has(self._log)
        paired = self._partner >= 0
        has[paired] |= has[self._partner[paired]]
        return has

    def _count_watched(self, selected: np.ndarray, told: np.ndarray) -> int:
        """What the datapath must count: what is in a rule as it comes, what it found to be as it left, what the host sent."""
        # a tunnel's packet has another tuple when it comes
        arrived = self._wanted.has(self._log) & (self._log["outer"] == 0)
        by_nat = selected[told] & (self._partner[told] >= 0) & ~arrived[self._partner[told]]
        sent = selected[self._egress] & self._is_sent(self._egress)
        left = self._log["hook"][told] != INGRESS
        return int(arrived[self._ingress].sum() + (by_nat & left).sum() + sent.sum())

    def _is_sent(self, events: np.ndarray) -> np.ndarray:
        return (self._partner[events] < 0) & (self._log["ingress_ifindex"][events] == 0)

    def _expected(self) -> dict[str, np.ndarray]:
        """Events that must be reported, by what they are."""
        selected = self._selected(self._wanted)
        out = self._egress[selected[self._egress]]
        reached = selected & (self._partner >= 0) & (self._port >= 0)
        seen_twice = self._second[reached[self._second]]
        forth = self._wanted.forth(self._log) | self._wanted.forth(self._log[self._partner])
        arrived = (self._log["hook"] == DELIVER) & (self._port == 0)
        return {
            "forth": seen_twice[forth[seen_twice] & ~arrived[seen_twice]],
            "back": seen_twice[~forth[seen_twice] & ~arrived[seen_twice]],
            "sent": out[self._is_sent(out)],
            "arrived": seen_twice[arrived[seen_twice]],
        }

    def _check_reports(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Events that reports speak of truly, and which reports are false for what reason."""
        reports = self._reports
        event = self._bracket(reports.cpu, reports.egress_ns)
        known = event >= 0
        false = {"no such time": ~known}
        false["another packet"] = known & ~self._same_content(event, reports.shown)
        false["another arrival"] = known & ~self._same_arrival(event)
        false["another port"] = known & ~self._same_port(event)
        selected = np.logical_or.reduce([self._selected(s) for s in (self._wanted, *self._others)])
        false["not watched"] = known & ~selected[event]
        false["another tuple"] = known & ~self._same_tuple(event)
        true = np.flatnonzero(~self._is_false(false))
        told, first = np.unique(event[true], return_index=True)
        false["told twice"] = np.zeros(len(reports), bool)
        false["told twice"][np.delete(true, first)] = True
        return told, false

    def _check_drops(self) -> dict[str, np.ndarray]:
        """Which drop reports are of packets that were not dropped."""
        dropped = self._reports.dropped[self._reports.dropped["complete"] > 0]
        answered = self._log["a"][self._egress] ^ _REPLY
        return {
            "a drop of what went on": np.isin(key_of(dropped), self._key[self._egress]),
            "a drop of what was answered": np.isin(dropped["a"], answered),
        }

    def _is_false(self, reasons: dict[str, np.ndarray]) -> np.ndarray:
        """Which reports are false for any reason."""
        return np.logical_or.reduce(list(reasons.values()))

    def _count_false(self, reasons: dict[str, np.ndarray]) -> int:
        return int(self._is_false(reasons).sum())

    def _same_tuple(self, event: np.ndarray) -> np.ndarray:
        """The tuple is the one that is in a rule: as the packet left, else as it came."""
        log, shown = self._log, self._reports.shown
        now = np.logical_or.reduce([s.has(log) for s in (self._wanted, *self._others)])
        meant = log[np.where(now[event] | (self._partner[event] < 0), event, self._partner[event])]
        parts = ("protocol", "source", "destination", "sport", "dport")
        return np.logical_and.reduce([shown[part] == meant[part] for part in parts])

    def _same_content(self, event: np.ndarray, content: np.ndarray) -> np.ndarray:
        log = self._log[event]
        same = (content["a"] == log["a"]) & (content["b"] == log["b"]) & (content["protocol"] > 0)
        return same & ((content["complete"] == 0) | (content["c"] == log["c"]))

    def _same_arrival(self, event: np.ndarray) -> np.ndarray:
        """The time of arrival is in a bracket of the same packet on the port that is named."""
        reports, log = self._reports, self._log
        same = np.zeros(len(event), bool)
        for cpu in range(int(log["cpu"].max(initial=0)) + 1):
            at = self._bracket(np.full(len(event), cpu), reports.ingress_ns)
            same |= (
                (at >= 0)
                & (log["hook"][at] == INGRESS)
                & (self._key[at] == self._key[event])
                & (log["ifindex"][at] == reports.ingress_port)
            )
        observed_once = reports.ingress_ns == reports.egress_ns
        sent = observed_once & (reports.ingress_port == 0) & self._is_sent(event)
        return (log["hook"][event] != INGRESS) & (same | sent)

    def _same_port(self, event: np.ndarray) -> np.ndarray:
        """The port of departure is that of the hook, or of the interface of the pod that took the packet; 0: the host."""
        return self._reports.egress_port == self._port[event]

    def _ports_of_departure(self) -> np.ndarray:
        """What a report about each event must name; -1: nothing that it could name."""
        log = self._log
        port = np.where(log["hook"] == EGRESS, log["ifindex"].astype("i8"), -1)
        for cookie, end in self._ends.items():
            port[(log["hook"] == DELIVER) & (log["ingress_ifindex"] == cookie)] = end
        return port


def _without_later_looks(log: np.ndarray) -> np.ndarray:
    """In order of CPU and time; of what left by a hook it does not matter which socket took it elsewhere."""
    keys = key_of(log)
    left = np.isin(keys, keys[log["hook"] == EGRESS])
    came = np.isin(keys, keys[log["hook"] == INGRESS])
    kept = log[(log["hook"] != DELIVER) | (came & ~left & (log["protocol"] > 0))]
    return kept[np.lexsort((kept["start_ns"], kept["cpu"]))]


def build_library(directory: Path) -> Path:
    """identity.h for reports."""
    flags = ("-Wno-unused-function", "-shared", "-fPIC")
    return compiled.native(HERE / "identify.c", directory / "identify.so", *flags)
