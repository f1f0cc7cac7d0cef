# SPDX-License-Identifier: Apache-2.0
"""How our programs stand on the TC hooks of the watched interfaces: who runs before them, and who behind. Only looks."""

import contextlib
import errno
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from hostint_agent import bpf_calls, choice, clsact, hook_programs, interfaces, netlink


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
class Hooks:
    """All hooks, and what traffic of the node passes them by."""

    interfaces: tuple[Interface, ...]
    unseen: tuple[str, ...]


def read(
    maps: Path,
    ours: Mapping[str, int],
    addresses: Collection[str],
    patterns: interfaces.Patterns,
) -> Hooks:
    """Look at the interfaces that the agent has chosen, or that have a program of ours.

    Those that it has chosen have a port id. `ours`: kernel ids of our programs by direction.
    `addresses` and `patterns` as in choice.unseen. Raises OSError.
    """
    ports = _ports(bpf_calls.Map.open(maps / "ports"))
    network = interfaces.read_network()
    # all that could be chosen, by whatever patterns the agent has been given
    possible = choice.choose(network, interfaces.Patterns(include=("*",)))
    with netlink.Socket() as route:
        found = [
            Interface(
                one.ifindex,
                one.name,
                one.kind,
                ports.get(one.ifindex, 0),
                tuple(_hook(route, one.ifindex, d, ours[d]) for d in clsact.DIRECTIONS),
            )
            for one in possible
        ]
    kept = tuple(i for i in found if i.ifindex in ports or any(h.method for h in i.hooks))
    indexes = {each.ifindex for each in kept}
    chosen = [one for one in possible if one.ifindex in indexes]
    unseen = choice.unseen(network, patterns, chosen, addresses)
    return Hooks(kept, tuple(each.found for each in unseen))


def _ports(opened: bpf_calls.Map) -> dict[int, int]:
    found = {}
    for key in list(opened.keys()):
        # one may have gone meanwhile
        with contextlib.suppress(bpf_calls.BpfError):
            found[struct.unpack("=I", key)[0]] = struct.unpack("=Q", opened.lookup(key))[0]
    return found


def _hook(route: netlink.Socket, ifindex: int, direction: clsact.Direction, ours: int) -> Hook:
    try:
        running = hook_programs.listed(route, ifindex, direction)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        running = []  # the device has gone meanwhile
    labels = tuple(map(_label, running))
    for index, each in enumerate(running):
        if each.program == ours and (each.filter is None or each.filter.is_ours):
            before, after = labels[:index], labels[index + 1 :]
            return Hook(direction, each.method, index + 1, before, after)
    return Hook(direction, None, 0, (), labels)


def _label(each: hook_programs.Running) -> str:
    if each.filter:
        return f"{each.name} [tc pref {each.filter.preference}]"
    return f"{each.name or 'program'} [{each.program}]"
