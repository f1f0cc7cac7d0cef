# SPDX-License-Identifier: Apache-2.0
"""What came in so far: counts by node and kind, losses by sequence numbers. Pure."""

from collections import Counter

from hostint_collector.record import Record
from hostint_collector.sequence import SequenceTracker


class Summary:
    """Counts records; `trackers` has one entry a (source, node id, hw id)."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.by_node: Counter[tuple[str, str]] = Counter()
        self.drops: Counter[str] = Counter()
        self.trackers: dict[tuple[str, int, int], SequenceTracker] = {}

    def add(self, record: Record) -> int:
        """Count a record; returns how many reports turned out to be lost just before it."""
        self.kinds[record["kind"]] += 1
        if record["kind"] == "malformed":
            return 0
        self.by_node[record["node"], record["kind"]] += 1
        if record["kind"] == "drop":
            self.drops[record["dropReasonName"]] += 1
        key = (record["source"], record["nodeId"], record["hwId"])
        tracker = self.trackers.get(key)
        if tracker is None:
            tracker = self.trackers[key] = SequenceTracker()
        return tracker.see(record["sequence"])

    @property
    def lost(self) -> int:
        """Reports that never came, by the gaps in the sequence numbers."""
        return sum(tracker.lost for tracker in self.trackers.values())

    def lines(self, kernel_drops: int) -> list[str]:
        """The summary for a person."""
        total = sum(self.kinds.values()) - self.kinds["malformed"]
        kinds = ", ".join(f"{self.kinds[kind]} {kind}" for kind in ("flow", "drop", "queue"))
        lines = [
            f"{total} reports ({kinds}), {self.lost} lost, {self.kinds['malformed']} malformed"
        ]
        if kernel_drops:
            lines.append(f"{kernel_drops} datagrams dropped at this socket: its buffer was full")
        for (node, kind), count in sorted(self.by_node.items()):
            lines.append(f"  node {node}: {count} {kind}")
        for name, count in self.drops.most_common():
            lines.append(f"  dropped, {name}: {count}")
        return lines
