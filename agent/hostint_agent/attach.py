# SPDX-License-Identifier: Apache-2.0
"""Attach the pinned programs to the watched interfaces, first in order, and keep it so. TCX by pinned links, clsact as fallback."""

import contextlib
import dataclasses
import errno
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pyroute2
import structlog

from hostint_agent import bpf_calls, interfaces, local_addresses

Mode = Literal["auto", "tcx", "clsact"]
Direction = Literal["ingress", "egress"]
DIRECTIONS: tuple[Direction, ...] = ("ingress", "egress")
DROP_TRACEPOINT = "kfree_skb"
# how our clsact filter is recognised: nothing of another owner is ever touched
FILTER_HANDLE = 0x1D7
FILTER_PREFERENCE = 1
FILTER_NAME = "hostint"
_TCX_TYPE = {"ingress": bpf_calls.TCX_INGRESS, "egress": bpf_calls.TCX_EGRESS}
_CLSACT_PARENT = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_LINK_PIN = re.compile(r"tcx-(\d+)-(ingress|egress)$")
_MAX_PORT = 65535
_CHECK_INTERVAL_S = 1.0
_DEBOUNCE_S = 0.02

log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, slots=True)
class Attachment:
    """How one interface is attached; `error` says why not."""

    interface: interfaces.Interface
    port: int
    method: str
    error: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What is attached now, by ifindex; `error` when the interfaces could not even be read."""

    attachments: tuple[Attachment, ...] = ()
    error: str | None = None

    @property
    def failed(self) -> tuple[Attachment, ...]:
        """Interfaces that should be watched but are not."""
        return tuple(a for a in self.attachments if a.error)


class TcxHooks:
    """Pinned TCX links at the head of each interface's list."""

    method = "tcx"

    def __init__(self, links: Path, programs: Path) -> None:
        self._links = links
        self._programs = programs

    def _pin(self, ifindex: int, direction: Direction) -> Path:
        return self._links / f"tcx-{ifindex}-{direction}"

    def ensure(self, ifindex: int, direction: Direction) -> None:
        """Have the current program run first. Raises bpf_calls.BpfError."""
        program = bpf_calls.obj_get(self._programs / direction)
        try:
            self._ensure_program(ifindex, direction, program)
        finally:
            os.close(program)

    def _ensure_program(self, ifindex: int, direction: Direction, program: int) -> None:
        pin = self._pin(ifindex, direction)
        wanted = bpf_calls.program_id(program)
        if pin.exists():
            link = bpf_calls.obj_get(pin)
            try:
                attached, target = bpf_calls.tcx_link_target(link)
                if target == ifindex:
                    if attached != wanted:
                        bpf_calls.link_update(link, program)
                    if bpf_calls.tcx_program_ids(ifindex, _TCX_TYPE[direction])[:1] == [wanted]:
                        return
            finally:
                os.close(link)
            # the device is another one by now, or somebody put himself before us
            pin.unlink()
        link = bpf_calls.tcx_link_create(program, ifindex, _TCX_TYPE[direction])
        try:
            bpf_calls.obj_pin(link, pin)
        finally:
            os.close(link)

    def remove_others(self, wanted: frozenset[int]) -> None:
        """Detach from every interface that is not wanted (any more)."""
        for pin in list(self._links.iterdir()):
            match = _LINK_PIN.match(pin.name)
            if match and int(match[1]) not in wanted:
                pin.unlink()


class ClsactHooks:
    """Our filter in the clsact qdisc, for kernels without TCX: by handle and preference, never touching the qdisc itself."""

    method = "clsact"

    def __init__(self, programs: Path) -> None:
        self._programs = programs

    def ensure(self, ifindex: int, direction: Direction) -> None:
        """Have our filter first in preference 1. Raises OSError or pyroute2.NetlinkError."""
        program = bpf_calls.obj_get(self._programs / direction)
        try:
            with pyroute2.IPRoute() as netlink:
                filters = _filters(netlink, ifindex, direction)
                ours = [f for f in filters if f.is_ours]
                wanted = bpf_calls.program_id(program)
                if ours and filters[0] == ours[0] and ours[0].program == wanted:
                    return
                if ours:
                    _delete_filter(netlink, ifindex, direction)
                _add_filter(netlink, ifindex, direction, program)
        finally:
            os.close(program)

    def remove_others(self, wanted: frozenset[int]) -> None:
        """Take our filter off every interface that is not wanted (any more)."""
        with pyroute2.IPRoute() as netlink:
            for message in netlink.get_links():
                if message["index"] not in wanted:
                    remove_filters(netlink, message["index"])


@dataclasses.dataclass(frozen=True, slots=True)
class _Filter:
    preference: int
    handle: int
    name: str | None
    program: int | None

    @property
    def is_ours(self) -> bool:
        return self.handle == FILTER_HANDLE and self.name == FILTER_NAME


def _filters(netlink: Any, ifindex: int, direction: Direction) -> list[_Filter]:
    """BPF filters of one hook in the order they run; none where there is no clsact."""
    try:
        messages = list(netlink.get_filters(index=ifindex, parent=_CLSACT_PARENT[direction]))
    except pyroute2.NetlinkError as error:
        if error.code in (errno.EINVAL, errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return []
        raise
    found = []
    for message in messages:
        options = message.get_attr("TCA_OPTIONS")
        if message.get_attr("TCA_KIND") != "bpf" or not options or not message["handle"]:
            continue
        found.append(
            _Filter(
                preference=message["info"] >> 16,
                handle=message["handle"],
                name=options.get_attr("TCA_BPF_NAME"),
                program=options.get_attr("TCA_BPF_ID"),
            )
        )
    return found


def _add_filter(netlink: Any, ifindex: int, direction: Direction, program: int) -> None:
    with contextlib.suppress(FileExistsError):
        try:
            netlink.tc("add", "clsact", ifindex)
        except pyroute2.NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
    netlink.tc(
        "add-filter",
        "bpf",
        ifindex,
        FILTER_HANDLE,
        fd=program,
        name=FILTER_NAME,
        parent=_CLSACT_PARENT[direction],
        prio=FILTER_PREFERENCE,
        protocol=3,  # ETH_P_ALL
        direct_action=True,
    )


def _delete_filter(netlink: Any, ifindex: int, direction: Direction) -> None:
    netlink.tc(
        "del-filter",
        "bpf",
        ifindex,
        FILTER_HANDLE,
        parent=_CLSACT_PARENT[direction],
        prio=FILTER_PREFERENCE,
        protocol=3,
    )


def remove_filters(netlink: Any, ifindex: int) -> list[Direction]:
    """Remove our clsact filters from one interface, nothing else; the directions that had one."""
    removed: list[Direction] = []
    for direction in DIRECTIONS:
        if any(f.is_ours for f in _filters(netlink, ifindex, direction)):
            _delete_filter(netlink, ifindex, direction)
            removed.append(direction)
    return removed


class DropLink:
    """The pinned link of the drop program to its tracepoint."""

    def __init__(self, links: Path, programs: Path) -> None:
        self._pin = links / DROP_TRACEPOINT
        self._programs = programs

    def ensure(self) -> None:
        """Have the current drop program attached. Raises bpf_calls.BpfError."""
        program = bpf_calls.obj_get(self._programs / "drop")
        try:
            if self._pin.exists() and self._attached() == bpf_calls.program_id(program):
                return
            # the new one first: a packet that dies in between is seen by either, and its slot is used up by the first
            link = bpf_calls.raw_tracepoint_open(DROP_TRACEPOINT, program)
            try:
                self._pin.unlink(missing_ok=True)
                bpf_calls.obj_pin(link, self._pin)
            finally:
                os.close(link)
        finally:
            os.close(program)

    def _attached(self) -> int:
        link = bpf_calls.obj_get(self._pin)
        try:
            return bpf_calls.tcx_link_target(link)[0]
        finally:
            os.close(link)


class Ports:
    """Stable 16-bit port ids: the interface index where it fits, else an alias; kept in the pinned map."""

    def __init__(self, maps: Path) -> None:
        self._map = bpf_calls.Map.open(maps / "ports")
        self._ids = {
            struct.unpack("=I", key)[0]: struct.unpack("=Q", self._map.lookup(key))[0]
            for key in list(self._map.keys())
        }

    def assign(self, ifindexes: Iterable[int]) -> dict[int, int]:
        """Port ids of these interfaces; ids of interfaces that are gone become free."""
        wanted = set(ifindexes)
        for gone in set(self._ids) - wanted:
            self._map.delete(struct.pack("=I", gone))
            del self._ids[gone]
        for ifindex in sorted(wanted - set(self._ids)):
            port = self._free_port(ifindex)
            self._map.update(struct.pack("=I", ifindex), struct.pack("=Q", port))
            self._ids[ifindex] = port
        return dict(self._ids)

    def _free_port(self, ifindex: int) -> int:
        taken = set(self._ids.values())
        if ifindex <= _MAX_PORT and ifindex not in taken:
            return ifindex
        return next(port for port in range(_MAX_PORT, 0, -1) if port not in taken)


class Attacher:
    """Keeps the programs attached, in a thread of its own: a TCX link takes milliseconds to make."""

    def __init__(
        self,
        pin_dir: Path,
        directory: Path,
        *,
        patterns: interfaces.Patterns,
        mode: Mode,
        on_change: Callable[[State], None],
    ) -> None:
        """`directory` is `PIN/<build>` as the loader returned it. Raises bpf_calls.BpfError."""
        links = pin_dir / "links"
        links.mkdir(parents=True, exist_ok=True)
        programs = directory / "programs"
        self._tcx = TcxHooks(links, programs)
        self._clsact = ClsactHooks(programs)
        self._drop = DropLink(links, programs)
        self._ports = Ports(directory / "maps")
        self._local = local_addresses.LocalAddresses(directory / "maps")
        self._patterns = patterns
        self._mode = mode
        self._on_change = on_change
        self._state = State()
        self._wake_read, self._wake_write = os.pipe()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="attach", daemon=True)

    def state(self) -> State:
        """What is attached, as of the last look."""
        return self._state

    def start(self) -> None:
        """Attach now, then follow changes in the thread."""
        self.reconcile()
        self._thread.start()

    def stop(self) -> None:
        """Stop following; everything stays attached."""
        self._stopping = True
        os.write(self._wake_write, b"x")
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def reconcile(self) -> State:
        """Look at the interfaces once and attach what is missing; never raises for what the world does."""
        try:
            state = self._look()
        except (OSError, pyroute2.NetlinkError) as error:
            state = State(self._state.attachments, error=str(error))
        if state != self._state:
            self._tell(state)
            self._state = state
            self._on_change(state)
        return state

    def _look(self) -> State:
        network = interfaces.read_network()
        chosen = interfaces.choose(network, self._patterns)
        ports = self._ports.assign(interface.ifindex for interface in chosen)
        self._local.replace(network.local)
        self._drop.ensure()
        attachments = tuple(self._attach(i, ports[i.ifindex]) for i in chosen)
        methods = {a.interface.ifindex: a.method for a in attachments}
        self._tcx.remove_others(frozenset(i for i, m in methods.items() if m == "tcx"))
        if self._mode == "clsact" or "clsact" in methods.values():
            self._clsact.remove_others(frozenset(methods))
        return State(attachments)

    def _attach(self, interface: interfaces.Interface, port: int) -> Attachment:
        hooks: TcxHooks | ClsactHooks = self._clsact if self._mode == "clsact" else self._tcx
        try:
            for direction in DIRECTIONS:
                hooks.ensure(interface.ifindex, direction)
        except (OSError, pyroute2.NetlinkError) as error:
            if self._mode == "auto" and getattr(error, "errno", None) == errno.EINVAL:
                log.info("this kernel has no tcx, using clsact")
                self._mode = "clsact"
                return self._attach(interface, port)
            return Attachment(interface, port, hooks.method, error=str(error))
        return Attachment(interface, port, hooks.method)

    def _tell(self, state: State) -> None:
        before = {(a.interface.ifindex, a.interface.name, a.error) for a in self._state.attachments}
        after = {(a.interface.ifindex, a.interface.name, a.error) for a in state.attachments}
        for ifindex, name, error in sorted(after - before, key=str):
            if error:
                log.warning("interface not attached", iface=name, ifindex=ifindex, error=error)
            else:
                log.info("interface attached", iface=name, ifindex=ifindex)
        for ifindex, name, _ in sorted(before - after, key=str):
            if ifindex not in {a.interface.ifindex for a in state.attachments}:
                log.info("interface gone", iface=name, ifindex=ifindex)
        if state.error and state.error != self._state.error:
            log.warning("interfaces not read", error=state.error)

    def _run(self) -> None:
        with interfaces.Changes() as changes:
            while not self._stopping:
                if changes.wait(_CHECK_INTERVAL_S, [self._wake_read]) and not self._stopping:
                    time.sleep(_DEBOUNCE_S)  # a new pod is a burst of messages
                if not self._stopping:
                    self.reconcile()
