# SPDX-License-Identifier: Apache-2.0
"""What this kernel is like: struct offsets and drop reasons from BTF, features, identity of our network namespace."""

import dataclasses
import functools
import mmap
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from hostint_agent import bpf_calls, bpf_types
from hostint_report import drop_reasons

VMLINUX_BTF = Path("/sys/kernel/btf/vmlinux")
REASON_PREFIX = "SKB_DROP_REASON_"
_SO_NETNS_COOKIE = 71
# the first interface of every network namespace
_LOOPBACK = 1
_NETDEV_ALIGN = 32
_BTF_MAGIC = 0xEB9F
_BTF_KIND_STRUCT = 4
_BTF_KIND_ENUM = 6
# bytes behind the 12-byte header of each BTF kind, as (fixed, per member); Documentation/bpf/btf.rst
_BTF_TAIL = {
    1: (4, 0),
    3: (12, 0),
    4: (0, 12),
    5: (0, 12),
    6: (0, 8),
    13: (0, 8),
    14: (4, 0),
    15: (0, 12),
    17: (4, 0),
    19: (0, 12),
}
_SUBSYSTEM_INDEX = 256
_CODES_THAT_SAY_LITTLE = (
    drop_reasons.UNKNOWN,
    drop_reasons.UNMAPPED,
    drop_reasons.OTHER_SUBSYSTEM.code,
)
# of VXLAN by IANA and by Linux, of Geneve
_VXLAN_PORTS, _GENEVE_PORT = (4789, 8472), 6081


class KernelError(Exception):
    """This kernel lacks something the datapath cannot do without; the text says what."""


@dataclasses.dataclass(frozen=True, slots=True)
class Offsets:
    """Byte offsets of the kernel struct members that the programs read; names as in `struct config`."""

    skb_dev: int
    skb_head: int
    skb_data: int
    skb_tail: int
    skb_mac_header: int
    skb_network_header: int
    dev_ifindex: int
    dev_net: int
    dev_priv: int
    net_cookie: int


class Btf:
    """The running kernel's type information, read once and searched by name."""

    def __init__(self, data: bytes) -> None:
        magic, _, _, header, types, types_size, strings, _ = struct.unpack_from("<HBBIIIII", data)
        if magic != _BTF_MAGIC:
            raise KernelError(f"{VMLINUX_BTF} is not BTF (magic {magic:#x})")
        self._data = data
        self._strings = header + strings
        self._begin, self._end = header + types, header + types + types_size

    @classmethod
    def of_running_kernel(cls) -> "Btf":
        """Read /sys/kernel/btf/vmlinux. Raises KernelError where the kernel has none."""
        try:
            return cls(VMLINUX_BTF.read_bytes())
        except OSError as error:
            raise KernelError(
                f"{VMLINUX_BTF}: {error.strerror}; the kernel needs CONFIG_DEBUG_INFO_BTF"
            ) from error

    def _types(self) -> Iterator[tuple[int, int, int, int]]:
        """(position, name offset, kind, number of members) of every type, in id order from 1."""
        position = self._begin
        while position < self._end:
            name, info = struct.unpack_from("<II", self._data, position)
            kind, members = info >> 24 & 31, info & 0xFFFF
            yield position, name, kind, members
            fixed, each = _BTF_TAIL.get(kind, (0, 0))
            position += 12 + fixed + each * members

    def _named(self, offset: int, name: bytes) -> bool:
        return self._data.startswith(name, self._strings + offset)

    def _text(self, offset: int) -> str:
        start = self._strings + offset
        return self._data[start : self._data.index(b"\0", start)].decode()

    def enum(self, name: str) -> dict[int, str]:
        """Values and names of an enum; empty if the kernel has none of that name."""
        wanted = name.encode() + b"\0"
        for position, offset, kind, members in self._types():
            if kind == _BTF_KIND_ENUM and self._named(offset, wanted):
                pairs = struct.iter_unpack(
                    "<Ii", self._data[position + 12 : position + 12 + 8 * members]
                )
                return {value: self._text(text) for text, value in pairs}
        return {}

    def members(self, names: tuple[str, ...]) -> dict[str, dict[str, int]]:
        """Byte offsets of the members of the structs named, anonymous members opened up."""
        positions: list[int] = [0]
        found: dict[str, int] = {}
        wanted = {name: name.encode() + b"\0" for name in names}
        for position, offset, kind, members in self._types():
            positions.append(position)
            if kind == _BTF_KIND_STRUCT and members:
                for name, text in wanted.items():
                    if name not in found and self._named(offset, text):
                        found[name] = position
        return {name: dict(self._flatten(positions, at, 0)) for name, at in found.items()}

    def size(self, name: str) -> int:
        """Size of a struct in bytes; 0 if the kernel has none of that name."""
        wanted = name.encode() + b"\0"
        for position, offset, kind, members in self._types():
            if kind == _BTF_KIND_STRUCT and members and self._named(offset, wanted):
                return int(struct.unpack_from("<I", self._data, position + 8)[0])
        return 0

    def _flatten(self, positions: list[int], position: int, base: int) -> Iterator[tuple[str, int]]:
        info = struct.unpack_from("<I", self._data, position + 4)[0]
        for index in range(info & 0xFFFF):
            name, kind, where = struct.unpack_from("<III", self._data, position + 12 + 12 * index)
            bits = where & 0xFFFFFF if info >> 31 else where
            text = self._text(name)
            if text:
                yield text, base + bits // 8
            else:
                yield from self._flatten(positions, positions[kind], base + bits // 8)


@functools.cache
def _types_of_interest() -> tuple[dict[str, dict[str, int]], dict[int, str]]:
    """(members of the structs that the programs read, drop reasons): all that is kept of some megabytes."""
    btf = Btf.of_running_kernel()
    structs = btf.members(("sk_buff", "net_device", "net"))
    if "net_device" in structs:
        # before the member existed (Linux 6.10): netdev_priv()
        size = btf.size("net_device")
        structs["net_device"].setdefault("priv", -(-size // _NETDEV_ALIGN) * _NETDEV_ALIGN)
    return structs, btf.enum("skb_drop_reason")


def offsets() -> Offsets:
    """Offsets of the running kernel. Raises KernelError naming the member that is missing."""
    structs, _ = _types_of_interest()

    def offset(struct_name: str, member: str) -> int:
        try:
            return structs[struct_name][member]
        except KeyError:
            raise KernelError(f"struct {struct_name} of this kernel has no {member}") from None

    return Offsets(
        skb_dev=offset("sk_buff", "dev"),
        skb_head=offset("sk_buff", "head"),
        skb_data=offset("sk_buff", "data"),
        skb_tail=offset("sk_buff", "tail"),
        skb_mac_header=offset("sk_buff", "mac_header"),
        skb_network_header=offset("sk_buff", "network_header"),
        dev_ifindex=offset("net_device", "ifindex"),
        dev_net=offset("net_device", "nd_net"),
        dev_priv=offset("net_device", "priv"),
        net_cookie=offset("net", "net_cookie"),
    )


def drop_reason_names() -> dict[int, str]:
    """Kernel drop reasons by index into the drop maps, without prefix; subsystems other than the core share one.

    Numbers move between kernels, names do not (enum skb_drop_reason).
    """
    _, core = _types_of_interest()
    names = {value: name.removeprefix(REASON_PREFIX) for value, name in core.items()}
    return {value: name for value, name in names.items() if value < _SUBSYSTEM_INDEX}


def netns_cookie() -> int:
    """Identity of our network namespace, as the kernel tells it (SO_NETNS_COOKIE)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), "little")


def wall_offset_ns() -> int:
    """CLOCK_REALTIME - CLOCK_MONOTONIC now, from the tightest of three readings."""
    readings = []
    for _ in range(3):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]


def drop_reason_entries(names: Mapping[int, str]) -> dict[int, bytes]:
    """Values of the map drop_reasons by index: what to report of each kernel reason."""
    entries = {}
    for index in range(bpf_types.DROP_REASONS):
        name = names.get(index)
        treatment = (
            drop_reasons.for_kernel_name(name)
            if index < _SUBSYSTEM_INDEX
            else drop_reasons.OTHER_SUBSYSTEM
        )
        flags = bpf_types.DropFlag(0)
        flags |= bpf_types.DropFlag.REPORT if treatment.reported else 0
        flags |= bpf_types.DropFlag.AFTER_EGRESS if treatment.after_egress else 0
        flags |= bpf_types.DropFlag.QUEUE if treatment.queue else 0
        flags |= bpf_types.DropFlag.CHECK_TTL if name == "IP_INHDR" else 0
        flags |= bpf_types.DropFlag.NOT_ECHO_REPLY if name == "NO_SOCKET" else 0
        flags |= bpf_types.DropFlag.NOT_GROUP if name == "NOT_SPECIFIED" else 0
        flags |= bpf_types.DropFlag.NOT_ABOVE_IP if name == "NOT_SPECIFIED" else 0
        flags |= bpf_types.DropFlag.OF_COPY if name == "PACKET_SOCK_ERROR" else 0
        flags |= bpf_types.DropFlag.BY_FUNCTION if treatment.code in _CODES_THAT_SAY_LITTLE else 0
        entries[index] = bytes(bpf_types.DropReason(code=treatment.code, flags=int(flags)))
    return entries


class DatapathConfig:
    """The map `config` of a loaded datapath, and the tables that depend on this kernel alone."""

    def __init__(self, maps: Path) -> None:
        """Open the pinned maps below `maps`. Raises bpf_calls.BpfError."""
        self._maps = maps
        opened = bpf_calls.Map.open(maps / "config")
        self._memory: mmap.mmap = opened.memory()
        opened.close()
        self._config = bpf_types.Config.from_buffer(self._memory)

    def configure(self) -> None:
        """Write what depends on this kernel and namespace; programs may be running already. Raises KernelError."""
        for field, value in dataclasses.asdict(offsets()).items():
            setattr(self._config, field, value)
        self._config.netns_cookie = netns_cookie()
        self.set_tunnels()
        self.refresh_wall_offset()
        table = bpf_calls.Map.open(self._maps / "drop_reasons")
        for index, value in drop_reason_entries(drop_reason_names()).items():
            table.update(struct.pack("=I", index), value)
        table.close()

    def refresh_wall_offset(self) -> None:
        """Follow the wall clock; one aligned store, so no program sees half of it."""
        self._config.wall_offset_ns = wall_offset_ns() & (1 << 64) - 1

    def set_enabled(self, enabled: bool) -> None:
        """Let the programs look at packets, or return at once."""
        self._config.enabled = int(enabled)

    def set_hold(self, hold: bool) -> None:
        """Let the programs observe and count, but report nothing; or let them report."""
        self._config.hold = int(hold)

    def set_port_is_ifindex(self, same: bool) -> None:
        """Spare the programs the look at the port ids, if every interface has its index for one."""
        self._config.port_is_ifindex = int(same)

    def set_tunnels(self, vxlan: Iterable[int] = (), geneve: Iterable[int] = ()) -> None:
        """UDP ports of tunnel devices. The usual ones come after them: a CNI may put packets into tunnels without a device."""
        tunnels = self._config.tunnels
        ports = [*dict.fromkeys((*vxlan, *_VXLAN_PORTS))]
        tunnels.vxlan[:] = (ports + [0] * len(tunnels.vxlan))[: len(tunnels.vxlan)]
        tunnels.geneve = next(iter(geneve), _GENEVE_PORT)

    def set_node_id(self, node_id: int) -> None:
        """Change the node id that reports carry."""
        self._config.node_id = node_id


def ask_for_tcx() -> None:
    """Ask for a TCX list, that of the loopback. Raises OSError: this kernel has no TCX, or we may not ask (EPERM)."""
    bpf_calls.tcx_program_ids(_LOOPBACK, bpf_calls.TCX_INGRESS)


def has_tcx() -> bool:
    """Return True if this kernel has TCX, and we may use it."""
    try:
        ask_for_tcx()
    except OSError:
        return False
    return True
