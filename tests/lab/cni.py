# SPDX-License-Identifier: Apache-2.0
"""What a CNI attaches beside us: TC programs of a few instructions, as clsact filters or TCX links, and a look at all of them."""

import contextlib
import ctypes
import itertools
import json
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from hostint_agent import bpf_calls
from tests.lab.topology import Node

Hook = Literal["ingress", "egress"]
HOOKS: tuple[Hook, ...] = ("ingress", "egress")
OK, SHOT, PIPE = 0, 2, 3
_TCX = {"ingress": bpf_calls.TCX_INGRESS, "egress": bpf_calls.TCX_EGRESS}
_INSTANCES = itertools.count()
_PROG_LOAD, _LINK_DETACH = 5, 34
_SCHED_CLS = 3
_REDIRECT, _REDIRECT_NEIGH = 23, 152
_PROTOCOL = 16  # of struct __sk_buff
_ETH_P_IP = socket.htons(0x0800)


def _instruction(code: int, dst: int = 0, src: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, src << 4 | dst, offset, value)


def _return(value: int) -> bytes:
    return _instruction(0xB7, 0, value=value) + _instruction(0x95)


def _call(helper: int, *arguments: int) -> bytes:
    moves = b"".join(_instruction(0xB7, r, value=v) for r, v in enumerate(arguments, start=1))
    return moves + _instruction(0x85, value=helper) + _instruction(0x95)


def _load(instructions: bytes) -> int:
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "=IIQQIIQII16s",
        _SCHED_CLS,
        len(instructions) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        *(0, 0, 0, 0, 0),
        b"cni",
    )
    return bpf_calls.bpf(_PROG_LOAD, attr, "load a program of the CNI")


def verdict(value: int) -> int:
    """A program that always returns this."""
    return _load(_return(value))


def redirect(ifindex: int) -> int:
    """A program that hands every frame to another interface as it is."""
    return _load(_call(_REDIRECT, ifindex, 0))


def redirect_neigh(ifindex: int) -> int:
    """A program that hands IPv4 packets to another interface with the neighbour's address, and leaves the rest alone."""
    look = _instruction(0x61, 2, 1, _PROTOCOL) + _instruction(0x15, 2, offset=2, value=_ETH_P_IP)
    return _load(look + _return(-1) + _call(_REDIRECT_NEIGH, ifindex, 0, 0, 0))


@dataclass(frozen=True)
class Attached:
    """One entry of a TCX list."""

    program: int
    link: int


class Cni:
    """Everything that it attaches is gone when it is left, as far as it is still there."""

    def __init__(self, node: Node) -> None:
        self._node = node.namespace
        self._pins = Path(f"/sys/fs/bpf/{self._node.name}-cni{next(_INSTANCES)}")
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._pins.mkdir()
        self._cleanup.callback(self._pins.rmdir)
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def index(self, device: str) -> int:
        """An interface's index; 0 if there is none."""
        try:
            return self._node.inside(lambda: socket.if_nametoindex(device))
        except OSError:
            return 0

    def filter(
        self, program: int, device: str, hook: Hook, pref: int = 2, handle: int = 1, how="add"
    ) -> None:
        """Attach as a clsact filter, making the qdisc if there is none. Takes the descriptor over."""
        pin = self._pins / f"program{program}"
        bpf_calls.obj_pin(program, pin)
        os.close(program)
        try:
            self.tc(f"qdisc add dev {device} clsact", check=False)
            what = f"{device} {hook} pref {pref} handle {handle:#x} protocol all bpf"
            self.tc(f"filter {how} dev {what} direct-action pinned {pin}")
        finally:
            pin.unlink()
        remove = f"filter del dev {device} {hook} pref {pref} handle {handle:#x} protocol all bpf"
        self._cleanup.callback(self.tc, remove, check=False)

    def tc(self, command: str, check: bool = True) -> str:
        """Run tc in the node."""
        return self._node.run("tc", *command.split(), check=check)

    def tcx(self, program: int, device: str, hook: Hook, *, first: bool) -> int:
        """Attach as a TCX link, first or last. Takes the descriptor over; the link's is returned, closed at the end."""
        flags = bpf_calls.F_BEFORE if first else 0
        attr = struct.pack("=IIIIIIQ", program, self.index(device), _TCX[hook], flags, 0, 0, 0)
        link = self._node.inside(
            lambda: bpf_calls.bpf(bpf_calls.LINK_CREATE, attr, "tcx of the CNI")
        )
        os.close(program)
        self._cleanup.callback(os.close, link)
        return link

    def order(self, device: str, hook: Hook) -> list[Attached]:
        """The TCX list in the order it runs; empty if there is no such interface."""
        programs, links = (ctypes.c_uint32 * 64)(), (ctypes.c_uint32 * 64)()
        attr = ctypes.create_string_buffer(160)
        struct.pack_into(
            "=IIIIQIIQQQ",
            attr,
            0,
            *(self.index(device), _TCX[hook], 0, 0),
            *(ctypes.addressof(programs), 64, 0, 0, ctypes.addressof(links), 0),
        )
        try:
            self._node.inside(lambda: bpf_calls.bpf(bpf_calls.PROG_QUERY, attr, "tcx query"))
        except OSError:
            return []
        count = struct.unpack_from("=I", attr, 24)[0]
        return [Attached(programs[i], links[i]) for i in range(count)]

    def filters(self, device: str, hook: Hook) -> list[dict[str, object]]:
        """The clsact filters in the order they run."""
        shown = self.tc(f"-j filter show dev {device} {hook}", check=False)
        told = json.loads(shown or "[]")
        keys = ("pref", "chain", "protocol", "options")
        return [
            {key: one[key] for key in keys if key in one}
            for one in told
            if one.get("options", {}).get("handle")
        ]


def detach(link: int) -> None:
    """Detach somebody's link by force, as `bpftool link detach` would."""
    bpf_calls.bpf(_LINK_DETACH, struct.pack("=I", link), "link detach")
