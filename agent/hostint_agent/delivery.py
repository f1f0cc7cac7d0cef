# SPDX-License-Identifier: Apache-2.0
"""Attach the programs that see where packets are taken: by sockets (cgroup_skb) and by the host itself (netfilter)."""

import errno
import functools
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from hostint_agent import bpf_calls

SOCKETS = "sockets"
LINK_PINS = (SOCKETS, "local-in-4", "local-in-6")
_FAMILIES = {"local-in-4": socket.AF_INET, "local-in-6": socket.AF_INET6}
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
        names = LINK_PINS if "local_in" in programs else (SOCKETS,)
        self._pins = [str(links / name) for name in names]

    def in_place(self) -> bool:
        """True as long as the pins are there, which are what holds the links."""
        return all(map(os.path.exists, self._pins))

    def ensure(self) -> None:
        """Attach the current programs where they are not attached. Raises OSError."""
        self._ensure(SOCKETS, self._programs["deliver"], self._attach_to_sockets)
        if "local_in" in self._programs:
            for name, family in _FAMILIES.items():
                attach = functools.partial(local_in, family=family)
                self._ensure(name, self._programs["local_in"], attach)

    def _ensure(self, name: str, program: bpf_calls.Program, attach: Callable[[int], int]) -> None:
        pin = self._links / name
        if pin.exists() and _attached(pin) == program.id:
            return
        # the new one first: of two that see a packet, the first uses up its slot
        link = attach(program.fd)
        try:
            pin.unlink(missing_ok=True)
            bpf_calls.obj_pin(link, pin)
        finally:
            os.close(link)

    def _attach_to_sockets(self, program_fd: int) -> int:
        return sockets(program_fd, cgroup_root(self._cgroup))


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
        try:
            return bpf_calls.netfilter_link_create(
                program_fd, family, bpf_calls.NF_INET_LOCAL_IN, priority
            )
        except bpf_calls.BpfError as error:
            if error.errno != errno.EBUSY:
                raise
    raise bpf_calls.BpfError(
        errno.EBUSY, f"other BPF programs have the last {_PRIORITIES} priorities", "netfilter link"
    )


def _attached(pin: Path) -> int:
    with bpf_calls.opened(pin) as link:
        return bpf_calls.tcx_link_target(link)[0]
