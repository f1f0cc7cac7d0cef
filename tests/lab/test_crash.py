# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at any moment, again and again: no packet is lost, the next agent starts and reports, and unload leaves nothing."""

import contextlib
import ctypes
import errno
import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, loader
from hostint_collector.embedded import CollectorThread
from tests.lab import cni as cnis
from tests.lab import mortal, stream
from tests.lab import scene as scenes
from tests.lab.topology import Lab

pytestmark = pytest.mark.lab
PORT = 7000
SEED = 20
VICTIMS = ("agent", "loader")
_MAP_GET_FD_BY_ID, _PROG_GET_FD_BY_ID, _LINK_GET_FD_BY_ID = 14, 13, 30
_MASK32 = (1 << 32) - 1


class Site:
    """A node whose agents die, traffic through it, and what they leave behind."""

    def __init__(
        self,
        lab: Lab,
        nursery: mortal.Nursery,
        flow: stream.Stream,
        directory: Path,
        method: str,
    ) -> None:
        self.lab, self.nursery, self.flow = lab, nursery, flow
        self.node = lab.nodes[0]
        self._directory = directory
        self.pins = Path(f"/sys/fs/bpf/{self.node.namespace.name}")
        self.stash = Path(f"/sys/fs/bpf/{self.node.namespace.name}-kept")
        self.file = directory / "objects.yaml"
        self.method = method
        self.collector = lab.collector.inside(lambda: CollectorThread(lab.collector_address))
        self._versions = 0
        self._maps: dict[str, frozenset[str]] = {}
        self._changes = 0
        self.bpf_dir = self.new_version()
        self.seen: set[tuple[int, int]] = set()
        self.change()

    def new_version(self) -> Path:
        """Other sources of the programs, which do the same: a build of its own, every second time one with maps of its own."""
        self._versions += 1
        directory = self._directory / f"bpf{self._versions}"
        shutil.copytree(loader.default_bpf_dir(), directory)
        with (directory / loader.MAIN_SOURCE).open("a") as source:
            source.write(f"/* version {self._versions} */\n")
            if self._versions % 2 == 0:
                source.write(f"#define OTHER_MAPS {self._versions}\n")
        made = loader.read_source(directory)
        self._maps[made.build] = made.maps
        self.bpf_dir = directory
        return directory

    def keep(self) -> Path:
        """Hold on to the build that is pinned now, so that it can be there again without being compiled."""
        build = self.pins / loader.read_source(self.bpf_dir).build
        copy_pins(build, self.stash / build.name)
        return self.bpf_dir

    def restore(self, bpf_dir: Path) -> None:
        """Have a build that was kept pinned again, and its sources be those that agents are started with."""
        self.bpf_dir = bpf_dir
        build = self.pins / loader.read_source(bpf_dir).build
        if not build.exists():
            copy_pins(self.stash / build.name, build)

    def change(self) -> None:
        """Have the objects say something new; everything is still watched."""
        self._changes += 1
        rules = "\n".join(
            ["protocol: UDP, source: {cidrs: [10.244.0.0/16]}"]
            + [f"source: {{cidrs: [10.99.{self._changes % 250}.{n}/32]}}" for n in range(8)]
        )
        collector = scenes.COLLECTOR.format(
            address=self.lab.collector_address, port=self.collector.port
        )
        fresh = self.file.with_suffix(".new")
        fresh.write_text(collector + scenes.watchlist(rules, "interval: 10ms"))
        os.replace(fresh, self.file)

    def _options(self) -> list[object]:
        return ["--pin-dir", self.pins, "--bpf-dir", self.bpf_dir, "--log-format", "json"]

    def start(self, dies_at: mortal.Step | None = None) -> mortal.Process:
        """Start an agent."""
        more = ["--state-dir", self._directory, "--node", "crash", "--node-id", self.node.address]
        return self.nursery.start(
            *(
                "standalone",
                self.file,
                "--http",
                "none",
                "--keep",
                "--attach",
                self.method,
                *more,
                *self._options(),
            ),
            dies_at=dies_at,
        )

    def unload(self, dies_at: mortal.Step | None = None) -> mortal.Process:
        """Start `hostint-agent unload`."""
        return self.nursery.start("unload", *self._options(), dies_at=dies_at)

    def sound(self) -> mortal.Process:
        """An agent that starts cleanly, is attached everywhere, and reports what happens now."""
        process = self.start()
        assert process.said("rules replaced"), process.log.read_text()
        assert '"error"' not in process.log.read_text(), process.log.read_text()
        build = self.pins / loader.read_source(self.bpf_dir).build
        with cnis.Cni(self.node) as cni:
            for device in self.devices():
                for hook in cnis.HOOKS:
                    assert self.attached(cni, device, hook) == [
                        object_id(build / "programs" / hook)
                    ]
        assert sorted(path.name for path in self.pins.iterdir()) == sorted(["links", build.name])
        self.wait_report()
        self.remember(build)
        return process

    def devices(self) -> list[str]:
        """The interfaces that an agent watches here."""
        return ["eth0", *(pod.interface for pod in self.node.pods)]

    def attached(self, cni: cnis.Cni, device: str, hook: cnis.Hook) -> list[int]:
        """Ids of the programs on a hook: nobody but us is here."""
        if self.method == "tcx":
            return [entry.program for entry in cni.order(device, hook)]
        return [one["options"]["prog"]["id"] for one in cni.filters(device, hook)]

    def assert_builds_whole(self) -> None:
        """Whoever died and when: a build is there with all that it consists of, or not at all."""
        for build in loader.builds(self.pins):
            programs = {pin.name for pin in (build / "programs").iterdir()}
            maps = {pin.name for pin in (build / "maps").iterdir()}
            assert (programs, maps) == (set(loader.PROGRAMS), self._maps[build.name])

    def wait_report(self, timeout_s: float = 20.0) -> None:
        """Wait for a report of a packet that came after this moment."""
        now, deadline = time.time_ns(), time.monotonic() + timeout_s
        while True:
            for record in self.collector.records("flow"):
                age = (now - record["ingressTimestamp"]) & _MASK32
                if record["inner"]["sourcePort"] == self.flow.source_port and age >> 31:
                    self.collector.clear()
                    return
            assert time.monotonic() < deadline, self.collector.records()[-3:]
            time.sleep(0.01)

    def remember(self, build: Path) -> None:
        """Kernel ids of everything that is pinned now."""
        for kind, command in (("maps", _MAP_GET_FD_BY_ID), ("programs", _PROG_GET_FD_BY_ID)):
            self.seen |= {(command, object_id(pin)) for pin in (build / kind).iterdir()}
        links = {(_LINK_GET_FD_BY_ID, object_id(pin)) for pin in (self.pins / "links").iterdir()}
        self.seen |= links

    def assert_nothing_left(self) -> None:
        """No pin, no link, no filter."""
        assert not self.pins.exists()
        with cnis.Cni(self.node) as cni:
            for device in self.devices():
                for hook in cnis.HOOKS:
                    assert cni.order(device, hook) == []
                    assert cni.filters(device, hook) == []

    def assert_nothing_lives(self, timeout_s: float = 10.0) -> None:
        """None of the programs, maps and links that were ever pinned is still in the kernel."""
        shutil.rmtree(self.stash, ignore_errors=True)
        assert len(self.seen) > 30
        deadline = time.monotonic() + timeout_s
        while left := [one for one in self.seen if lives(*one)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def copy_pins(build: Path, to: Path) -> None:
    """Pin everything of a build at another place as well."""
    for kind in ("maps", "programs"):
        (to / kind).mkdir(parents=True)
        for pin in (build / kind).iterdir():
            fd = bpf_calls.obj_get(pin)
            bpf_calls.obj_pin(fd, to / kind / pin.name)
            os.close(fd)


def _info(pin: Path) -> bytes:
    fd = bpf_calls.obj_get(pin)
    try:
        buffer = ctypes.create_string_buffer(80)
        attr = struct.pack("=IIQ", fd, len(buffer), ctypes.addressof(buffer))
        bpf_calls.bpf(bpf_calls.OBJ_GET_INFO_BY_FD, attr, "object info")
        return buffer.raw
    finally:
        os.close(fd)


def object_id(pin: Path) -> int:
    """Kernel id of a pinned program or map, or link: the second word of what describes any of them."""
    return struct.unpack_from("=II", _info(pin))[1]


def lives(command: int, number: int) -> bool:
    """True if the kernel has an object of this id."""
    try:
        os.close(bpf_calls.bpf(command, struct.pack("=I", number), "object by id"))
    except OSError as error:
        return error.errno != errno.ENOENT
    return True


@pytest.fixture
def site(request, tmp_path) -> Iterator[Site]:
    method = getattr(request, "param", "tcx")
    with Lab(nodes=1) as lab:
        node = lab.nodes[0]
        if method == "clsact":
            # as a CNI would have it; while the kernel adds the qdisc, the device drops what it is to send
            for device in ("eth0", *(pod.interface for pod in node.pods)):
                node.namespace.run("tc", "qdisc", "add", "dev", device, "clsact")
        with (
            mortal.Nursery(node.namespace, tmp_path) as nursery,
            stream.flowing(*node.pods, PORT) as flow,
        ):
            made = Site(lab, nursery, flow, tmp_path, method)
            try:
                yield made
            finally:
                made.collector.stop()
                made.unload().wait()
                shutil.rmtree(made.stash, ignore_errors=True)


def some(steps: Sequence[mortal.Step], count: int, pick: random.Random) -> list[mortal.Step]:
    """Steps of all names, as evenly as it goes: most of what a start does is one and the same command."""
    by_name: dict[str, list[mortal.Step]] = {}
    for step in steps:
        by_name.setdefault(step.name, []).append(step)
    names = sorted(by_name)
    pick.shuffle(names)
    return [pick.choice(by_name[names[i % len(names)]]) for i in range(count)]


def kill_at(site: Site, step: mortal.Step) -> None:
    """Start an agent that dies at this step; if it does not come to it, a little later."""
    process = site.start(dies_at=step)
    if process.said("rules replaced"):
        process.kill()
    process.wait()


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(OSError):
        found = [int(child) for child in text.read_text().split()]
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
        return sorted(set(found))
    return []


def wait_for_pins(site: Site, process: mortal.Process, count: int) -> list[int]:
    """Wait until a loader has pinned so many objects; which process that is."""
    partial = site.pins / (loader.read_source(site.bpf_dir).build + "-partial")
    loaders: list[int] = []
    deadline = time.monotonic() + 60
    while process.alive and time.monotonic() < deadline:
        loaders = children(process.pid) or loaders
        with contextlib.suppress(OSError):
            pins = [pin for kind in partial.iterdir() for pin in kind.iterdir()]
            if len(pins) >= count and loaders:
                break
        if (site.pins / loader.read_source(site.bpf_dir).build).exists():
            break
        time.sleep(0.0005)
    return loaders


def kill_while_loading(site: Site, pick: random.Random, whom: str) -> None:
    """Kill the agent or its loader when some of the new programs and maps are pinned, or just before that."""
    site.new_version()
    process = site.start()
    loaders = wait_for_pins(site, process, pick.choice((0, 1, 5, 20, 34)))
    if whom == "agent":
        kill_with_a_stopped_loader(site, process, loaders)
        return
    for pid in loaders:
        send(pid, signal.SIGKILL)
    if process.said("rules replaced"):
        process.kill()
    process.wait()


def kill_with_a_stopped_loader(site: Site, process: mortal.Process, loaders: list[int]) -> None:
    """Its loader ends with the agent, even one that does nothing by itself any more; until then it shares the lock."""
    for pid in loaders:
        send(pid, signal.SIGSTOP)
        with contextlib.suppress(FileNotFoundError):
            assert site.pins in {fd.readlink() for fd in Path(f"/proc/{pid}/fd").iterdir()}
    process.kill()
    deadline = time.monotonic() + 10
    while left := [pid for pid in loaders if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            for pid in left:
                send(pid, signal.SIGKILL)
            raise AssertionError("the loader outlives its agent")
        time.sleep(0.005)


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_while_changing(site: Site, step: mortal.Step) -> None:
    """An agent that is given another configuration, and dies at this step of that."""
    process = site.start(dies_at=step)
    if process.said("rules replaced"):
        site.change()
        process.said("rules replaced", 2)
        process.kill()
    process.wait()


def remove_links(site: Site) -> None:
    """Have the next agent attach everything."""
    for pin in list((site.pins / "links").iterdir()):
        pin.unlink()


def steps_of_a_start(site: Site) -> tuple[list[mortal.Step], list[mortal.Step]]:
    """What an agent does when it must attach everything, and what it does when it is then given another configuration."""
    remove_links(site)
    model = site.sound()
    attaching = model.steps()
    site.change()
    assert model.said("rules replaced", 2)
    time.sleep(0.2)
    changing = model.steps()[len(attaching) :]
    model.kill()
    return attaching, changing


def steps_of_an_upgrade(site: Site) -> list[mortal.Step]:
    """What an agent does when the programs that are attached are not the ones it was made with, once these are loaded."""
    site.new_version()
    model = site.sound()
    upgrading = model.steps()
    model.kill()
    loaded = [step.name for step in upgrading].index("subprocess.Popen")
    return upgrading[loaded + 1 :]


def upgrade(site: Site, step: mortal.Step, versions: Sequence[Path]) -> None:
    """From one build to the other, whichever is attached now."""
    other = next(version for version in versions if version != site.bpf_dir)
    site.restore(other)
    kill_at(site, step)


def fifty_kills(site: Site, pick: random.Random) -> Iterable[tuple[str, Callable[[], object]]]:
    """Names and deeds, in an order that `pick` chooses."""
    site.sound().kill()
    versions = [site.keep()]
    attaching, changing = steps_of_a_start(site)
    upgrading = steps_of_an_upgrade(site)
    versions.append(site.keep())
    kills: list[tuple[str, Callable[[], object]]] = []
    kills += [(f"load, {w}", lambda w=w: kill_while_loading(site, pick, w)) for w in VICTIMS * 3]
    kills += [
        (f"upgrade, {s}", lambda s=s: upgrade(site, s, versions)) for s in some(upgrading, 12, pick)
    ]
    kills += [
        (f"attach, {s}", lambda s=s: (remove_links(site), kill_at(site, s)))
        for s in some(attaching, 13, pick)
    ]
    kills += [
        (f"change, {s}", lambda s=s: kill_while_changing(site, s)) for s in some(changing, 13, pick)
    ]
    kills += [("any time", lambda: None)] * 6
    pick.shuffle(kills)
    return kills


def test_fifty_kills_lose_no_packet_and_every_next_agent_reports(site, record_property):
    pick = random.Random(SEED)
    begun = time.monotonic()
    count = 0
    for name, kill in fifty_kills(site, pick):
        print(f"{time.monotonic() - begun:5.1f} s {name}", flush=True)
        kill()
        site.assert_builds_whole()
        process = site.sound()
        time.sleep(pick.uniform(0, 0.1))
        process.kill()
        count += 1
    assert count == 50
    assert site.flow.lost() == 0
    site.unload().wait()
    site.assert_nothing_left()
    site.assert_nothing_lives()
    assert site.flow.lost() == 0
    assert site.flow.duplicates == 0
    record_property("seconds", time.monotonic() - begun)
    record_property("packets", site.flow.sent)


@pytest.mark.parametrize("site", ["tcx", "clsact"], indirect=True)
def test_an_unload_that_was_killed_can_be_done_again_or_started_over(site):
    pick = random.Random(SEED)
    site.sound().kill()
    version = site.keep()
    model = site.unload()
    model.wait()
    site.assert_nothing_left()
    steps = [step for step in model.steps() if step.name != "bpf object info"]
    assert {"os.rename", "os.rmdir", "os.remove"} <= {step.name for step in steps}
    assert ("netlink request" in {step.name for step in steps}) == (site.method == "clsact")
    for number, step in enumerate(some(steps, 10, pick)):
        site.restore(version)
        site.sound().kill()
        killed = site.unload(dies_at=step)
        killed.wait()
        assert site.pins.exists(), step
        site.assert_builds_whole()
        if number % 2:
            site.restore(version)
            site.sound().kill()
        site.unload().wait()
        site.assert_nothing_left()
    site.assert_nothing_lives()
    assert site.flow.lost() == 0


def test_an_agent_says_why_its_loader_ended(site):
    process = site.start()
    for pid in wait_for_pins(site, process, 1):
        send(pid, signal.SIGKILL)
    process.wait()
    assert "the loader ended with status -9" in process.log.read_text()
    site.sound().kill()
