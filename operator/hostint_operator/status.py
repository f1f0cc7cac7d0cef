# SPDX-License-Identifier: Apache-2.0
"""Pure: what the status of a watchlist and of a collector says, in conditions that kstatus, Argo CD and `kubectl wait` read right.

Ready is True only if every selected node runs this generation now. What is not Ready is either Reconciling (it may get ready by itself) or Stalled (it
needs a person), never both. What depends on others than the object itself is Reconciling for a grace time first.
"""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hostint_api import conditions, names
from hostint_operator import compile as compiler
from hostint_operator import desired_state, endpoints

# How long something that may heal by itself is called Reconciling before it is called Stalled.
GRACE_S = 120.0
# How long an agent's answer for the same generation counts while a newer config is on its way to it.
LAG_S = 5.0
# How long an agent may take to answer before its node has failed.
ANSWER_S = 30.0
MAX_FAILURES = 10
MAX_REASON = 64
MAX_FAILURE_MESSAGE = 256
MAX_MESSAGE = 1024
_REASON = re.compile("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")

Status = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NodeView:
    """How one node stands to one watchlist; `changes_in_s` is when this will be another view by time alone."""

    name: str
    state: Literal["ready", "pending", "failed"]
    reason: str = ""
    message: str = ""
    changes_in_s: float | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """A status, and after how many seconds it has to be looked at again though nothing happens."""

    status: Status
    look_again_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Finding:
    """What is to be said: the conditions before they are put on paper.

    `own_fault`: only a change of the object itself can help. `rolling`: it is simply not finished.
    """

    accepted: tuple[bool, str, str]
    ready: tuple[bool, str, str]
    own_fault: bool = False
    rolling: bool = False


def node_view(
    name: str,
    watchlist: desired_state.Watchlist,
    *,
    wanted_digest: str,
    config: desired_state.NodeConfig | None,
    has_agent: bool,
    outdated_s: float,
) -> NodeView:
    """Judge one node: does its agent, which must be there, say that it runs this generation?"""
    if not has_agent:
        return NodeView(name, "failed", "AgentMissing", "no agent pod is Ready on this node")
    said = config.watchlists.get(watchlist.name) if config else None
    current = config is not None and config.observed_digest == wanted_digest
    if said is not None and said.generation == watchlist.generation:
        # A config that changed for another reason does not stop this watchlist on the node.
        if current or outdated_s < LAG_S:
            changes_in_s = None if current else LAG_S - outdated_s
            if said.ready:
                return NodeView(name, "ready", changes_in_s=changes_in_s)
            return NodeView(name, "failed", said.reason, said.message, changes_in_s)
    elif current:
        words = "the agent runs this configuration and says nothing of the watchlist"
        return NodeView(name, "failed", "NotReported", words)
    if outdated_s < ANSWER_S:
        return NodeView(name, "pending", changes_in_s=ANSWER_S - outdated_s)
    words = f"the agent has not confirmed generation {watchlist.generation} within {ANSWER_S:.0f} s"
    return NodeView(name, "failed", "NoAnswer", words)


def watchlist_status(
    watchlist: desired_state.Watchlist,
    verdict: compiler.Verdict,
    nodes: Sequence[NodeView],
    now: datetime.datetime,
) -> Told:
    """Fold the verdict and all nodes into the status of a watchlist."""
    counted = nodes if verdict.compiled else ()
    failed = sorted((n for n in counted if n.state == "failed"), key=lambda n: n.name)
    ready = sum(1 for n in counted if n.state == "ready")
    desired = len(nodes) if verdict.accepted else 0
    status: Status = {
        "rules": len(watchlist.spec.rules) if watchlist.spec and verdict.accepted else 0,
        "nodes": {
            "desired": desired,
            "ready": ready,
            "failed": len(failed),
            "summary": f"{ready}/{desired}",  # a printer column cannot put two numbers together
        },
        "failures": [_failure(node) for node in failed[:MAX_FAILURES]],
    }
    finding = _find(watchlist, verdict, len(nodes), ready, failed)
    told = _told(watchlist, status, finding, now)
    waits = [n.changes_in_s for n in counted if n.changes_in_s is not None]
    return Told(told.status, min([*waits, *_some(told.look_again_s)], default=None))


def collector_status(
    collector: desired_state.Collector,
    resolution: endpoints.Resolution,
    nodes: Mapping[str, desired_state.CollectorOnNode],
    now: datetime.datetime,
) -> Told:
    """Fold what is known of a collector, by the operator and by the agents, into its status."""
    accepted = (True, "Valid", "the collector is valid")
    unreachable = sorted((name, said) for name, said in nodes.items() if not said.reachable)
    if not resolution.accepted:
        accepted = (False, resolution.reason, resolution.message)
        ready = reachable = (False, "Rejected", resolution.message)
    elif not resolution.reachable:
        ready = reachable = (False, resolution.reason, resolution.message)
    elif unreachable:
        name, said = unreachable[0]
        words = f"not reachable from {len(unreachable)} of {len(nodes)} nodes; {name}: {said.message or said.reason}"
        ready = reachable = (False, _reason(said.reason, "Unreachable"), words)
    else:
        reachable = (True, resolution.reason, resolution.message)
        ready = (True, "Resolved", resolution.message)
    finding = _Finding(accepted, ready, own_fault=not resolution.accepted)
    return _told(collector, {}, finding, now, reachable)


def _find(
    watchlist: desired_state.Watchlist,
    verdict: compiler.Verdict,
    desired: int,
    ready: int,
    failed: Sequence[NodeView],
) -> _Finding:
    accepted = (verdict.accepted, verdict.reason, verdict.message)
    if not verdict.accepted:
        own_fault = verdict.reason != "CollectorNotFound"
        return _Finding(accepted, (False, "Rejected", verdict.message), own_fault=own_fault)
    if verdict.collector_problem:
        return _Finding(accepted, (False, "CollectorUnreachable", verdict.collector_problem))
    if not desired:
        words = "the nodeSelector matches no node"
        if watchlist.spec is not None and not watchlist.spec.match_labels:
            words = "the cluster has no node"
        return _Finding(accepted, (False, "NoMatchingNodes", words))
    if failed:
        words = "; ".join(f"{n.name}: {n.message or n.reason}" for n in failed[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        message = f"{len(failed)} of {_nodes(desired)} failed: {words}{more}"
        return _Finding(accepted, (False, "NodesFailed", message))
    if ready < desired:
        message = f"{ready} of {_nodes(desired)} run generation {watchlist.generation}"
        return _Finding(accepted, (False, "Progressing", message), rolling=True)
    return _Finding(accepted, (True, "Programmed", f"all of {_nodes(desired)} run this generation"))


def _told(
    known: desired_state.Watchlist | desired_state.Collector,
    status: Status,
    finding: _Finding,
    now: datetime.datetime,
    reachable: tuple[bool, str, str] | None = None,
) -> Told:
    """Put the conditions on paper, keeping the transition times of those that stay as they are."""
    before = {c["type"]: c for c in known.status.get("conditions", [])}
    wait_s = _remaining_grace_s(before.get(names.READY), now)
    good, reason, message = finding.ready
    present: dict[str, tuple[bool, str, str]] = {
        names.ACCEPTED: finding.accepted,
        names.READY: finding.ready,
    }
    if reachable is not None:
        present[names.COLLECTOR_REACHABLE] = reachable
    look_again_s = None
    if finding.rolling:
        present[names.RECONCILING] = (True, "RollingOut", message)
    elif not good and (finding.own_fault or wait_s <= 0):
        present[names.STALLED] = (True, reason, message)
    elif not good:
        present[names.RECONCILING] = (True, reason, message)
        look_again_s = wait_s
    listed = [
        conditions.set_condition(
            before.get(kind), kind, true, why, words[:MAX_MESSAGE], known.generation, now
        )
        for kind, (true, why, words) in present.items()
    ]
    return Told(
        {**status, "observedGeneration": known.generation, "conditions": listed}, look_again_s
    )


def _remaining_grace_s(ready: Mapping[str, Any] | None, now: datetime.datetime) -> float:
    """Return how much longer something that is not Ready may be called Reconciling."""
    if ready is None or ready["status"] != "False":
        return GRACE_S
    since = datetime.datetime.fromisoformat(ready["lastTransitionTime"])
    return GRACE_S - (now - since).total_seconds()


def _reason(text: str, otherwise: str) -> str:
    """Take an agent's reason if the API server would."""
    return text[:MAX_REASON] if _REASON.fullmatch(text[:MAX_REASON]) else otherwise


def _failure(node: NodeView) -> dict[str, str]:
    return {
        "node": node.name,
        "reason": _reason(node.reason, "Failed"),
        "message": node.message[:MAX_FAILURE_MESSAGE],
    }


def _nodes(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


def _some(value: float | None) -> Iterable[float]:
    return () if value is None else (value,)
