# SPDX-License-Identifier: Apache-2.0
"""Checks of `hostint-agent doctor` that concern the CNI: whose programs run behind ours.

A CNI is known by the names of its programs. What that means for reports is in docs/cni.md.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hostint_agent import choice, clsact, hook_programs, interfaces, netlink
from hostint_agent.doctor import datapath_checks, finding
from hostint_agent.doctor.datapath_checks import Loaded
from hostint_agent.doctor.finding import Finding

_CHECK = "cni"
# What libbpf adds to the name of a filter, and what Cilium does: its number, and the interface.
_SUFFIX = re.compile(r":\[\d+\]$|(?<=\w)-[\w.-]+$")


@dataclass(frozen=True, slots=True)
class Other:
    """A program of another owner on a hook of a watched interface."""

    interface: str
    is_pod: bool
    direction: clsact.Direction
    name: str  # of the filter, or else of the program; empty if it may not be read


@dataclass(frozen=True, slots=True)
class Cni:
    """A CNI that attaches programs."""

    name: str
    programs: re.Pattern[str]  # found in the names of its programs
    redirects: str  # when it hands packets to pods by bpf_redirect_peer


# Cilium: pkg/datapath/loader, and the object files of bpf/ before 1.12. Calico: felix/bpf-gpl.
_KNOWN = (
    Cni(
        "Cilium",
        re.compile(r"^cil_|^bpf_(lxc|host|netdev|overlay|network)"),
        "BPF host routing",
    ),
    Cni("Calico eBPF", re.compile(r"\bcali(co)?_|^tc_calico_"), "bpfRedirectToPeer"),
)


def check(patterns: interfaces.Patterns, loaded: Loaded | None) -> Iterator[Finding]:
    """Yield which CNI's programs run on the watched interfaces. Raises OSError."""
    network = interfaces.read_network()
    chosen = choice.choose(network, patterns)
    ours = frozenset(loaded.programs.values()) if loaded else frozenset()
    with netlink.Socket() as route:
        others = [
            Other(each.name, each.kind == "pod", direction, running.name)
            for each in chosen
            for direction in clsact.DIRECTIONS
            for running in hook_programs.listed(route, each.ifindex, direction)
            if running.program not in ours and not (running.filter and running.filter.is_ours)
        ]
    kinds = {link.ifindex: link.kind for link in network.links}
    yield from judge(others, [each.name for each in chosen if kinds[each.ifindex] == "netkit"])


def judge(others: Sequence[Other], netkit: Sequence[str]) -> Iterator[Finding]:
    """Say whose programs these are, and what passes our hooks by. `netkit`: such interfaces."""
    named = [each for each in others if each.name]
    known = [found for cni in _KNOWN if (found := _known(cni, named))]
    if known:
        yield finding.ok(_CHECK, "; ".join(known))
    elif named:
        words = f"programs of no known CNI: {_names(named)}; hostint-agent status has their order"
        yield finding.ok(_CHECK, words)
    elif not others and not netkit:
        yield finding.ok(_CHECK, "none that attaches programs: both hooks see what is forwarded")
    if len(named) < len(others):
        where = _interfaces([each for each in others if not each.name])
        words = f"whose programs run on {where} is not known: their names may not be read"
        yield finding.warning(_CHECK, words, "run doctor on the node as root (CAP_SYS_ADMIN)")
    if netkit:
        words = (
            f"{datapath_checks.listed(netkit)}: a program on a netkit device can redirect what a "
            "pod sends past our hook; that is seen at the uplink alone, as if the host had sent it"
        )
        remedy = "have the CNI use veth devices where that matters"
        yield finding.warning(_CHECK, words, remedy)


def _known(cni: Cni, others: Sequence[Other]) -> str | None:
    """Return what there is to say of a CNI; None if it has no program here."""
    found = [each for each in others if cni.programs.search(each.name)]
    if not found:
        return None
    words = (
        f"{cni.name} ({_names(found)}): what it redirects to a pod ({cni.redirects}) is measured "
        "up to the pod's socket, and unresolved where no socket takes it (ICMP); what the kernel "
        "routes to a pod is measured up to the pod's interface"
    )
    if any(each.is_pod and each.direction == "egress" for each in found):
        words += "; its policy for what comes to a pod drops at the egress hook (reason 92)"
    return words


def _names(others: Sequence[Other]) -> str:
    names = sorted({_SUFFIX.sub("", each.name) for each in others})
    return f"{datapath_checks.listed(names)} on {_interfaces(others)}"


def _interfaces(others: Sequence[Other]) -> str:
    return datapath_checks.listed([*dict.fromkeys(each.interface for each in others)])
