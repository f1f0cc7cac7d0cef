# SPDX-License-Identifier: Apache-2.0
"""Pure: what two looks at all counters tell: how much there is of everything a second, and what was lost, where, and what that means.

Every loss has the name of its metric, without `hostint_` and `_total`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_OF_WATCHLIST = {
    "rate_limited": "Reports beyond the collector's rate limit were not written: raise its reportsPerSecond, or lengthen "
    "the watchlist's interval.",
    "ring_full": "Reports found the ring of their CPU full: see that the agent runs and gets its CPU time, or lengthen the "
    "watchlist's interval.",
    "unverified": "Packets could not be tied to their arrival beyond doubt, so nothing is reported of them: fragments that "
    "the node reassembles, packets that it puts into GRE, ESP or AH, or see slot_busy.",
    "unresolved": "Packets came in and their end was not seen: fragments that the node reassembles, packets that it cuts "
    "into segments or clones, or that end in a pod where no socket takes them; normal as long as they are few.",
    "drops_rate_limited": "Drop reports beyond the collector's rate limit were not written: raise its reportsPerSecond, or "
    "lengthen the watchlist's interval.",
    "drops_ring_full": "Drop reports found the ring of their CPU full: see that the agent runs and gets its CPU time, or "
    "lengthen the watchlist's interval.",
}
_OF_COLLECTOR = {
    "reports_failed": "Reports could not be handed to the network: the agent's log has the error, by the collector's name; "
    "check the way to it.",
}
_OF_DATAPATH = {
    "truncated": "IP packets had headers that could not be read, so no rule was tried on them: find out who sends such "
    "packets, or which driver splits them.",
    "flow_evicted": "Flows had to make room in the flow table and are reported again as if new: watch fewer flows, or raise "
    "the watchlist's sample.",
    "snapshot_failed": "Reports went without the inner packet, which could not be read; all else of the report is there, and "
    "there is nothing to do.",
    "slot_busy": "Packets met another CPU at their slot and were not followed: some in a million are normal, more ask for "
    "rules that watch less.",
    "drop_evicted": "Drops had to make room in the flow table and are reported again as if new: watch fewer flows, or raise "
    "the watchlist's sample.",
    "drop_snapshot_failed": "Drop reports went without the inner packet, which could not be read any more; all else of the "
    "report is there, and there is nothing to do.",
    "drop_nested": "Drops were not looked at while an upgrade replaced the programs; watched packets among them count as "
    "unresolved, and there is nothing to do.",
    "drop_function_unknown": "Drops were not counted by function, because the table of functions was "
    "full or the function had no name; they are counted by reason, and there is nothing to do.",
}
_OF_PROGRAM = {
    "drop_recursion_misses": "Drops in an interrupt of the drop program were not looked at; watched packets among them count "
    "as unresolved: find out what drops so many packets.",
}
MEANINGS = _OF_WATCHLIST | _OF_COLLECTOR | _OF_DATAPATH | _OF_PROGRAM


@dataclass(frozen=True, slots=True)
class Tally:
    """All that was counted at one moment; watchlists and collectors by name, the latter as (sent, failed)."""

    at_s: float
    watchlists: Mapping[str, Mapping[str, int]]
    datapath: Mapping[str, int]
    collectors: Mapping[str, tuple[int, int]]
    recursion_misses: int


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second, over so many seconds."""

    seconds: float
    watched: float
    reports: float
    sent: float
    drops: float


@dataclass(frozen=True, slots=True)
class Loss:
    """One kind of loss. `where`: how many of each watchlist or collector; empty for what has no owner."""

    name: str
    count: int
    per_second: float | None  # of late; None: not measured
    where: Mapping[str, int]
    meaning: str


def rates(before: Tally, now: Tally) -> Rates:
    """How much there was of everything between two tallies."""
    seconds = now.at_s - before.at_s

    def of(*fields: str) -> float:
        return sum(_growth(_by_owner(before, f), _by_owner(now, f)) for f in fields) / seconds

    return Rates(
        seconds=seconds,
        watched=of("watched"),
        reports=of("reported", "drops_reported"),
        sent=of("reports_sent"),
        drops=of("dropped", "dropped_late"),
    )


def losses(before: Tally | None, now: Tally) -> tuple[Loss, ...]:
    """What was lost until now; `before` says how much of it of late."""
    return tuple(_losses(before, now))


def _losses(before: Tally | None, now: Tally) -> Iterator[Loss]:
    for name, meaning in MEANINGS.items():
        counts = {owner: count for owner, count in _by_owner(now, name).items() if count}
        if not counts:
            continue
        per_second = None
        if before:
            per_second = _growth(_by_owner(before, name), counts) / (now.at_s - before.at_s)
        where = {owner: count for owner, count in counts.items() if owner}
        yield Loss(name, sum(counts.values()), per_second, where, meaning)


def _growth(before: Mapping[str, int], now: Mapping[str, int]) -> int:
    """A counter that is less than before has begun anew: its place is another watchlist's."""
    return sum(max(0, count - before.get(owner, 0)) for owner, count in now.items())


def _by_owner(tally: Tally, name: str) -> dict[str, int]:
    """A counter of every watchlist or collector; with the owner "", one that is nobody's."""
    if name == "reports_sent":
        return {owner: sent for owner, (sent, _) in tally.collectors.items()}
    if name in _OF_COLLECTOR:
        return {owner: failed for owner, (_, failed) in tally.collectors.items()}
    if name in _OF_PROGRAM:
        return {"": tally.recursion_misses}
    if name in _OF_DATAPATH:
        return {"": tally.datapath.get(name, 0)}
    # a sum of CPUs that is read while they count may be below zero for a moment
    return {owner: max(0, counted[name]) for owner, counted in tally.watchlists.items()}
