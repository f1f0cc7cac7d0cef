# SPDX-License-Identifier: Apache-2.0
"""Who runs on the TC hooks of the watched interfaces, and in which order: the TCX list, then the filters of clsact. Only looks."""

import contextlib
import errno
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hostint_agent import bpf_calls, clsact, interfaces, netlink

_TCX_TYPE = {"ingress": bpf_calls.TCX_INGRESS, "egress": bpf_calls.TCX_EGRESS}
# nothing attached, a device that is gone, a kernel without TCX
_NONE_THERE = (errno.ENOENT, errno.ENODEV, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Hook:
    """One direction of an interface. `method` None: our program is not attached, and everybody else is in `after`."""

    direction: clsact.Direction
    method: str | None
    place: int  # in the order, from 1; 0: not attached
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface that is watched, or should be. `port`: its id in reports, 0 for none."""

    ifindex: int
    name: str
    kind: interfaces.Kind
    port: int
    hooks: tuple[Hook, ...]


@dataclass(frozen=True, slots=True)
class _Runner:
    method: str
    is_ours: bool
    label: str


def read(maps: Path, ours: Mapping[str, int]) -> tuple[Interface, ...]:
    """Interfaces of this network namespace that the agent has chosen, which then have a port id, or that have a program of ours.

    `ours`: kernel ids of our programs by direction. Raises OSError.
    """
    chosen = _ports(bpf_calls.Map.open(maps / "ports"))
    # all that could be chosen, by whatever patterns the agent has been given
    network = interfaces.read_network()
    possible = interfaces.choose(network, interfaces.Patterns(include=("*",)))
    with netlink.Socket() as route:
        found = [
            Interface(
                one.ifindex,
                one.name,
                one.kind,
                chosen.get(one.ifindex, 0),
                tuple(_hook(route, one.ifindex, d, ours[d]) for d in clsact.DIRECTIONS),
            )
            for one in possible
        ]
    return tuple(i for i in found if i.ifindex in chosen or any(h.method for h in i.hooks))


def _ports(opened: bpf_calls.Map) -> dict[int, int]:
    found = {}
    for key in list(opened.keys()):
        # one may have gone meanwhile
        with contextlib.suppress(bpf_calls.BpfError):
            found[struct.unpack("=I", key)[0]] = struct.unpack("=Q", opened.lookup(key))[0]
    return found


def _hook(route: netlink.Socket, ifindex: int, direction: clsact.Direction, ours: int) -> Hook:
    order = _tcx(ifindex, direction, ours)
    for one in clsact.filters(route, ifindex, direction):
        label = f"{one.name} [tc pref {one.preference}]"
        order.append(_Runner("clsact", one.is_ours and one.program == ours, label))
    labels = tuple(runner.label for runner in order)
    for index, runner in enumerate(order):
        if runner.is_ours:
            before, after = labels[:index], labels[index + 1 :]
            return Hook(direction, runner.method, index + 1, before, after)
    return Hook(direction, None, 0, (), labels)


def _tcx(ifindex: int, direction: clsact.Direction, ours: int) -> list[_Runner]:
    try:
        ids = bpf_calls.tcx_program_ids(ifindex, _TCX_TYPE[direction])
    except OSError as error:
        if error.errno in _NONE_THERE:
            return []
        raise
    return [_Runner("tcx", program == ours, f"{_name(program)} [{program}]") for program in ids]


def _name(program: int) -> str:
    try:
        return bpf_calls.program_name(program)
    except OSError:
        # a kernel gives only CAP_SYS_ADMIN a look at programs of others; or it has gone meanwhile
        return "program"
