# SPDX-License-Identifier: Apache-2.0
"""Our filter in the clsact qdisc, for kernels without TCX: by handle, name and preference, never touching a qdisc that is there.

Where no CNI has made the qdisc, we must, once an interface: while the kernel adds one it stops the device for a grace period, and
what the device is to send in these milliseconds is dropped. TCX has nothing of the kind.
"""

import contextlib
import errno
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hostint_agent import bpf_calls, netlink

Direction = Literal["ingress", "egress"]
DIRECTIONS: tuple[Direction, ...] = ("ingress", "egress")
# how our filter is recognised: nothing of another owner is ever touched
FILTER_HANDLE = 0x1D7
FILTER_PREFERENCE = 1
FILTER_NAME = "hostint"
_PARENT = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_CLSACT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
# preference and protocol (ETH_P_ALL in network order) as they share one word
_INFO = FILTER_PREFERENCE << 16 | 0x0300
_TCMSG = struct.Struct("=BxxxiIII")
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_ID = 6, 7, 8, 11
_DIRECT_ACTION = 1
# a device that is gone, or has no clsact
_NONE_THERE = (errno.EINVAL, errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class Filter:
    """A BPF filter; preference, handle and name say whose it is."""

    preference: int
    handle: int
    name: str
    program: int  # its kernel id

    @property
    def is_ours(self) -> bool:
        """Only these are ever removed."""
        return self.handle == FILTER_HANDLE and self.name == FILTER_NAME


class Hooks:
    """Our filter first in preference 1, on both hooks of each interface."""

    method = "clsact"

    def __init__(self, programs: Mapping[str, bpf_calls.Program]) -> None:
        self._programs = programs

    def in_place(self) -> bool:
        """True: whatever others do to filters is told by netlink, and that is when `ensure` looks."""
        return True

    def ensure(self, ifindex: int, direction: Direction) -> str | None:
        """Have our filter run first; what was wrong, if anything. Raises OSError."""
        program = self._programs[direction]
        with netlink.Socket() as route:
            present = filters(route, ifindex, direction)
            ours = [f for f in present if f.is_ours]
            if ours and present[0] == ours[0] and ours[0].program == program.id:
                return None
            if ours:
                _delete(route, ifindex, direction)
            _add(route, ifindex, direction, program.fd)
        return "not first" if ours else "not attached"

    def keep_only(self, wanted: frozenset[int]) -> None:
        """Take our filter off every interface that is not wanted (any more)."""
        remove_all(except_of=wanted)


def remove_all(
    except_of: frozenset[int] = frozenset(), except_programs: frozenset[int] = frozenset()
) -> list[tuple[int, Direction]]:
    """Remove our filters with other programs from all other interfaces and nothing else; which there were. Raises OSError."""
    removed: list[tuple[int, Direction]] = []
    with netlink.Socket() as route:
        for ifindex in sorted(_interfaces(route) - except_of):
            for direction in DIRECTIONS:
                found = filters(route, ifindex, direction)
                if any(f.is_ours and f.program not in except_programs for f in found):
                    _delete(route, ifindex, direction)
                    removed.append((ifindex, direction))
    return removed


def filters(route: netlink.Socket, ifindex: int, direction: Direction) -> list[Filter]:
    """BPF filters of one hook in the order they run; none where there is no clsact."""
    asked = _TCMSG.pack(0, ifindex, 0, _PARENT[direction], 0)
    try:
        bodies = route.dump(netlink.RTM_GETTFILTER, asked)
    except OSError as error:
        if error.errno in _NONE_THERE:
            return []
        raise
    found = []
    for body in bodies:
        _, _, handle, _, info = _TCMSG.unpack_from(body)
        told = netlink.attributes(body, _TCMSG.size)
        # a filter's chain has an entry of its own, without a handle
        if told.get(_TCA_KIND) != b"bpf\0" or not handle:
            continue
        options = netlink.attributes(told.get(_TCA_OPTIONS, b""))
        name = options.get(_TCA_BPF_NAME, b"").rstrip(b"\0").decode(errors="replace")
        program = struct.unpack_from("=I", options.get(_TCA_BPF_ID, bytes(4)))[0]
        found.append(Filter(info >> 16, handle, name, program))
    return found


def _interfaces(route: netlink.Socket) -> set[int]:
    """Indexes of the interfaces that have a clsact qdisc."""
    found = set()
    for body in route.dump(netlink.RTM_GETQDISC, _TCMSG.pack(0, 0, 0, 0, 0)):
        ifindex = _TCMSG.unpack_from(body)[1]
        if netlink.attributes(body, _TCMSG.size).get(_TCA_KIND) == b"clsact\0":
            found.add(ifindex)
    return found


def _add(route: netlink.Socket, ifindex: int, direction: Direction, program: int) -> None:
    create = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
    qdisc = _TCMSG.pack(0, ifindex, _CLSACT_HANDLE, _CLSACT, 0)
    qdisc += netlink.attribute(_TCA_KIND, b"clsact\0")
    with contextlib.suppress(FileExistsError):
        route.request(netlink.RTM_NEWQDISC, create, qdisc, f"clsact on ifindex {ifindex}")
    options = (
        netlink.attribute(_TCA_BPF_FD, struct.pack("=I", program))
        + netlink.attribute(_TCA_BPF_NAME, FILTER_NAME.encode() + b"\0")
        + netlink.attribute(_TCA_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
    )
    body = _ours(ifindex, direction) + netlink.attribute(_TCA_OPTIONS, options)
    route.request(netlink.RTM_NEWTFILTER, create, body, f"filter on ifindex {ifindex}")


def _delete(route: netlink.Socket, ifindex: int, direction: Direction) -> None:
    try:
        body = _ours(ifindex, direction)
        route.request(netlink.RTM_DELTFILTER, 0, body, f"filter on ifindex {ifindex}")
    except OSError as error:
        # The filter, the qdisc or the device may have been removed since they were read.
        if error.errno not in _NONE_THERE:
            raise


def _ours(ifindex: int, direction: Direction) -> bytes:
    message = _TCMSG.pack(0, ifindex, FILTER_HANDLE, _PARENT[direction], _INFO)
    return message + netlink.attribute(_TCA_KIND, b"bpf\0")
