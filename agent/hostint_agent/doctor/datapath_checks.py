# SPDX-License-Identifier: Apache-2.0
"""Checks of `hostint-agent doctor` that concern what is loaded and attached, and where. They look, and change nothing."""

import errno
import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostint_agent import (
    choice,
    clsact,
    hook_programs,
    interfaces,
    kernel,
    loader,
    netlink,
    pinned,
    settings,
)
from hostint_agent.doctor import finding
from hostint_agent.doctor.finding import Finding

# of hundreds of interfaces that are as they should be
_MOST_NAMES = 10
# of the tables in net/core that the kernel has for its first network namespace alone
_HOST_ONLY = Path("/proc/sys/net/core/dev_weight")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A build whose programs are pinned: their kernel ids by name.

    `netns_cookie` and `node_id` are 0 where they are not known.
    """

    directory: Path
    programs: Mapping[str, int]
    enabled: bool
    held: bool
    netns_cookie: int
    node_id: int = 0


@dataclass(frozen=True, slots=True)
class Hook:
    """What runs on one hook, in order, as (kernel id, name)."""

    direction: clsact.Direction
    runs: Sequence[tuple[int, str]]


def _opened(directory: Path, *, same_maps: bool) -> Loaded:
    """Look at a build; `same_maps`: its map `config` is like ours. Raises bpf_calls.BpfError."""
    ids = {name: pinned.program(directory, name).id for name in loader.programs()}
    if not same_maps:
        return Loaded(directory, ids, enabled=True, held=False, netns_cookie=0)
    config = pinned.config(directory)
    enabled, held = bool(config.enabled), bool(config.hold)
    return Loaded(directory, ids, enabled, held, config.netns_cookie, config.node_id)


def find(pin_dir: Path, bpf_dir: Path) -> tuple[Finding, Loaded | None]:
    """The datapath that is loaded, if one is. Raises OSError where the pins may not be looked at."""
    builds = loader.builds(pin_dir)
    if not builds and (words := pinned.pins_lost(pin_dir)):
        remedy = (
            "run doctor again: an agent that starts needs some seconds, one whose pins were "
            "removed pins them again within a second; if it has not, restart it"
        )
        return finding.failure("datapath", words, remedy), None
    if not builds:
        words = f"none is loaded at {pin_dir}; the agent loads one when it starts"
        return finding.ok("datapath", words), None
    try:
        source = loader.read_source(bpf_dir)
    except loader.LoadError as error:
        remedy = "choose the directory of the sources with --bpf-dir (env HOSTINT_BPF_DIR)"
        return finding.failure("datapath", str(error), remedy), None
    current = pin_dir / source.build
    directory = current if current in builds else builds[-1]
    missing = [
        f"program {n}" for n in loader.programs() if not (directory / "programs" / n).exists()
    ]
    if directory == current:
        maps = sorted(source.maps)
        missing += [f"map {n}" for n in maps if not (directory / "maps" / n).exists()]
    if missing:
        words = f"build {directory.name} is loaded without {', '.join(missing)}"
        return finding.failure("datapath", words, "restart the agent: it loads it anew"), None
    loaded = _opened(directory, same_maps=directory == current)
    return judge(loaded, current, pinned.drop_program_attached(pin_dir)), loaded


def judge(loaded: Loaded, current: Path, drop_program: int | None) -> Finding:
    """Say what a loaded datapath is like; `drop_program` is the kernel id of the one that is attached, None if none is."""
    name = loaded.directory.name
    if drop_program != loaded.programs["drop"]:
        words = f"build {name} is loaded, its drop program is not attached: drops are not reported"
        remedy = "start the agent, or restart it; its log says what keeps it from attaching"
        return finding.failure("datapath", words, remedy)
    if loaded.directory != current:
        words = f"build {name} is loaded, the sources here are build {current.name}"
        remedy = "start or restart the agent of this version: it takes the place of the other"
        return finding.warning("datapath", words, remedy)
    if not loaded.enabled:
        words = f"build {name} is loaded, and looks at no packet"
        return finding.warning("datapath", words, "start the agent, which enables it")
    if loaded.held:
        words = f"build {name} holds its reports back: it has not taken another one's place yet"
        return finding.warning("datapath", words, "start the agent, which completes the upgrade")
    return finding.ok("datapath", f"build {name} is loaded and enabled, drop program attached")


def network_namespace(loaded: Loaded | None) -> Finding:
    """The network namespace is the one that the datapath watches, or the host's if none is loaded."""
    check = "network namespace"
    host = "in Kubernetes the pod needs hostNetwork: true"
    if loaded and loaded.netns_cookie not in (0, kernel.netns_cookie()):
        words = "the datapath that is loaded watches another one than this"
        return finding.warning(check, words, f"run doctor where the agent runs; {host}")
    if _HOST_ONLY.exists():
        return finding.ok(check, "the host's")
    if loaded and loaded.netns_cookie:
        return finding.ok(check, "not the host's, and the one that the loaded datapath watches")
    remedy = f"{host}; nothing is to do where a namespace is the node, as in a lab or in kind"
    return finding.warning(check, "not the host's: only its own interfaces are watched", remedy)


def attachments(given: settings.Settings, loaded: Loaded | None) -> Iterator[Finding]:
    """Yield which interfaces are watched, and what is wrong with each; then what none of them sees.

    Raises OSError.
    """
    network = interfaces.read_network()
    chosen = choice.choose(network, given.patterns)
    if not chosen:
        words = "there is neither a pod's interface nor an uplink"
        remedy = "name those to watch with --include-interfaces (not lo, and none without Ethernet)"
        yield finding.warning("interfaces", words, remedy)
    elif loaded is None:
        yield _would_be_watched(chosen, given.pin_dir)
    else:
        yield from _watched(chosen, loaded)
    addresses = set(given.node_addresses)
    if loaded:
        addresses.add(str(ipaddress.IPv4Address(loaded.node_id)))
    for each in choice.unseen(network, given.patterns, chosen, addresses):
        yield finding.warning(f"uplink {each.name}", each.found, each.remedy)


def _would_be_watched(chosen: Sequence[interfaces.Interface], pin_dir: Path) -> Finding:
    left = [] if _may_hold_builds(pin_dir) else [*_still_run(chosen, pin_dir / "links")]
    if left:
        where = listed([*dict.fromkeys(left)])
        words = f"programs of ours whose maps are pinned nowhere run on {where}"
        remedy = "start the agent, which replaces them, or remove them with hostint-agent unload"
        return finding.warning("interfaces", words, remedy)
    kinds = [f"{interface.name} ({interface.kind})" for interface in chosen]
    return finding.ok("interfaces", f"{len(chosen)} to watch: {listed(kinds)}")


def _may_hold_builds(pin_dir: Path) -> bool:
    """Return False if nothing is pinned. Otherwise the check `datapath` says what is wrong."""
    try:
        return bool(loader.builds(pin_dir))
    except PermissionError:
        return True


def _still_run(chosen: Sequence[interfaces.Interface], links: Path) -> Iterator[str]:
    """Yield the interfaces on which our programs run, by filters or by pinned links."""
    pinned_links = {path.name for path in links.iterdir()} if links.is_dir() else set()
    with netlink.Socket() as route:
        for each in chosen:
            for direction in clsact.DIRECTIONS:
                filters = clsact.filters(route, each.ifindex, direction)
                if f"tcx-{each.ifindex}-{direction}" in pinned_links or any(
                    one.is_ours for one in filters
                ):
                    yield each.name


def _watched(chosen: Sequence[interfaces.Interface], loaded: Loaded) -> Iterator[Finding]:
    with netlink.Socket() as route:
        found = [(each, _interface(route, each, loaded)) for each in chosen]
    right = [interface.name for interface, one in found if one.result == "ok"]
    if right:
        words = f"our programs run first on {len(right)} of {len(chosen)}: {listed(right)}"
        yield finding.ok("interfaces", words)
    yield from (one for _, one in found if one.result != "ok")


def _interface(route: netlink.Socket, interface: interfaces.Interface, loaded: Loaded) -> Finding:
    try:
        hooks = [_hook(route, interface.ifindex, direction) for direction in clsact.DIRECTIONS]
    except OSError as error:
        words = f"cannot be looked at: {error.strerror}"
        remedy = finding.RIGHTS if error.errno == errno.EPERM else "run doctor again"
        return finding.failure(f"interface {interface.name}", words, remedy)
    return order(interface.name, hooks, loaded.programs)


def _hook(route: netlink.Socket, ifindex: int, direction: clsact.Direction) -> Hook:
    running = hook_programs.listed(route, ifindex, direction)
    return Hook(direction, [(each.program, each.name) for each in running])


def order(name: str, hooks: Sequence[Hook], programs: Mapping[str, int]) -> Finding:
    """Say how our programs stand on the hooks of one interface."""
    check = f"interface {name}"
    without = [h.direction for h in hooks if programs[h.direction] not in _ids(h)]
    if without:
        words = f"our program is not attached on {' and '.join(without)}"
        remedy = "start the agent, which attaches within a second; otherwise its log says why not"
        return finding.failure(check, words, remedy)
    twice = [h.direction for h in hooks if _ids(h).count(programs[h.direction]) > 1]
    if twice:
        words = f"our program runs twice on {' and '.join(twice)}: packets are counted twice"
        return finding.failure(check, words, "stop every agent, unload, and start one agent")
    before = [
        f"{h.direction}: {listed([_words(*run) for run in others])}"
        for h in hooks
        if (others := h.runs[: _ids(h).index(programs[h.direction])])
    ]
    if before:
        words = f"others run before our program, on {'; '.join(before)}"
        return finding.warning(
            check,
            words,
            "what they drop or redirect is not seen; a running agent is first again within a second, "
            "and if it is not, have whoever attaches these not insist on being first",
        )
    return finding.ok(check, "our program runs first on ingress and egress")


def _ids(hook: Hook) -> list[int]:
    return [program for program, _ in hook.runs]


def _words(program: int, name: str) -> str:
    return f"{name} (program {program})" if name else f"program {program}"


def listed(names: Sequence[str]) -> str:
    """Return names for people: the first ten, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
