# SPDX-License-Identifier: Apache-2.0
"""Beside a CNI: its verdicts stand, its programs stay, the traffic flows, and what it takes from us is back within a second."""

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator

import pytest

from hostint_agent import attach, bpf_calls, bpf_types, clsact, netlink
from tests.lab import cni as cnis
from tests.lab import scene as scenes
from tests.lab import stream, traffic
from tests.lab.namespace import ip
from tests.lab.topology import Node, Pod

pytestmark = pytest.mark.lab
PODS = scenes.watchlist("protocol: UDP, source: {cidrs: [10.244.0.0/16]}")
BACK_WITHIN_S = 1.0
COUNT = 20
METHODS = ("tcx", "clsact")
_PORTS = itertools.count(6000)
_INDEXES = itertools.count(5)


@dataclasses.dataclass
class World:
    """A node with an agent and pods, and what a CNI may do there."""

    scene: scenes.Scene
    method: str

    @property
    def node(self) -> Node:
        return self.scene.nodes[0]

    @property
    def agent(self):
        return self.scene.agents[0]

    @property
    def pods(self) -> list[Pod]:
        return self.node.pods

    def our_program(self, hook: cnis.Hook) -> int:
        """Kernel id of the pinned program."""
        fd = bpf_calls.obj_get(self.agent.maps.parent / "programs" / hook)
        try:
            return bpf_calls.program_id(fd)
        finally:
            os.close(fd)

    def first(self, cni: cnis.Cni, device: str, hook: cnis.Hook) -> int | None:
        """Which program of the kind that we use runs first on a hook."""
        if self.method == "tcx":
            order = cni.order(device, hook)
            return order[0].program if order else None
        found = self.filters(cni.index(device), hook)
        return found[0].program if found and found[0].is_ours else None

    def filters(self, index: int, hook: cnis.Hook) -> list[clsact.Filter]:
        def look() -> list[clsact.Filter]:
            with netlink.Socket() as route:
                return clsact.filters(route, index, hook)

        return self.node.namespace.inside(look)

    def in_place(self, cni: cnis.Cni, *devices: str) -> bool:
        """True if ours are first on both hooks of all these interfaces."""
        return all(
            self.first(cni, device, hook) == self.our_program(hook)
            for device in devices
            for hook in cnis.HOOKS
        )

    def wait_in_place(self, cni: cnis.Cni, *devices: str, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.in_place(cni, *devices):
            assert time.monotonic() < deadline, self.agent.log.read_text()[-2000:]
            time.sleep(0.003)

    def repairs(self) -> int:
        """How often the agent says that it attached something."""
        told = self.agent.log.read_text()
        return told.count('"attached again"') + told.count('"interface attached"')

    def healed_s(self, cni: cnis.Cni, device: str, disturb: Callable[[], object]) -> float:
        """Seconds from a disturbance until ours are first again: other work shares the machine, so the best of three."""
        times: list[float] = []
        while len(times) < 3:
            self.wait_in_place(cni, device)
            before, begin = self.repairs(), time.monotonic()
            disturb()
            self.wait_in_place(cni, device)
            times.append(time.monotonic() - begin)
            deadline = time.monotonic() + 5
            while self.repairs() == before:
                assert time.monotonic() < deadline, "nothing was disturbed"
                time.sleep(0.01)
            if times[-1] <= BACK_WITHIN_S:
                break
        return min(times)

    def links(self, cni: cnis.Cni, device: str) -> list[int]:
        """Ids of our links on an interface; empty with clsact."""
        ours = {self.our_program(hook) for hook in cnis.HOOKS}
        listed = [entry for hook in cnis.HOOKS for entry in cni.order(device, hook)]
        return [entry.link for entry in listed if entry.program in ours]

    def others(self, cni: cnis.Cni, device: str) -> list[object]:
        """Everything on an interface that is not ours, with ids and in order."""
        ours = {self.our_program(hook) for hook in cnis.HOOKS}
        found: list[object] = []
        for hook in cnis.HOOKS:
            found += [entry for entry in cni.order(device, hook) if entry.program not in ours]
            found += [one for one in cni.filters(device, hook) if "hostint" not in str(one)]
        return found

    def arrived(self, source: Pod | None = None, target: Pod | None = None) -> tuple[int, int]:
        """Of COUNT datagrams between two pods, how many arrive; and their source port."""
        source, target = source or self.pods[0], target or self.pods[1]
        port = next(_PORTS)
        with traffic.udp_sink(target.namespace, target.address, port) as sink:
            # the same at both ends: a port that the kernel chose may have been another flow's before
            source_port = traffic.send_udp(
                source.namespace, target.address, port, count=COUNT, source_port=port
            )
            sink.settimeout(0.5)
            arrived = 0
            with contextlib.suppress(TimeoutError):
                while arrived < COUNT:
                    sink.recv(2048)
                    arrived += 1
        return arrived, source_port

    def reported(self, source_port: int, source: Pod | None = None, target: Pod | None = None):
        """The flow's report has both ports: both of our hooks saw it."""
        source, target = source or self.pods[0], target or self.pods[1]
        report = self.scene.wait_reports(self.node, sourcePort=source_port)[0]
        ports = (self.node.port(source.interface), self.node.port(target.interface))
        assert (report["ingressPort"], report["egressPort"]) == ports


def world(mode: str, method: str) -> Iterator[World]:
    with scenes.scene(mode, 1, "--attach", method) as scene:
        scene.watch(PODS)
        made = World(scene, method)
        # neighbours are known before anything is counted
        assert made.arrived()[0] == COUNT
        yield made


@pytest.fixture(scope="module")
def routed(request):
    yield from world("routed", request.param)


@pytest.fixture(scope="module")
def bridged(request):
    yield from world("bridged", request.param)


@pytest.fixture(scope="module")
def tcx():
    yield from world("routed", "tcx")


@pytest.fixture(scope="module")
def legacy():
    yield from world("routed", "clsact")


@contextlib.contextmanager
def a_cni(world: World) -> Iterator[cnis.Cni]:
    """A CNI; when it has gone, ours are alone again."""
    with cnis.Cni(world.node) as cni:
        yield cni
    with cnis.Cni(world.node) as nobody:
        world.wait_in_place(nobody, *(pod.interface for pod in world.pods))


@contextlib.contextmanager
def no_forwarding(world: World) -> Iterator[None]:
    """Only what somebody redirects gets through the node."""
    setting = "net.ipv4.ip_forward={}"
    world.node.namespace.run("sysctl", "-qw", setting.format(0))
    try:
        yield
    finally:
        world.node.namespace.run("sysctl", "-qw", setting.format(1))


def attach_cni(cni: cnis.Cni, place: str, program: int, device: str, hook: cnis.Hook) -> None:
    """Somewhere: `filter`, or `tcx` before or after ours."""
    if place == "filter":
        cni.filter(program, device, hook)
    else:
        cni.tcx(program, device, hook, first=place == "tcx before")


def where_a_cni_may_be(world: str) -> pytest.MarkDecorator:
    """Our method, and a place of the CNI's program; it has TCX only where we have it as well."""
    places = [("tcx", place) for place in ("filter", "tcx before", "tcx after")]
    return pytest.mark.parametrize(
        (world, "place"), [*places, ("clsact", "filter")], indirect=[world], scope="module"
    )


with_either_method = pytest.mark.parametrize("routed", METHODS, indirect=True, scope="module")


# the verdict of the CNI stands


@where_a_cni_may_be("routed")
@pytest.mark.parametrize("hook", cnis.HOOKS)
def test_what_the_cni_drops_stays_dropped(routed, place, hook):
    device = routed.pods[0 if hook == "ingress" else 1].interface
    with a_cni(routed) as cni:
        attach_cni(cni, place, cnis.verdict(cnis.SHOT), device, hook)
        routed.wait_in_place(cni, device)
        assert routed.arrived()[0] == 0
    assert routed.arrived()[0] == COUNT


@where_a_cni_may_be("routed")
@pytest.mark.parametrize("hook", cnis.HOOKS)
def test_what_the_cni_passes_is_passed_and_its_word_is_the_last(routed, place, hook):
    """TC_ACT_OK ends the chain: a filter behind it that drops everything does not run."""
    device = routed.pods[0 if hook == "ingress" else 1].interface
    with a_cni(routed) as cni:
        attach_cni(cni, place, cnis.verdict(cnis.OK), device, hook)
        cni.filter(cnis.verdict(cnis.SHOT), device, hook, pref=9, handle=9)
        routed.wait_in_place(cni, device)
        arrived, port = routed.arrived()
        assert arrived == COUNT
        routed.reported(port)


@where_a_cni_may_be("routed")
def test_where_the_cni_goes_on_its_next_program_runs(routed, place):
    """TC_ACT_PIPE does not end the chain: the filter behind it drops everything."""
    device = routed.pods[0].interface
    with a_cni(routed) as cni:
        attach_cni(cni, place, cnis.verdict(cnis.PIPE), device, "ingress")
        routed.wait_in_place(cni, device)
        arrived, port = routed.arrived()
        assert arrived == COUNT
        routed.reported(port)
        cni.filter(cnis.verdict(cnis.SHOT), device, "ingress", pref=9, handle=9)
        assert routed.arrived()[0] == 0


@where_a_cni_may_be("routed")
def test_what_the_cni_redirects_to_a_neighbour_gets_there_and_is_reported(routed, place):
    client, server = routed.pods
    with a_cni(routed) as cni, no_forwarding(routed):
        assert routed.arrived()[0] == 0
        program = cnis.redirect_neigh(cni.index(server.interface))
        attach_cni(cni, place, program, client.interface, "ingress")
        routed.wait_in_place(cni, client.interface)
        arrived, port = routed.arrived()
        assert arrived == COUNT
        routed.reported(port)


@where_a_cni_may_be("bridged")
def test_what_the_cni_redirects_past_the_bridge_gets_there_and_is_reported(bridged, place):
    client, server = bridged.pods
    host = bridged.node.namespace
    host.run("ip", "link", "set", server.interface, "nomaster")
    try:
        with a_cni(bridged) as cni:
            assert bridged.arrived()[0] == 0
            for one, other in ((client, server), (server, client)):
                program = cnis.redirect(cni.index(other.interface))
                attach_cni(cni, place, program, one.interface, "ingress")
            bridged.wait_in_place(cni, client.interface, server.interface)
            arrived, port = bridged.arrived()
            assert arrived == COUNT
            bridged.reported(port)
    finally:
        host.run("ip", "link", "set", server.interface, "master", "cni0")


# TCX: what happens to filters does not touch us


def replace_filter(cni: cnis.Cni, device: str) -> None:
    cni.filter(cnis.verdict(cnis.OK), device, "ingress", how="replace")


def recreate_qdisc(cni: cnis.Cni, device: str) -> None:
    cni.tc(f"qdisc del dev {device} clsact")
    cni.filter(cnis.verdict(cnis.OK), device, "ingress")


def flush(cni: cnis.Cni, device: str) -> None:
    for hook in cnis.HOOKS:
        cni.tc(f"filter del dev {device} {hook}")


def add_later(cni: cnis.Cni, device: str) -> None:
    cni.filter(cnis.verdict(cnis.OK), device, "ingress", pref=1, handle=2)


WITH_FILTERS = (replace_filter, recreate_qdisc, flush, add_later)


@pytest.mark.parametrize("change", WITH_FILTERS, ids=lambda f: f.__name__)
def test_with_tcx_no_change_to_filters_touches_our_links_nor_we_them(tcx, change):
    device = tcx.pods[0].interface
    with a_cni(tcx) as cni, stream.flowing(*tcx.pods, next(_PORTS)) as flow:
        cni.filter(cnis.verdict(cnis.OK), device, "ingress")
        links = tcx.links(cni, device)
        assert len(links) == 2
        change(cni, device)
        theirs = tcx.others(cni, device)
        time.sleep(1.2)  # two checks, and the look that the message of the change led to
        assert tcx.links(cni, device) == links
        assert tcx.others(cni, device) == theirs
        assert tcx.in_place(cni, device)
        assert flow.lost() == 0


def test_a_cni_that_attaches_to_tcx_after_us_moves_nothing(tcx):
    device = tcx.pods[0].interface
    with a_cni(tcx) as cni:
        links = tcx.links(cni, device)
        for hook in cnis.HOOKS:
            cni.tcx(cnis.verdict(cnis.OK), device, hook, first=False)
        theirs = tcx.others(cni, device)
        assert len(theirs) == 2
        time.sleep(1.2)
        assert tcx.links(cni, device) == links
        assert tcx.others(cni, device) == theirs


# what is taken from us is back


def before_us(verdict: int) -> Callable[[cnis.Cni, World, str], None]:
    def disturb(cni: cnis.Cni, world: World, device: str) -> None:
        for hook in cnis.HOOKS:
            cni.tcx(cnis.verdict(verdict), device, hook, first=True)

    return disturb


def unpin(cni: cnis.Cni, world: World, device: str) -> None:
    for hook in cnis.HOOKS:
        (world.agent.pin_dir / "links" / f"tcx-{cni.index(device)}-{hook}").unlink()


def unpin_everything(cni: cnis.Cni, world: World, device: str) -> None:
    links = world.agent.pin_dir / "links"
    for pin in list(links.iterdir()):
        pin.unlink()
    links.rmdir()


def detach(cni: cnis.Cni, world: World, device: str) -> None:
    for hook in cnis.HOOKS:
        link = bpf_calls.obj_get(world.agent.pin_dir / "links" / f"tcx-{cni.index(device)}-{hook}")
        cnis.detach(link)
        os.close(link)


TO_TCX = {
    "another before us that passes": before_us(cnis.OK),
    "another before us that goes on": before_us(cnis.PIPE),
    "pins removed": unpin,
    "all pins removed, and their directory": unpin_everything,
    "links detached": detach,
}


@pytest.mark.parametrize("disturb", TO_TCX.values(), ids=TO_TCX)
def test_with_tcx_we_are_first_again_within_a_second(tcx, disturb, record_property):
    device = tcx.pods[0].interface
    with a_cni(tcx) as cni, stream.flowing(*tcx.pods, next(_PORTS)) as flow:
        cni.filter(cnis.verdict(cnis.OK), device, "ingress")
        cni.tcx(cnis.verdict(cnis.PIPE), device, "egress", first=False)
        theirs = tcx.others(cni, device)
        took = tcx.healed_s(cni, device, lambda: disturb(cni, tcx, device))
        record_property("healed_s", took)
        assert took <= BACK_WITHIN_S
        assert (tcx.agent.pin_dir / "links" / attach.DROP_TRACEPOINT).exists()
        assert [one for one in theirs if one not in tcx.others(cni, device)] == []
        assert flow.lost() == 0
        arrived, port = tcx.arrived()
        assert arrived == COUNT
        tcx.reported(port)


FILTERS_OF_OURS = {
    "the qdisc deleted and made anew": recreate_qdisc,
    "all filters flushed": flush,
    "a later filter of the same preference": add_later,
}


@pytest.mark.parametrize("change", FILTERS_OF_OURS.values(), ids=FILTERS_OF_OURS)
def test_with_clsact_we_are_first_again_within_a_second(legacy, change, record_property):
    device = legacy.pods[0].interface
    kept: list[object] = []

    def disturb() -> None:
        with contextlib.suppress(RuntimeError):
            legacy.node.namespace.run(
                *f"tc filter del dev {device} ingress pref 1 handle 0x2 bpf".split()
            )
        change(cni, device)
        kept[:] = legacy.others(cni, device)

    with a_cni(legacy) as cni, stream.flowing(*legacy.pods, next(_PORTS)) as flow:
        cni.filter(cnis.verdict(cnis.OK), device, "ingress")
        took = legacy.healed_s(cni, device, disturb)
        record_property("healed_s", took)
        assert took <= BACK_WITHIN_S
        assert legacy.others(cni, device) == kept
        assert flow.lost() == 0
        arrived, port = legacy.arrived()
        assert arrived == COUNT
        legacy.reported(port)


def test_with_clsact_a_filter_that_the_cni_replaces_is_its_own_affair(legacy):
    device = legacy.pods[0].interface
    with a_cni(legacy) as cni, stream.flowing(*legacy.pods, next(_PORTS)) as flow:
        cni.filter(cnis.verdict(cnis.OK), device, "ingress")
        replace_filter(cni, device)
        theirs = legacy.others(cni, device)
        time.sleep(1.2)
        assert legacy.others(cni, device) == theirs
        assert legacy.in_place(cni, device)
        assert flow.lost() == 0


# interfaces come and go


@dataclasses.dataclass
class Extra:
    """One more pod, whose interface the test does things to."""

    world: World
    pod: Pod

    def connect(self, index: int = 0) -> None:
        """Give it an interface, of a certain index if one is given."""
        node, inside, pod = self.world.node.namespace.name, self.pod.namespace.name, self.pod
        numbered = f"index {index}" if index else ""
        ip(
            f"-n {node} link add {pod.interface} {numbered} type veth peer name eth0 netns {inside}",
        )
        self.configure()
        ip(
            f"-n {inside} link set eth0 up",
            f"-n {inside} addr add {pod.address}/32 dev eth0",
            f"-n {inside} route add default via 10.244.1.1 dev eth0 onlink",
        )

    def configure(self) -> None:
        """Have the node's end up, with address and route."""
        node, name = self.world.node.namespace.name, self.pod.interface
        ip(
            f"-n {node} link set {name} up",
            f"-n {node} addr replace 10.244.1.1/32 dev {name}",
            f"-n {node} route replace {self.pod.address}/32 dev {name}",
        )

    def delete(self) -> None:
        """Take both ends away."""
        ip(f"-n {self.world.node.namespace.name} link del {self.pod.interface}")

    def flows(self) -> None:
        """What it sends arrives, and is reported."""
        client = self.world.pods[0]
        arrived, port = self.world.arrived(self.pod, client)
        assert arrived == COUNT
        self.world.reported(port, self.pod, client)


@pytest.fixture
def extra(routed) -> Iterator[Extra]:
    number = next(_INDEXES)
    pod = routed.scene.lab._add_pod(routed.node, number)
    made = Extra(routed, pod)
    with cnis.Cni(routed.node) as cni:
        routed.wait_in_place(cni, pod.interface)
        yield made
    with contextlib.suppress(RuntimeError):
        made.delete()


def healed(extra: Extra, disturb: Callable[[], object]) -> float:
    with cnis.Cni(extra.world.node) as cni:
        took = extra.world.healed_s(cni, extra.pod.interface, disturb)
    extra.flows()
    return took


@with_either_method
def test_a_new_pod_is_attached_within_a_second(routed, record_property):
    times = []
    for _ in range(3):
        pod_number = next(_INDEXES)
        with cnis.Cni(routed.node) as cni:
            pod = routed.scene.lab._add_pod(routed.node, pod_number)
            begin = time.monotonic()
            routed.wait_in_place(cni, pod.interface)
            times.append(time.monotonic() - begin)
        made = Extra(routed, pod)
        made.flows()
        made.delete()
    record_property("attached_s", min(times))
    assert min(times) <= BACK_WITHIN_S


@with_either_method
@pytest.mark.parametrize("same_index", [False, True], ids=["another index", "the same index"])
def test_a_device_that_is_made_anew_is_attached_within_a_second(extra, same_index, record_property):
    index = extra.world.node.port(extra.pod.interface) if same_index else 0

    def disturb() -> None:
        extra.delete()
        extra.connect(index)

    took = healed(extra, disturb)
    record_property("healed_s", took)
    assert took <= BACK_WITHIN_S


@with_either_method
def test_a_device_that_left_the_namespace_and_came_back_is_attached_within_a_second(
    extra, record_property
):
    name = extra.pod.interface
    home, away = extra.world.node.namespace.name, extra.world.scene.lab.collector.name

    def disturb() -> None:
        ip(f"-n {home} link set {name} netns {away}")
        time.sleep(0.3)
        ip(f"-n {away} link set {name} netns {home}")
        extra.configure()

    took = healed(extra, disturb) - 0.3
    record_property("healed_s", took)
    assert took <= BACK_WITHIN_S


@with_either_method
def test_a_device_that_is_renamed_stays_attached_and_is_known_by_its_new_name(extra):
    old, new = extra.pod.interface, f"new{extra.pod.interface}"
    node = extra.world.node.namespace.name
    with cnis.Cni(extra.world.node) as cni:
        links = extra.world.links(cni, old)
        ip(f"-n {node} link set {old} down", f"-n {node} link set {old} name {new}")
        extra.pod.interface = new
        extra.configure()
        deadline = time.monotonic() + 5
        while f'"{new}"' not in extra.world.agent.get("/api/v1/topology"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert extra.world.links(cni, new) == links
        assert extra.world.in_place(cni, new)
    extra.flows()


@with_either_method
def test_a_tunnel_that_is_made_while_the_agent_runs_is_looked_into(extra):
    maps, node = extra.world.agent.maps, extra.world.node.namespace.name

    def ports() -> list[int]:
        opened = bpf_calls.Map.open(maps / "config")
        try:
            return list(bpf_types.Config.from_buffer_copy(opened.lookup(bytes(4))).tunnels.vxlan)
        finally:
            opened.close()

    assert 4444 not in ports()
    ip(f"-n {node} link add vx9 type vxlan id 9 dstport 4444")
    try:
        deadline = time.monotonic() + 5
        while 4444 not in ports():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        ip(f"-n {node} link del vx9")


@with_either_method
def test_a_device_that_goes_down_and_up_stays_attached(extra):
    node, name = extra.world.node.namespace.name, extra.pod.interface
    with cnis.Cni(extra.world.node) as cni:
        links = extra.world.links(cni, name)
        ip(f"-n {node} link set {name} down")
        time.sleep(0.7)
        assert extra.world.links(cni, name) == links
        assert extra.world.in_place(cni, name)
        extra.configure()
        time.sleep(0.7)
        assert extra.world.links(cni, name) == links
    extra.flows()


@with_either_method
def test_what_changed_while_the_process_was_dead_is_attached_when_it_is_back(extra):
    index = extra.world.node.port(extra.pod.interface)
    extra.world.agent.kill()
    extra.delete()
    extra.connect(index)
    extra.world.agent.start()
    with cnis.Cni(extra.world.node) as cni:
        assert extra.world.in_place(cni, extra.pod.interface)
    extra.flows()


@with_either_method
def test_a_device_that_is_gone_leaves_no_pin_and_no_port(extra):
    index = extra.world.node.port(extra.pod.interface)
    extra.delete()
    links = extra.world.agent.pin_dir / "links"
    ports = bpf_calls.Map.open(extra.world.agent.maps / "ports")
    key = index.to_bytes(4, "little")
    deadline = time.monotonic() + 5
    while any(f"-{index}-" in pin.name for pin in links.iterdir()) or key in set(ports.keys()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ports.close()


# from one method to the other


@pytest.mark.parametrize(("before", "after"), [("tcx", "clsact"), ("clsact", "tcx")])
def test_an_agent_that_attaches_otherwise_takes_the_older_attachments_away(before, after):
    """A packet that both saw would be counted twice."""
    with scenes.scene("routed", 1, "--attach", before) as scene:
        scene.watch(PODS)
        made = World(scene, after)
        device = made.pods[0].interface
        scene.agents[0].stop()
        scene.agents[0].options = ("--attach", after)
        scene.agents[0].start()
        with cnis.Cni(made.node) as cni:
            assert made.in_place(cni, device)
            assert bool(cni.order(device, "ingress")) == (after == "tcx")
            assert bool(cni.filters(device, "ingress")) == (after == "clsact")
        scene.watch(PODS)
        was = scene.agents[0].settled().counters["watched"]
        assert made.arrived()[0] == COUNT
        assert scene.agents[0].settled().counters["watched"] - was == COUNT
