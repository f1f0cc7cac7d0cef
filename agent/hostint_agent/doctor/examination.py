# SPDX-License-Identifier: Apache-2.0
"""All checks of `hostint-agent doctor`, in their order. Each is in one of the modules `*_checks`."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from hostint_agent import settings
from hostint_agent.doctor import (
    cni_checks,
    collector_checks,
    datapath_checks,
    delivery_checks,
    finding,
    http_checks,
    node_checks,
)
from hostint_agent.doctor.finding import Finding
from hostint_agent.node_rules import Destination


def examine(chosen: settings.Settings, collectors: Sequence[Destination]) -> Iterator[Finding]:
    """Make every check, one after the other. One that cannot be made is a failure and hides no other."""
    yield from _each("kernel", lambda: node_checks.release(os.uname().release))
    yield from _each("capabilities", node_checks.own_capabilities)
    yield from _each("btf", node_checks.btf)
    yield from _each("programs", node_checks.programs)
    yield from _each("bpf jit", node_checks.jit)
    yield from _each("drop tracepoint", node_checks.drop_tracepoint)
    yield from _each("tcx", lambda: node_checks.tcx(chosen.mode))
    yield from _each("rings", node_checks.shared_memory)
    yield from _each("grace period", node_checks.grace_period)
    yield from _each("bpffs", lambda: node_checks.bpffs(chosen.pin_dir))
    yield from _each("compiler", lambda: node_checks.compiler(chosen.bpf_dir))
    yield from _each("datapath", lambda: _datapath(chosen))
    yield from _each("http", lambda: http_checks.address(chosen.http))
    yield from _each("health", lambda: http_checks.health(chosen.health))
    yield from _each(
        "collectors", lambda: collector_checks.check(collectors, chosen.state_dir, chosen.node)
    )


def _datapath(chosen: settings.Settings) -> Iterator[Finding]:
    """What depends on what is loaded: whose network namespace it is, and where its programs are."""
    loaded = None
    try:
        found, loaded = datapath_checks.find(chosen.pin_dir, chosen.bpf_dir)
        yield found
    except OSError as error:
        yield finding.unseen("datapath", error)
    yield from _each("network namespace", lambda: datapath_checks.network_namespace(loaded))
    yield from _each("interfaces", lambda: datapath_checks.attachments(chosen, loaded))
    links = chosen.pin_dir / "links"
    yield from _each("delivery", lambda: delivery_checks.check(chosen.cgroup_root, links, loaded))
    yield from _each("cni", lambda: cni_checks.check(chosen.patterns, loaded))


def _each(name: str, check: Callable[[], Finding | Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check."""
    try:
        found = check()
        yield from [found] if isinstance(found, Finding) else found
    except OSError as error:
        yield finding.unseen(name, error)
    except Exception as error:  # noqa: BLE001 (a node that nobody thought of must not keep the rest from being told)
        words = f"the check itself failed: {type(error).__name__}: {error}"
        yield finding.failure(name, words, "report this with the output of doctor")
