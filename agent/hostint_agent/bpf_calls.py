# SPDX-License-Identifier: Apache-2.0
"""bpf(2) through ctypes: objects, pins, links, maps and test runs. No libbpf, no bcc; what the commands mean is in bpf(2)."""

import contextlib
import ctypes
import dataclasses
import errno
import mmap
import os
import platform
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280}[platform.machine()]
_ATTR_BYTES = 160

MAP_CREATE = 0
MAP_LOOKUP_ELEM = 1
MAP_UPDATE_ELEM = 2
MAP_DELETE_ELEM = 3
MAP_GET_NEXT_KEY = 4
PROG_LOAD = 5
OBJ_PIN = 6
OBJ_GET = 7
PROG_TEST_RUN = 10
PROG_GET_FD_BY_ID = 13
OBJ_GET_INFO_BY_FD = 15
PROG_QUERY = 16
RAW_TRACEPOINT_OPEN = 17
MAP_FREEZE = 22
MAP_LOOKUP_BATCH = 24
LINK_CREATE = 28
LINK_UPDATE = 29

TCX_INGRESS = 46
TCX_EGRESS = 47
CGROUP_INET_INGRESS = 0
NETFILTER = 45
NF_INET_LOCAL_IN = 1
TCX_TYPE = {"ingress": TCX_INGRESS, "egress": TCX_EGRESS}
F_BEFORE = 8
PERCPU_TYPES = frozenset({5, 6, 10, 21})
_ARRAY, _ARRAY_OF_MAPS = 2, 12


class BpfError(OSError):
    """A bpf(2) command failed; errno and strerror as usual, the command's name in `filename`."""


def bpf(command: int, attr: bytes | ctypes.Array[ctypes.c_char], what: str) -> int:
    """Make the system call; `attr` is zero-padded to the size every command accepts.

    Raises BpfError.
    """
    buffer = ctypes.create_string_buffer(attr, _ATTR_BYTES) if isinstance(attr, bytes) else attr
    result = int(_LIBC.syscall(_SYSCALL, command, buffer, ctypes.sizeof(buffer)))
    if result < 0:
        code = ctypes.get_errno()
        raise BpfError(code, os.strerror(code), what)
    return result


def wait_for_programs() -> None:
    """Return when every program that runs now has ended: an RCU grace period, some milliseconds.

    That is what the kernel does after a map in a map was replaced (maybe_wait_bpf_programs), whatever its configuration;
    membarrier(2) would refuse where there are nohz_full CPUs. Raises BpfError.
    """
    inner = bpf(MAP_CREATE, struct.pack("=IIIII", _ARRAY, 4, 4, 1, 0), "make a map")
    try:
        attr = struct.pack("=IIIIII", _ARRAY_OF_MAPS, 4, 4, 1, 0, inner)
        outer = Map(bpf(MAP_CREATE, attr, "make a map of maps"))
        outer.update(bytes(4), struct.pack("=i", inner))
        outer.close()
    finally:
        os.close(inner)


def possible_cpus() -> int:
    """Number of possible CPUs: per-CPU map values are this many, and rings are sized by it."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(text.replace(",", "-").split("-")[-1]) + 1


def obj_pin(fd: int, path: Path) -> None:
    """Pin an object in a bpffs."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    bpf(OBJ_PIN, struct.pack("=QII", ctypes.addressof(name), fd, 0), f"pin {path}")


def obj_get(path: Path) -> int:
    """Open a pinned object; the caller closes the descriptor."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return bpf(OBJ_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0), f"open {path}")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of a pinned object for as long as this is entered. Raises BpfError."""
    fd = obj_get(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _info(fd: int, size: int) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    bpf(OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, size, ctypes.addressof(buffer)), "object info")
    return buffer.raw


def prog_load(kind: int, code: bytes, what: str, attach_type: int = 0, btf_id: int = 0) -> int:
    """Have the verifier check and the kernel load instructions; returns a descriptor. Raises BpfError."""
    text = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "=IIQQIIQII16sIIIIQIIQII",
        *(kind, len(code) // 8, ctypes.addressof(text), ctypes.addressof(licence)),
        *(0, 0, 0, 0, 0, b"hostint_probe"),
        *(0, attach_type, 0, 0, 0, 0, 0, 0, 0, btf_id),
    )
    return bpf(PROG_LOAD, attr, what)


def instruction(code: int, dst: int = 0, src: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """Encode one instruction (struct bpf_insn)."""
    return struct.pack("=BBhi", code, src << 4 | dst, offset, value)


def return_instructions(value: int) -> bytes:
    """Encode a program that returns a value."""
    return instruction(0xB7, 0, value=value) + instruction(0x95)


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramInfo:
    """What the kernel tells of a loaded program (struct bpf_prog_info)."""

    id: int
    loaded_ns: int  # of CLOCK_BOOTTIME
    runs: int  # and how long they took: 0 unless kernel.bpf_stats_enabled
    run_time_ns: int
    recursion_misses: int  # runs left out because the program already ran on that CPU
    verified_instructions: int  # that the verifier walked


def program_info(fd: int) -> ProgramInfo:
    """All of it, of one moment."""
    told = _info(fd, 232)
    run_time_ns, runs, misses, verified = struct.unpack_from("=QQQI", told, 192)
    prog_id, loaded_ns = struct.unpack_from("=I", told, 4)[0], struct.unpack_from("=Q", told, 40)[0]
    return ProgramInfo(prog_id, loaded_ns, runs, run_time_ns, misses, verified)


def program_id(fd: int) -> int:
    """Kernel id of a program."""
    return program_info(fd).id


def program_name(prog_id: int) -> str:
    """Name of a loaded program by its kernel id."""
    fd = bpf(PROG_GET_FD_BY_ID, struct.pack("=I", prog_id), f"program {prog_id}")
    try:
        return _info(fd, 80)[64:80].split(b"\0")[0].decode()
    finally:
        os.close(fd)


def tcx_link_target(fd: int) -> tuple[int, int]:
    """(program id, ifindex) of a TCX link; ifindex is 0 once the device is gone."""
    fields = struct.unpack_from("=IIIIII", _info(fd, 64))
    return int(fields[2]), int(fields[4])


def netfilter_link_priority(fd: int) -> int:
    """Priority of a netfilter link among the hooks of its place."""
    return int(struct.unpack_from("=i", _info(fd, 64), 24)[0])


def raw_tracepoint_open(name: str, program_fd: int) -> int:
    """Attach a raw tracepoint program; the link lives as long as its descriptor or pin."""
    text = ctypes.create_string_buffer(name.encode())
    attr = struct.pack("=QI", ctypes.addressof(text), program_fd)
    return bpf(RAW_TRACEPOINT_OPEN, attr, f"raw tracepoint {name}")


def tcx_link_create(program_fd: int, ifindex: int, attach_type: int) -> int:
    """Attach a program at the head of an interface's TCX list.

    Raises BpfError; errno EINVAL means a kernel without TCX (< 6.6).
    """
    attr = struct.pack("=IIIIIIQ", program_fd, ifindex, attach_type, F_BEFORE, 0, 0, 0)
    return bpf(LINK_CREATE, attr, f"tcx link on ifindex {ifindex}")


def cgroup_link_create(program_fd: int, directory_fd: int, attach_type: int) -> int:
    """Attach a program to a cgroup and all below it, beside the programs of others (as with BPF_F_ALLOW_MULTI)."""
    attr = struct.pack("=IIIIIIQ", program_fd, directory_fd, attach_type, 0, 0, 0, 0)
    return bpf(LINK_CREATE, attr, "cgroup link")


def netfilter_link_create(program_fd: int, family: int, hook: int, priority: int) -> int:
    """Attach a program to a netfilter hook of this network namespace (Linux 6.4)."""
    attr = struct.pack("=IIIIIIiI", program_fd, 0, NETFILTER, 0, family, hook, priority, 0)
    return bpf(LINK_CREATE, attr, "netfilter link")


def link_update(link_fd: int, program_fd: int) -> None:
    """Replace the program of a link atomically."""
    bpf(LINK_UPDATE, struct.pack("=IIII", link_fd, program_fd, 0, 0), "link update")


def tcx_program_ids(ifindex: int, attach_type: int) -> list[int]:
    """Kernel ids of the programs on an interface's TCX list, in the order they run."""
    ids = (ctypes.c_uint32 * 64)()
    attr = ctypes.create_string_buffer(
        struct.pack("=IIIIQI", ifindex, attach_type, 0, 0, ctypes.addressof(ids), 64), _ATTR_BYTES
    )
    bpf(PROG_QUERY, attr, f"tcx query of ifindex {ifindex}")
    count = struct.unpack_from("=I", attr, 24)[0]
    return list(ids[:count])


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A loaded program: a descriptor of ours and its kernel id."""

    fd: int
    id: int

    @classmethod
    def open(cls, path: Path) -> "Program":
        """Open a pinned program. Raises BpfError."""
        fd = obj_get(path)
        return cls(fd, program_id(fd))


class TcxHead:
    """Which program runs first on one TCX hook. Made once and asked often: a question costs a microsecond or two."""

    def __init__(self, ifindex: int, attach_type: int) -> None:
        self._first = ctypes.c_uint32()
        question = (ifindex, attach_type, 0, 0, ctypes.addressof(self._first), 1)
        self._question = struct.pack("=IIIIQI", *question).ljust(_ATTR_BYTES, b"\0")
        self._attr = ctypes.create_string_buffer(_ATTR_BYTES)

    def program_id(self) -> int:
        """Its kernel id; 0 where nothing is attached or there is no such interface."""
        self._first.value = 0
        self._attr.raw = self._question
        # "no space" says that there are more than the one we want to know
        _LIBC.syscall(_SYSCALL, PROG_QUERY, self._attr, _ATTR_BYTES)
        return self._first.value


def test_run(program_fd: int, packet: bytes, *, repeat: int = 1) -> tuple[int, bytes, int]:
    """Run a TC program on a packet: (verdict as signed int, packet afterwards, ns per run)."""
    out = ctypes.create_string_buffer(len(packet) + 256)
    data = ctypes.create_string_buffer(packet, len(packet))
    attr = ctypes.create_string_buffer(
        struct.pack(
            "=IIIIQQII",
            program_fd,
            0,
            len(packet),
            len(out),
            ctypes.addressof(data),
            ctypes.addressof(out),
            repeat,
            0,
        ),
        _ATTR_BYTES,
    )
    bpf(PROG_TEST_RUN, attr, "test run")
    _, verdict, _, size, _, _, _, duration = struct.unpack_from("=IiIIQQII", attr)
    return verdict, out.raw[:size], duration


class Map:
    """A BPF map by descriptor: element access and, for mmapable arrays, its memory."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        kind, number, key_bytes, value_bytes, max_entries = struct.unpack_from(
            "=IIIII", _info(fd, 80)
        )
        self.id = int(number)
        self.key_bytes = int(key_bytes)
        self.value_bytes = int(value_bytes)
        self.max_entries = int(max_entries)
        self.cpus = possible_cpus() if kind in PERCPU_TYPES else 1
        self.stride = (self.value_bytes + 7) // 8 * 8
        self._key = ctypes.create_string_buffer(self.key_bytes)
        self._value = ctypes.create_string_buffer(self.stride * self.cpus)
        # key and value are places that every call uses
        self._turn = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> "Map":
        """Open a pinned map. Raises BpfError."""
        return cls(obj_get(path))

    def __del__(self) -> None:
        # a map that nobody holds any more must not hold its descriptor
        if hasattr(self, "fd"):
            self.close()

    def close(self) -> None:
        """Close the descriptor; memory that was mapped stays mapped."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _element(self, command: int, key: bytes, flags: int, what: str) -> None:
        ctypes.memmove(self._key, key, self.key_bytes)
        attr = struct.pack(
            "=IIQQQ", self.fd, 0, ctypes.addressof(self._key), ctypes.addressof(self._value), flags
        )
        bpf(command, attr, what)

    def lookup(self, key: bytes) -> bytes:
        """Value of a key, for per-CPU maps all CPUs' values behind each other. Raises BpfError (ENOENT)."""
        with self._turn:
            self._element(MAP_LOOKUP_ELEM, key, 0, "map lookup")
            return self._value.raw

    def update(self, key: bytes, value: bytes) -> None:
        """Set the value of a key; for per-CPU maps `value` holds all CPUs' values."""
        with self._turn:
            ctypes.memmove(self._value, value, len(value))
            self._element(MAP_UPDATE_ELEM, key, 0, "map update")

    def delete(self, key: bytes) -> None:
        """Remove a key of a hash. Raises BpfError (ENOENT)."""
        with self._turn:
            ctypes.memmove(self._key, key, self.key_bytes)
            # the command knows no value: a pointer there would be refused
            attr = struct.pack("=IIQQQ", self.fd, 0, ctypes.addressof(self._key), 0, 0)
            bpf(MAP_DELETE_ELEM, attr, "map delete")

    def freeze(self) -> None:
        """Refuse all further changes by processes."""
        bpf(MAP_FREEZE, struct.pack("=I", self.fd), "map freeze")

    def keys(self) -> Iterator[bytes]:
        """All keys, by walking; a key that is removed meanwhile may end the walk early."""
        following = ctypes.create_string_buffer(self.key_bytes)
        last = ctypes.create_string_buffer(self.key_bytes)
        current = 0
        while True:
            attr = struct.pack("=IIQQ", self.fd, 0, current, ctypes.addressof(following))
            try:
                bpf(MAP_GET_NEXT_KEY, attr, "map walk")
            except BpfError as error:
                if error.errno != errno.ENOENT:
                    raise
                return
            yield following.raw
            ctypes.memmove(last, following, self.key_bytes)
            current = ctypes.addressof(last)

    def values(self, chunk: int = 1024) -> bytes:
        """All values of an array in index order, `stride * cpus` bytes each, read in batches."""
        size = self.stride * self.cpus if self.cpus > 1 else self.value_bytes
        keys = ctypes.create_string_buffer(self.key_bytes * chunk)
        values = ctypes.create_string_buffer(size * chunk)
        position = ctypes.create_string_buffer(8)
        result, first = bytearray(), True
        while True:
            attr = ctypes.create_string_buffer(
                struct.pack(
                    "=QQQQIIQQ",
                    0 if first else ctypes.addressof(position),
                    ctypes.addressof(position),
                    ctypes.addressof(keys),
                    ctypes.addressof(values),
                    chunk,
                    self.fd,
                    0,
                    0,
                ),
                _ATTR_BYTES,
            )
            ended = False
            try:
                bpf(MAP_LOOKUP_BATCH, attr, "map batch lookup")
            except BpfError as error:
                if error.errno != errno.ENOENT:
                    raise
                ended = True
            count = struct.unpack_from("=I", attr, 32)[0]
            result += values.raw[: count * size]
            if ended:
                return bytes(result)
            first = False

    def elements(self) -> Iterator[bytes]:
        """Values of an array in index order; of a per-CPU one all CPUs' values behind each other."""
        data = self.values()
        size = len(data) // self.max_entries
        return (data[at : at + size] for at in range(0, len(data), size))

    def memory(self) -> mmap.mmap:
        """Map an mmapable array into this process, read and write; elements are `stride` bytes apart."""
        pages = -(-self.stride * self.max_entries // mmap.PAGESIZE)
        return mmap.mmap(self.fd, pages * mmap.PAGESIZE)


def make_array(value_bytes: int, entries: int = 1) -> Map:
    """An array that no program knows, all zero. Raises BpfError."""
    attr = struct.pack("=IIIII", _ARRAY, 4, value_bytes, entries, 0)
    return Map(bpf(MAP_CREATE, attr, "make a map"))
