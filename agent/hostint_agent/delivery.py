# SPDX-License-Identifier: Apache-2.0
"""Attach the programs that see where packets are taken: by sockets (cgroup_skb) and by the host itself (netfilter)."""

import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from hostint_agent import bpf_calls

SOCKETS = "sockets"
HOST = {"local-in-4": socket.AF_INET, "local-in-6": socket.AF_INET6}
LINK_PINS = (SOCKETS, *HOST)
# behind every other hook of LOCAL_IN; the kernel keeps INT_MAX for itself, and one priority for one BPF program
_LAST_PRIORITY = 2**31 - 2
_PRIORITIES = 16


class NoCgroupRoot(OSError):
    """There is no cgroup v2 root where it was looked for."""


def cgroup_root(configured: Path) -> Path:
    """Return the root of the cgroup v2 hierarchy: `configured`, or `unified` below it (hybrid hierarchies).

    The root alone has no cgroup.type (Documentation/admin-guide/cgroup-v2.rst); what a container with a cgroup namespace
    of its own takes for the root has one. Raises NoCgroupRoot.
    """
    for path in (configured, configured / "unified"):
        if (path / "cgroup.controllers").exists() and not (path / "cgroup.type").exists():
            return path
    raise NoCgroupRoot(
        errno.ENOENT, "is not the root of a cgroup v2 hierarchy of the host", str(configured)
    )


class DeliveryLinks:
    """The pinned links of the programs `deliver` and `local_in`."""

    def __init__(
        self, links: Path, programs: Mapping[str, bpf_calls.Program], cgroup: Path
    ) -> None:
        """`programs` by name; without `local_in` on kernels without netfilter links (before Linux 6.4)."""
        self._links = links
        self._programs = programs
        self._cgroup = cgroup
        # of the links that were attached: one that could not be is retried, not missed
        self._pins: set[Path] = set()

    def in_place(self) -> bool:
        """True as long as the pins of all that was attached are there: they hold the links."""
        return all(map(os.path.exists, self._pins))

    def ensure_sockets(self) -> None:
        """Attach `deliver` if it is not attached. Raises OSError."""
        pin, program = self._links / SOCKETS, self._programs["deliver"]
        self._pins.discard(pin)
        if not pin.exists() or attached_program(pin) != program.id:
            self._pin(pin, sockets(program.fd, cgroup_root(self._cgroup)))
        self._pins.add(pin)

    def ensure_host(self, name: str) -> None:
        """Attach `local_in` for a family of HOST if it is not attached and the kernel has it.

        Raises OSError.
        """
        program, family = self._programs.get("local_in"), HOST[name]
        if program is None:
            return
        pin = self._links / name
        was_attached = pin in self._pins
        self._pins.discard(pin)
        if not pin.exists() or attached_program(pin) != program.id:
            self._pin(pin, local_in(program.fd, family))
        # Not at the first look: an agent that starts creates no link where there is one.
        elif was_attached and (link := _in_place_of(pin, program.fd, family)) is not None:
            self._pin(pin, link)
        self._pins.add(pin)

    def _pin(self, pin: Path, link: int) -> None:
        """Pin a link in place of an older one, which unpinning detaches.

        The new one is attached first: of two that see a packet, the first uses up its slot.
        """
        try:
            pin.unlink(missing_ok=True)
            bpf_calls.obj_pin(link, pin)
        finally:
            os.close(link)


def sockets(program_fd: int, root: Path) -> int:
    """Attach a cgroup_skb program to what all sockets of the machine receive; returns the link. Raises OSError."""
    directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return bpf_calls.cgroup_link_create(program_fd, directory, bpf_calls.CGROUP_INET_INGRESS)
    finally:
        os.close(directory)


def local_in(program_fd: int, family: int) -> int:
    """Attach a netfilter program behind all others of LOCAL_IN of this network namespace; returns the link.

    Raises bpf_calls.BpfError.
    """
    for priority in range(_LAST_PRIORITY, _LAST_PRIORITY - _PRIORITIES, -1):
        if (link := _local_in_at(program_fd, family, priority)) is not None:
            return link
    raise bpf_calls.BpfError(
        errno.EBUSY, f"other BPF programs have the last {_PRIORITIES} priorities", "netfilter link"
    )


def _in_place_of(pin: Path, program_fd: int, family: int) -> int | None:
    """Attach where a pinned netfilter link was; None if it still is there. Raises OSError.

    The kernel does not say that such a link was detached, but its priority is free then.
    """
    with bpf_calls.opened(pin) as link:
        priority = bpf_calls.netfilter_link_priority(link)
    return _local_in_at(program_fd, family, priority)


def _local_in_at(program_fd: int, family: int, priority: int) -> int | None:
    """Attach at a priority; None if a BPF program has it (nf_hook_entries_grow: there is one each).

    Raises bpf_calls.BpfError.
    """
    try:
        return bpf_calls.netfilter_link_create(
            program_fd, family, bpf_calls.NF_INET_LOCAL_IN, priority
        )
    except bpf_calls.BpfError as error:
        if error.errno != errno.EBUSY:
            raise
        return None


def attached_program(pin: Path) -> int:
    """Kernel id of the program that a pinned link runs; 0 if a cgroup link was detached.

    A netfilter link that was detached looks as if it were not. Raises OSError.
    """
    with bpf_calls.opened(pin) as link:
        # The second is the low half of a cgroup's id, which the kernel sets to 0 as it detaches, or
        # the protocol family of a netfilter link.
        program, where = bpf_calls.tcx_link_target(link)
    return program if where else 0
