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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import structlog

from hostint_agent import (
    bpf_calls,
    choice,
    clsact,
    delivery,
    interfaces,
    kernel,
    loader,
    pacing,
    pin_keeper,
)

Mode = Literal["auto", "tcx", "clsact"]
DROP_TRACEPOINT = "kfree_skb"
_LINK_PIN = re.compile(r"tcx-(\d+)-(ingress|egress)")
_MAX_PORT = 65535
_DROP_STEP, _PORTS_STEP = "drop program", "port ids"
# nobody tells when a TCX list changes, so it is asked for, often enough to be first again within a second; with hundreds of
# interfaces less often, so that the questions stay below 0.2 % of a core
_CHECK_INTERVAL_S, _MAX_CHECK_INTERVAL_S = 0.25, 0.6
_CHECK_SHARE = 0.002
# everything else is told by netlink: this is for what nobody thought of
_LOOK_INTERVAL_S = 30.0

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
    unseen: tuple[choice.Unseen, ...] = ()  # by what the node's traffic passes the attachments by
    failures: Mapping[str, str] = dataclasses.field(default_factory=dict)  # causes by step

    @property
    def failed(self) -> tuple[Attachment, ...]:
        """Interfaces that should be watched but are not."""
        return tuple(a for a in self.attachments if a.error)

    @property
    def drops_unseen(self) -> bool:
        """True if the drop program could not be attached."""
        return _DROP_STEP in self.failures


class TcxHooks:
    """Pinned TCX links at the head of each interface's list."""

    method = "tcx"

    def __init__(self, links: Path, programs: Mapping[str, bpf_calls.Program]) -> None:
        self._links = links
        self._programs = programs
        self._heads: dict[tuple[int, clsact.Direction], bpf_calls.TcxHead] = {}

    def _pin(self, ifindex: int, direction: clsact.Direction) -> Path:
        return self._links / f"tcx-{ifindex}-{direction}"

    def in_place(self) -> bool:
        """True if every hook that `ensure` has seen to still has our program first."""
        return all(
            head.program_id() == self._programs[direction].id
            for (_, direction), head in self._heads.items()
        )

    def ensure(self, ifindex: int, direction: clsact.Direction) -> str | None:
        """Have the current program run first; what was wrong, if anything. Raises bpf_calls.BpfError."""
        program, pin = self._programs[direction], self._pin(ifindex, direction)
        head = self._heads.get((ifindex, direction))
        if head is None:
            head = bpf_calls.TcxHead(ifindex, bpf_calls.TCX_TYPE[direction])
        if head.program_id() == program.id and pin.exists():
            self._heads[ifindex, direction] = head
            return None
        self._heads.pop((ifindex, direction), None)
        wrong = "not attached"
        if pin.exists():
            wrong = "not first"
            if self._update(pin, ifindex, program) and head.program_id() == program.id:
                self._heads[ifindex, direction] = head
                return "another program"
            # the device is another one by now, or somebody put himself before us
            pin.unlink()
        link = bpf_calls.tcx_link_create(program.fd, ifindex, bpf_calls.TCX_TYPE[direction])
        try:
            bpf_calls.obj_pin(link, pin)
        finally:
            os.close(link)
        self._heads[ifindex, direction] = head
        return wrong

    def _update(self, pin: Path, ifindex: int, program: bpf_calls.Program) -> bool:
        """Have a pinned link run this program; False if it is of a device that is gone."""
        with bpf_calls.opened(pin) as link:
            attached, target = bpf_calls.tcx_link_target(link)
            if target != ifindex:
                return False
            if attached != program.id:
                bpf_calls.link_update(link, program.fd)
            return True

    def detach_others(self) -> list[tuple[int, str]]:
        """Remove links of ours that run other programs than these; which there were. Raises OSError."""
        removed = []
        for pin in sorted(self._links.iterdir()):
            match = _LINK_PIN.fullmatch(pin.name)
            if match and self._attached(pin) not in (None, self._programs[match[2]].id):
                pin.unlink(missing_ok=True)
                removed.append((int(match[1]), match[2]))
        return removed

    def _attached(self, pin: Path) -> int | None:
        """Return the kernel id of a link's program; None if it was unpinned meanwhile."""
        try:
            with bpf_calls.opened(pin) as link:
                return bpf_calls.tcx_link_target(link)[0]
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def keep_only(self, wanted: frozenset[int]) -> None:
        """Detach from every interface that is not wanted (any more)."""
        self._heads = {key: head for key, head in self._heads.items() if key[0] in wanted}
        for pin in list(self._links.iterdir()):
            match = _LINK_PIN.fullmatch(pin.name)
            if match and int(match[1]) not in wanted:
                pin.unlink(missing_ok=True)


class DropLink:
    """The pinned link of the drop program to its tracepoint."""

    def __init__(self, links: Path, program: bpf_calls.Program) -> None:
        self._pin = links / DROP_TRACEPOINT
        self._program = program
        self._is_attached = False

    def in_place(self) -> bool:
        """True as long as the pin is there, which is what holds the link, or was not made yet."""
        return not self._is_attached or self._pin.exists()

    def ensure(self) -> None:
        """Have the current drop program attached. Raises bpf_calls.BpfError."""
        self._is_attached = False
        if not self._pin.exists() or self._attached() != self._program.id:
            self._attach()
        self._is_attached = True

    def _attach(self) -> None:
        # the new one first: of two that see a packet die, the first uses up its slot
        link = bpf_calls.raw_tracepoint_open(DROP_TRACEPOINT, self._program.fd)
        try:
            self._pin.unlink(missing_ok=True)
            bpf_calls.obj_pin(link, self._pin)
        finally:
            os.close(link)

    def _attached(self) -> int:
        with bpf_calls.opened(self._pin) as link:
            return bpf_calls.tcx_link_target(link)[0]


class Ports:
    """Stable 16-bit port ids: the interface index where it fits, else an alias; kept in the pinned map."""

    def __init__(self, maps: Path) -> None:
        self._map = bpf_calls.Map.open(maps / "ports")
        self._config = kernel.DatapathConfig(maps)
        self._ids = {
            struct.unpack("=I", key)[0]: struct.unpack("=Q", self._map.lookup(key))[0]
            for key in list(self._map.keys())
        }

    @property
    def ids(self) -> Mapping[int, int]:
        """Port ids by ifindex, of the interfaces that have one."""
        return dict(self._ids)

    def assign(self, ifindexes: Iterable[int]) -> Mapping[int, int]:
        """Give these interfaces port ids; those of interfaces that are gone become free.

        Raises OSError.
        """
        wanted = set(ifindexes)
        for gone in set(self._ids) - wanted:
            self._map.delete(struct.pack("=I", gone))
            del self._ids[gone]
        for ifindex in sorted(wanted - set(self._ids)):
            port = self._free_port(ifindex)
            if port != ifindex:
                self._config.set_port_is_ifindex(False)
            self._update(ifindex, port)
            self._ids[ifindex] = port
        self._config.set_port_is_ifindex(all(i == port for i, port in self._ids.items()))
        return self.ids

    def _update(self, ifindex: int, port: int) -> None:
        try:
            self._map.update(struct.pack("=I", ifindex), struct.pack("=Q", port))
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            words = f"{len(self._ids):,} interfaces have one, and no more fit"
            raise OSError(error.errno, words) from error

    def _free_port(self, ifindex: int) -> int:
        taken = set(self._ids.values())
        if ifindex <= _MAX_PORT and ifindex not in taken:
            return ifindex
        return next(port for port in range(_MAX_PORT, 0, -1) if port not in taken)


class _Steps:
    """Run the steps of a look one by one: a step that fails must not stop the others."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Do a step; keep its failure by its name."""
        try:
            yield
        except pin_keeper.PinsTaken:
            raise
        except Exception as error:  # noqa: BLE001 (no kernel may end the thread)
            self.failures[what] = str(error) or type(error).__name__


class Attacher:
    """Keeps the programs attached, in a thread of its own: a TCX link takes milliseconds to make."""

    def __init__(
        self,
        pin_dir: Path,
        directory: Path,
        *,
        patterns: interfaces.Patterns,
        mode: Mode,
        cgroup: Path,
        on_change: Callable[[State], None],
        on_look: Callable[[State], bool] = lambda _: True,
        addresses: Iterable[str] = (),
    ) -> None:
        """`directory` is `PIN/<build>` as the loader returned it, `cgroup` as in cgroup_root.

        `on_look` is called after every look, in the thread that looked; False: look again soon.
        `addresses` are those that the cluster knows the node by. Raises bpf_calls.BpfError.
        """
        self._links = pin_dir / "links"
        programs = {
            name: bpf_calls.Program.open(directory / "programs" / name)
            for name in loader.programs()
        }
        self._programs = programs
        self._pins = pin_keeper.PinKeeper(pin_dir, directory)
        if mode == "auto":
            mode = "tcx" if kernel.has_tcx() else "clsact"
            log.info("attaching", method=mode)
        self._tcx = TcxHooks(self._links, programs)
        self._hooks = self._tcx if mode == "tcx" else clsact.Hooks(programs)
        self._drop = DropLink(self._links, programs["drop"])
        self._ports = Ports(directory / "maps")
        self._delivery = delivery.DeliveryLinks(self._links, programs, cgroup)
        self._config = kernel.DatapathConfig(directory / "maps")
        self._patterns = patterns
        self._on_change, self._on_look = on_change, on_look
        self._state = State()
        self._network: interfaces.Network | None = None
        self._addresses = frozenset(addresses)
        self._look_wanted = threading.Event()
        self.end_cause = "the attach thread has ended"
        # of steps that failed, and of what others displaced: neither may keep the other waiting
        self._retries, self._tries = pacing.TokenBucket(), pacing.TokenBucket()
        self._pace = pacing.Pace()
        self._next_look = self._next_check = 0.0
        # before the first look: what changes after it must not go unnoticed
        self._changes = interfaces.Changes()
        self._wake_read, self._wake_write = os.pipe()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="attach", daemon=True)

    @property
    def alive(self) -> bool:
        """False when the thread has ended though nobody stopped it."""
        return self._stopping or not self._thread.ident or self._thread.is_alive()

    def state(self) -> State:
        """What is attached, as of the last look."""
        return self._state

    def drop_recursion_misses(self) -> int:
        """Drops that the drop program did not see, since it ran already on that CPU."""
        return bpf_calls.program_info(self._programs["drop"].fd).recursion_misses

    def add_address(self, address: str) -> None:
        """Ask, in a look that is due now, which interface sees traffic of this address, too."""
        if address not in self._addresses:
            self._addresses |= {address}
            self._look_wanted.set()

    def start(self) -> None:
        """Attach now, then follow changes in the thread."""
        self._forget_other_method()
        self.reconcile()
        self._thread.start()

    def stop(self) -> None:
        """Stop following; everything stays attached."""
        self._stopping = True
        os.write(self._wake_write, b"x")
        if self._thread.is_alive():
            self._thread.join()
        self._changes.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._pins.close()
        for program in self._programs.values():
            os.close(program.fd)

    def _forget_other_method(self) -> None:
        """Detach what an agent with another `--attach` left: a packet would be seen twice."""
        try:
            if self._hooks is self._tcx:
                clsact.remove_all()
            elif self._links.is_dir():
                self._tcx.keep_only(frozenset())
        except OSError as error:
            log.warning("older attachments not removed", error=str(error))

    def reconcile(self) -> State:
        """Look at the interfaces once and attach what is missing; never raises for what the world does."""
        begun = time.thread_time()
        state = self._look()
        self._pace.spend(time.thread_time() - begun)
        if state != self._state:
            self._log(state)
            self._state = state
            self._on_change(state)
        trouble = not self._on_look(state) or state.error or state.failed or state.failures
        again = trouble and self._retries.spend()
        self._next_look = time.monotonic() + (_CHECK_INTERVAL_S if again else _LOOK_INTERVAL_S)
        return state

    def detach_others(self) -> None:
        """Detach what of ours is still attached and is not these programs. Only in the thread that looks. Raises OSError."""
        programs = frozenset(program.id for program in self._programs.values())
        removed = [*self._tcx.detach_others(), *clsact.remove_all(except_programs=programs)]
        for ifindex, direction in removed:
            log.warning("older program detached", ifindex=ifindex, hook=direction)

    def _look(self) -> State:
        self._look_wanted.clear()
        steps = _Steps()
        with steps.step("pins"):
            self._pins.restore()
            self._links.mkdir(parents=True, exist_ok=True)
        with steps.step(_DROP_STEP):
            self._drop.ensure()
        with steps.step("delivery to sockets"):
            self._delivery.ensure_sockets()
        for name in delivery.HOST:
            with steps.step(f"delivery to the host, {name}"):
                self._delivery.ensure_host(name)
        error = self._read()
        network = self._network
        if network is None:
            return State(error=error, failures=steps.failures)
        chosen = choice.choose(network, self._patterns)
        ports = self._describe(network, chosen, steps)
        cause = steps.failures.get(_PORTS_STEP)
        attached = [
            self._attach(interface, ports[interface.ifindex])
            if interface.ifindex in ports
            # The reports of its packets would name no interface.
            else Attachment(interface, 0, self._hooks.method, error=f"no port id: {cause}")
            for interface in chosen
        ]
        attachments = tuple(attachment for attachment in attached if attachment)
        with steps.step("older attachments"):
            self._hooks.keep_only(frozenset(interface.ifindex for interface in chosen))
        unseen = choice.unseen(network, self._patterns, chosen, self._addresses)
        return State(attachments, error, unseen, steps.failures)

    def _read(self) -> str | None:
        """Read the network; where that fails what was read before stays. Return what failed."""
        try:
            self._network = interfaces.read_network()
        except OSError as error:
            return str(error)
        return None

    def _describe(
        self, network: interfaces.Network, chosen: list[interfaces.Interface], steps: _Steps
    ) -> Mapping[int, int]:
        """Write what the programs must know of this network. Return port ids by ifindex."""
        with steps.step(_PORTS_STEP):
            self._ports.assign(interface.ifindex for interface in chosen)
        with steps.step("tunnel ports"):
            vxlan, geneve = network.tunnel_ports("vxlan"), network.tunnel_ports("geneve")
            self._config.set_tunnels(vxlan, geneve)
        return self._ports.ids

    def _attach(self, interface: interfaces.Interface, port: int) -> Attachment | None:
        """Attach to an interface; None if it has gone since it was read."""
        cause = None
        try:
            self._attach_hooks(interface)
        except Exception as error:  # noqa: BLE001 (the others must be attached)
            if isinstance(error, OSError) and error.errno == errno.ENODEV:
                return None
            cause = str(error)
        return Attachment(interface, port, self._hooks.method, error=cause)

    def _attach_hooks(self, interface: interfaces.Interface) -> None:
        known = any(a.interface.ifindex == interface.ifindex for a in self._state.attachments)
        for direction in clsact.DIRECTIONS:
            wrong = self._hooks.ensure(interface.ifindex, direction)
            if wrong and known:
                log.info("attached again", iface=interface.name, hook=direction, was=wrong)

    def _log(self, state: State) -> None:
        """Log what is not as it was before."""
        self._log_attachments(state)
        if state.error and state.error != self._state.error:
            log.warning("interfaces not read", error=state.error)
        for step, cause in state.failures.items():
            if self._state.failures.get(step) != cause:
                log.warning("step failed, retrying", step=step, error=cause)
        for step in self._state.failures.keys() - state.failures.keys():
            log.info("step succeeded again", step=step)
        for each in set(state.unseen) - set(self._state.unseen):
            log.warning("traffic of the node is not watched", iface=each.name, cause=str(each))
        for each in set(self._state.unseen) - set(state.unseen):
            log.info("traffic of the node is watched again", iface=each.name)

    def _log_attachments(self, state: State) -> None:
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

    def _run(self) -> None:
        try:
            self._follow()
        except pin_keeper.PinsTaken as error:
            self.end_cause = str(error)

    def _follow(self) -> None:
        while not self._stopping:
            until_check_s = max(0.0, self._next_check - time.monotonic())
            changed = self._changes.wait(until_check_s, [self._wake_read])
            if changed and not self._stopping:
                time.sleep(self._pace.gather_s())
                self._changes.drain()
            if not self._stopping and (changed or self._is_due()):
                self.reconcile()

    def _is_due(self) -> bool:
        now = time.monotonic()
        if self._look_wanted.is_set() or now >= self._next_look:
            return True
        # Messages of routes that nothing depends on may come by the thousand.
        if now < self._next_check:
            return False
        begun = time.thread_time()
        in_place = (
            self._hooks.in_place()
            and self._drop.in_place()
            and self._delivery.in_place()
            and self._pins.in_place()
        )
        cost_s = time.thread_time() - begun
        wanted = max(cost_s / _CHECK_SHARE, _CHECK_INTERVAL_S)
        self._next_check = now + min(wanted, _MAX_CHECK_INTERVAL_S)
        return not in_place and self._tries.spend()
