# SPDX-License-Identifier: Apache-2.0
"""Puts together a datapath, recorders around it, a scene, and traffic; the result of a run is a judgement and counters."""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from hostint_agent import attach, bpf_calls, counters, interfaces, loader
from tests.lab import compiled, datapath, truth
from tests.lab.paths import table, traffic, wiring
from tests.lab.topology import Lab

HERE = Path(__file__).parent
CNI_PROGRAMS = (
    "cni_ok",
    "cni_redirect",
    "cni_redirect_neigh",
    "cni_redirect_peer",
    "cni_encapsulate",
    "cni_decapsulate",
)
# every packet is due, even if another CPU has reported a later one of its flow: its latency is another
POLICY = datapath.policy(latency_change_ns=1)
_LAST_WATCHLIST = 250
_IDENTITY_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True)
class Result:
    """One run. `counted` is what the datapath counted of the watched flows meanwhile."""

    judgement: truth.Judgement
    counted: dict[str, int]
    identities: tuple[counters.Identity, ...]


class Bench:
    """Everything compiled and loaded, once."""

    def __init__(self, directory: Path, records_per_cpu: int, bpf_dir: Path | None = None) -> None:
        self.pins = Path(f"/sys/fs/bpf/hostint-paths-{os.getpid()}-{directory.name}")
        self.pins.mkdir()
        self._watchlists = 0
        try:
            # a copy: all stages are to have the same programs, whoever works on them meanwhile
            sources = bpf_dir or loader.default_bpf_dir()
            self.bpf_dir = Path(shutil.copytree(sources, directory / "sources"))
            self.recorder = truth.Recorder(self._folder("truth"), records_per_cpu)
            compiled.bpf(HERE / "cni.c", self._folder("cni"), CNI_PROGRAMS, {})
            self.flood = compiled.native(HERE / "flood.c", directory / "flood")
            self.library = truth.build_library(directory)
        except BaseException:
            self.close()
            raise

    def _folder(self, name: str) -> Path:
        folder = self.pins / name
        folder.mkdir(exist_ok=True)
        return folder

    def two_watchlists(self) -> tuple[int, int]:
        """Numbers of two watchlists that have not been used lately."""
        self._watchlists = self._watchlists % _LAST_WATCHLIST + 2
        return self._watchlists - 1, self._watchlists

    def close(self) -> None:
        """Unpin everything."""
        shutil.rmtree(self.pins)

    @contextlib.contextmanager
    def stage(self, path: table.Path) -> Iterator["Stage"]:
        """A path, built and under observation."""
        with Lab(nodes=path.nodes, pods=3, mode=path.mode) as lab:
            scene = path.build(lab)
            under_test = datapath.Datapath(
                scene.node.namespace, self._folder("datapath"), self.bpf_dir
            )
            stage = Stage(self, path, scene, under_test)
            try:
                stage.attach()
                yield stage
            finally:
                under_test.detach()


class Stage:
    """A path under observation."""

    def __init__(
        self, bench: Bench, path: table.Path, scene: wiring.Scene, under_test: datapath.Datapath
    ) -> None:
        self._bench = bench
        self._path = path
        self._scene = scene
        self._datapath = under_test
        # of its own, for what earlier stages left in slots is theirs
        self._wanted, self._background = bench.two_watchlists()
        self._pending = 0

    def attach(self) -> None:
        """Every new program goes first: a CNI's, the later recorder, ours, the earlier recorder."""
        scene, recorder, ours = self._scene, self._bench.recorder, self._datapath
        ours.attach_drop()
        # programs of a cgroup run in the order in which they were attached
        ours.attach_to_sockets(recorder.program("before_deliver"))
        ours.attach_delivery()
        ours.attach_to_sockets(recorder.program("after_deliver"))
        for cni in scene.cni:
            self._attach_cni(cni)
        for hook in scene.hooks:
            ifindex = hook.ifindex
            before, after = (f"{when}_{hook.program}" for when in ("before", "after"))
            programs = (
                recorder.program(after),
                ours.program(hook.program),
                recorder.program(before),
            )
            for program in programs:
                ours.attach_program(program, ifindex, hook.kind, hook.namespace)
        if scene.accepting:
            self._attach_filters()
        recorder.reset()
        attach.Ports(ours.maps).assign({hook.ifindex for hook in scene.hooks})
        network = scene.node.namespace.inside(interfaces.read_network)
        ours.config.set_tunnels(network.tunnel_ports("vxlan"), network.tunnel_ports("geneve"))
        ours.enable()

    def _attach_cni(self, cni: wiring.CniProgram) -> None:
        folder = self._bench.pins / "cni"
        ways = bpf_calls.Map.open(folder / "cni_ways")
        for key, value in cni.ways:
            ways.update(key, value)
        ways.close()
        program = bpf_calls.obj_get(folder / cni.program)
        hook = wiring.Hook(cni.namespace, cni.interface, cni.program, bpf_calls.TCX_INGRESS)
        self._datapath.attach_program(program, hook.ifindex, hook.kind, hook.namespace)

    def _attach_filters(self) -> None:
        run = self._scene.node.namespace.run
        pinned = str(self._bench.pins / "cni" / "cni_ok")
        for interface in {hook.interface for hook in self._scene.hooks}:
            run("tc", "qdisc", "add", "dev", interface, "clsact")
            run(
                *("tc", "filter", "add", "dev", interface, "ingress"),
                *("bpf", "da", "object-pinned", pinned),
            )

    @contextlib.contextmanager
    def talking(self, version: int) -> Iterator[traffic.Traffic]:
        """Traffic of one IP version."""
        with traffic.Traffic(
            self._scene,
            version,
            self._bench.flood,
            self._bench.pins / "truth",
            self._datapath.maps,
        ) as running:
            # the background's connections are made, and what was reported of that is forgotten
            with truth.Drain(self._datapath.maps, self._bench.library) as drain:
                self._bench.recorder.settle(drain)
            yield running

    def run(
        self,
        running: traffic.Traffic,
        kind: traffic.Kind,
        version: int,
        percent: int,
        target: int,
    ) -> Result:
        """Watch a share of the flows, have `target` packets come in, and judge what was reported of them."""
        wanted = table.selection(self._path, kind, self._scene, version, percent)
        others = [truth.Selection(p, traffic.BACKGROUND_PORTS) for p in (6, 17)]
        rules = wanted.rules(self._wanted)
        rules += [rule for other in others for rule in other.rules(self._background)]
        ours, recorder = self._datapath, self._bench.recorder
        ours.watch(rules, {self._wanted: POLICY, self._background: POLICY})
        with truth.Drain(ours.maps, self._bench.library) as drain:
            with running.server(kind):
                before = self._begin(kind.protocols[version])
                recorder.open_gate()
                try:
                    running.send(kind, target)
                finally:
                    recorder.end(drain)
            # what waited in the server's sockets has been freed
            recorder.settle(drain)
            reports = drain.take(truth.wall_offset_ns(ours.maps)).since(recorder.began_ns)
        identities = self._settled_identities()
        self._pending = identities[0].pending
        return Result(
            truth.Judge(recorder.log(), reports, wanted, others, self._scene.ends()).judge(),
            {name: n - before[name] for name, n in _as_counts(identities[0]).items()},
            identities,
        )

    def _begin(self, protocol: int) -> dict[str, int]:
        """Begin a run; what is counted by then. A packet of the last run that comes in between would count as of this one."""
        while True:
            counted = self._datapath.counters.watchlist(self._wanted)
            self._bench.recorder.begin(protocol)
            if self._datapath.counters.watchlist(self._wanted) == counted:
                return counted | {"pending": self._pending}

    def _identities(self) -> tuple[counters.Identity, counters.Identity]:
        ours, pending = self._datapath.counters, self._datapath.counters.slots().pending
        wanted, background = (
            counters.Identity(ours.watchlist(number), pending.get(number, 0))
            for number in (self._wanted, self._background)
        )
        return wanted, background

    def _settled_identities(self) -> tuple[counters.Identity, counters.Identity]:
        """Of the watched flows and of the background, once they hold: a timer of the kernel may end a packet meanwhile."""
        deadline = time.monotonic() + _IDENTITY_TIMEOUT_S
        while True:
            both = self._identities()
            if not any(i.watched_difference or i.drops_difference for i in both):
                return both
            if time.monotonic() > deadline:
                return both
            time.sleep(0.05)


def _as_counts(identity: counters.Identity) -> dict[str, int]:
    """Counters, and what still waits in a slot as `pending`."""
    return {**identity.counters, "pending": identity.pending}
