# SPDX-License-Identifier: Apache-2.0
"""Checks of `hostint-agent doctor` that concern the programs that see packets being taken.

They look, and change nothing.
"""

from collections.abc import Iterator
from pathlib import Path

from hostint_agent import delivery, loader
from hostint_agent.doctor import finding
from hostint_agent.doctor.datapath_checks import Loaded
from hostint_agent.doctor.finding import Finding

_CHECK = "delivery"
_PROGRAMS = {
    name: "deliver" if name == delivery.SOCKETS else "local_in" for name in delivery.LINK_PINS
}
_LOST = {
    "deliver": "what sockets take, the host's and those of pods behind a redirect, is unresolved",
    "local_in": "what the host takes without a socket (ICMP) is unresolved",
}
_RESTART = "start the agent, or restart it; its log says what keeps it from attaching"


def check(cgroup: Path, links: Path, loaded: Loaded | None) -> Iterator[Finding]:
    """Yield what is wrong with where packets are taken, or that nothing is.

    `cgroup` is that of `--cgroup-root`, `links` the directory of pinned links. Raises OSError.
    """
    problems = [*_root(cgroup), *_netfilter()]
    if loaded:
        problems += [
            found for name in _PROGRAMS if (found := link(links / name, name, loaded)) is not None
        ]
    if problems:
        yield from problems
    elif loaded:
        words = "our programs see what sockets take, and what the host takes without one"
        yield finding.ok(_CHECK, words)
    else:
        words = "what sockets take can be seen, and what the host takes without one"
        yield finding.ok(_CHECK, words)


def _root(cgroup: Path) -> Iterator[Finding]:
    try:
        delivery.cgroup_root(cgroup)
    except delivery.NoCgroupRoot as error:
        yield finding.failure(
            _CHECK,
            f"{cgroup} {error.strerror}: {_LOST['deliver']}",
            "mount the host's /sys/fs/cgroup into the container and name it with --cgroup-root "
            "(env HOSTINT_CGROUP_ROOT)",
        )


def _netfilter() -> Iterator[Finding]:
    if "local_in" not in loader.programs():
        words = f"this kernel has no netfilter programs: {_LOST['local_in']}"
        remedy = "boot Linux 6.4 or newer with CONFIG_NETFILTER_BPF_LINK"
        yield finding.warning(_CHECK, words, remedy)


def link(pin: Path, name: str, loaded: Loaded) -> Finding | None:
    """Return what is wrong with a pinned link; None if nothing is. Raises OSError."""
    program = _PROGRAMS[name]
    if program not in loaded.programs:
        return None
    problem = _problem(pin, loaded.programs[program])
    if problem is None:
        return None
    return finding.failure(_CHECK, f"link {name} {problem}: {_LOST[program]}", _RESTART)


def _problem(pin: Path, program: int) -> str | None:
    if not pin.exists():
        return "is not attached"
    attached = delivery.attached_program(pin)
    if not attached:
        return "was detached by another program"
    if attached != program:
        return f"runs program {attached}, not {program} of the loaded build"
    return None
