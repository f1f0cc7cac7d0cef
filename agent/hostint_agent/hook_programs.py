# SPDX-License-Identifier: Apache-2.0
"""Which programs run on a TC hook, in their order: the TCX list, then the filters of clsact. Only looks, and judges nothing."""

import errno
from dataclasses import dataclass

from hostint_agent import bpf_calls, clsact, netlink

# nothing attached, or a kernel without TCX
_NONE_THERE = (errno.ENOENT, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Running:
    """One program on a hook, by its kernel id. `name`: a filter's own, or else the program's, empty if we may not know it."""

    program: int
    name: str
    filter: clsact.Filter | None  # None: it is on the TCX list

    @property
    def method(self) -> str:
        """How it is attached."""
        return "clsact" if self.filter else "tcx"


def listed(route: netlink.Socket, ifindex: int, direction: clsact.Direction) -> list[Running]:
    """TCX programs run before filters of clsact, also where one of these has preference 1. Raises OSError (ENODEV)."""
    try:
        ids = bpf_calls.tcx_program_ids(ifindex, bpf_calls.TCX_TYPE[direction])
    except bpf_calls.BpfError as error:
        if error.errno not in _NONE_THERE:
            raise
        ids = []
    filters = clsact.filters(route, ifindex, direction)
    return [
        *(Running(program, _name(program), None) for program in ids),
        *(Running(each.program, each.name, each) for each in filters),
    ]


def _name(program: int) -> str:
    try:
        return bpf_calls.program_name(program)
    except OSError:
        # a kernel gives only CAP_SYS_ADMIN a look at programs of others; or it has gone meanwhile
        return ""
