# SPDX-License-Identifier: Apache-2.0
"""Try out what of bpf(2) the datapath needs: tiny programs and a map that are closed again, attached and pinned nowhere."""

import ctypes
import errno
import mmap
import os
import struct
from typing import Literal

from hostint_agent import bpf_calls, kernel

# commands, types and flags of linux/bpf.h
_MAP_ARRAY, _MAP_F_MMAPABLE = 2, 1024
_SCHED_CLS, _CGROUP_SKB, _RAW_TRACEPOINT, _TRACING = 3, 8, 17, 26
_TRACE_RAW_TP = 23
_PROBE_READ_KERNEL = 113
_BTF_KIND_TYPEDEF = 8
_WORD = 8

Kind = Literal["TC", "cgroup", "raw tracepoint"]


class _Btf(kernel.Btf):
    def typedef(self, name: str) -> int:
        """Id of a typedef; 0 if there is none of that name."""
        wanted = name.encode() + b"\0"
        for number, (_, offset, kind, _) in enumerate(self._types(), start=1):
            if kind == _BTF_KIND_TYPEDEF and self._named(offset, wanted):
                return number
        return 0


def _argument(number: int, register: int) -> bytes:
    """Load an argument of the tracepoint."""
    return bpf_calls.instruction(0x79, register, 1, _WORD * number)


def _read_kernel() -> bytes:
    """Read eight bytes where argument 0 points to, as the drop program reads a packet's metadata."""
    return (
        _argument(0, 3)
        + bpf_calls.instruction(0xBF, 1, 10)
        + bpf_calls.instruction(0x07, 1, value=-_WORD)
        + bpf_calls.instruction(0xB7, 2, value=_WORD)
        + bpf_calls.instruction(0x85, value=_PROBE_READ_KERNEL)
    )


def _load(kind: int, code: bytes, what: str, attach_type: int = 0, btf_id: int = 0) -> int:
    """Have the verifier look at a program; how many bytes of machine code the kernel made of it. Raises BpfError."""
    fd = bpf_calls.prog_load(kind, code, what, attach_type, btf_id)
    try:
        info = ctypes.create_string_buffer(80)
        attr = struct.pack("=IIQ", fd, len(info), ctypes.addressof(info))
        bpf_calls.bpf(bpf_calls.OBJ_GET_INFO_BY_FD, attr, "object info")
        return int(struct.unpack_from("=I", info, 16)[0])
    finally:
        os.close(fd)


def load(kind: Kind) -> int:
    """Load a program of a kind that the datapath has; bytes of machine code, 0 where it is interpreted. Raises BpfError."""
    if kind == "TC":
        return _load(_SCHED_CLS, bpf_calls.return_instructions(-1), "load a TC program")
    if kind == "cgroup":
        code = bpf_calls.return_instructions(1)
        return _load(_CGROUP_SKB, code, "load a cgroup_skb program")
    code = _read_kernel() + bpf_calls.return_instructions(0)
    return _load(_RAW_TRACEPOINT, code, "load a raw tracepoint program")


def tracepoint(name: str, argument: int) -> None:
    """Have the kernel confirm that a raw tracepoint exists and has such an argument.

    The program is of the kind whose tracepoint is looked up when it is loaded, since opening a tracepoint is attaching.
    Raises BpfError (ENOENT: no such tracepoint; EACCES, EINVAL: no such argument); and OSError, KernelError and whatever
    `struct` does for BTF that is missing or broken.
    """
    btf_id = _Btf(kernel.VMLINUX_BTF.read_bytes()).typedef(f"btf_trace_{name}")
    what = f"raw tracepoint {name}"
    if not btf_id:
        raise bpf_calls.BpfError(errno.ENOENT, os.strerror(errno.ENOENT), what)
    _load(
        _TRACING,
        _argument(argument, 0) + bpf_calls.return_instructions(0),
        what,
        _TRACE_RAW_TP,
        btf_id,
    )


def shared_memory() -> None:
    """Make an array, map it into this process and write to it, as the rings are read. Raises OSError."""
    attr = struct.pack("=IIIII", _MAP_ARRAY, 4, _WORD, 1, _MAP_F_MMAPABLE)
    fd = bpf_calls.bpf(bpf_calls.MAP_CREATE, attr, "make an array that can be mapped")
    try:
        with mmap.mmap(fd, mmap.PAGESIZE) as memory:
            memory[:_WORD] = bytes(range(_WORD))
    finally:
        os.close(fd)
