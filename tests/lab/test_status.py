# SPDX-License-Identifier: Apache-2.0
"""`hostint-agent status` on a node with traffic says what is: every number of it against another way to know it."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hostint_agent import bpf_calls, counters, kernel, loader
from hostint_agent.status import look as status
from hostint_agent.status import text as status_text
from tests.lab import cni as cnis
from tests.lab import scene as scenes
from tests.lab import traffic
from tests.lab.agent import LabAgent
from tests.lab.scene import Scene

pytestmark = pytest.mark.lab
UDP = "protocol: UDP, source: {cidrs: [10.244.0.0/16]}"
# every packet is news
ALWAYS = "interval: 10ms, latencyChange: 1ns, events: [Flow, Drop]"
WAIT_S = 20.0
# a new watchlist begins to count at zero
NAMES = (f"pods-{i}" for i in itertools.count())
COUNT = 300
ENABLE_STATS = 32  # BPF_ENABLE_STATS of bpf(2)
COMMAND = [sys.executable, "-m", "hostint_agent", "status"]
# what the agent's container has
CONTAINER = ["setpriv", "--bounding-set=-all,+bpf,+net_admin,+perfmon", "--inh-caps=-all"]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with scenes.scene("routed", 1) as built:
        yield built


@pytest.fixture
def agent(scene: Scene) -> Iterator[LabAgent]:
    """The agent of the node; it runs again afterwards."""
    yield scene.agents[0]
    with contextlib.suppress(ProcessLookupError):
        os.kill(scene.agents[0].pid, 0)
        return
    scene.agents[0].start()


def arguments(agent: LabAgent, *more: str) -> list[str]:
    where = ["--pin-dir", str(agent.pin_dir), "--state-dir", str(agent.file.parent)]
    return [*where, "--node", agent.node.namespace.name, *more]


def run(
    agent: LabAgent, *more: str, before: list[str] | None = None
) -> subprocess.CompletedProcess:
    """The command in the node; `before` is what it is run by."""
    whole = [*(before or []), *COMMAND, *arguments(agent, *more)]
    return subprocess.run(
        agent.node.namespace.command(*whole),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "NO_COLOR"},
    )


def look(agent: LabAgent, interval_s: float = 0.0, bpf_dir: Path | None = None) -> status.Status:
    """What the command would print."""
    bpf_dir = bpf_dir or loader.default_bpf_dir()
    where = status.Where(agent.pin_dir, bpf_dir, agent.file.parent, agent.node.namespace.name)
    return agent.node.namespace.inside(lambda: status.gather(where, interval_s))


def eventually(
    agent: LabAgent, good: Callable[[status.Status], bool], **more: Any
) -> status.Status:
    """The first look that is good."""
    deadline = time.monotonic() + WAIT_S
    while not good(found := look(agent, **more)):
        assert time.monotonic() < deadline, status_text.render(found, colours=False)
    return found


def send(scene: Scene, count: int = COUNT, port: int = 4000) -> None:
    """Numbered datagrams from pod to pod, which are taken."""
    client, server = scene.nodes[0].pods
    with traffic.udp_sink(server.namespace, server.address, port):
        traffic.send_udp(client.namespace, server.address, port, count=count)


@dataclasses.dataclass
class Steady:
    """How much a sender has really sent."""

    sent: int = 0
    began_s: float = 0.0

    def real(self) -> float:
        return self.sent / (time.monotonic() - self.began_s)


@contextlib.contextmanager
def steady(scene: Scene, address: str, per_second: float) -> Iterator[Steady]:
    """Datagrams to port 4000, so many a second, all the time."""
    told, ending = Steady(), threading.Event()
    sender = scene.nodes[0].pods[0].namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def work() -> None:
        told.began_s = time.monotonic()
        while not ending.is_set():
            due = (time.monotonic() - told.began_s) * per_second
            while told.sent < due:
                sender.sendto(traffic.payload(told.sent), (address, 4000))
                told.sent += 1
            time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield told
    finally:
        ending.set()
        thread.join()
        sender.close()


@contextlib.contextmanager
def blackhole(scene: Scene, network: str = "10.66.0.0/16") -> Iterator[str]:
    """A network whose packets the node drops; an address in it."""
    host = scene.nodes[0].namespace
    host.run("ip", "route", "add", "blackhole", network)
    try:
        yield network.replace("0.0/16", "0.1")
    finally:
        host.run("ip", "route", "del", network)


# what is live, and what was counted


def test_rules_watchlists_and_their_counters_are_those_of_the_datapath(scene, agent):
    name = next(NAMES)
    scene.watch(
        scenes.watchlist(f"{UDP}\nprotocol: TCP, bidirectional: true", "interval: 1s", name=name),
        scenes.watchlist("protocol: SCTP", name="other"),
    )
    before = look(agent)
    send(scene)
    agent.settled(name)
    scene.quiet()
    found = look(agent)
    by_name = {each.name: each for each in found.watchlists}
    assert list(by_name) == ["other", name]
    assert [by_name[name].rules for name in by_name] == [1, 3]
    assert (found.rules, found.own_rules) == (4, 1)
    assert found.generation == before.generation == live_generation(agent)
    identity = agent.identity(name)
    assert by_name[name].counters == identity.counters
    assert by_name[name].pending == identity.pending == 0
    grown = identity.counters["watched"] - before.watchlists[1].counters["watched"]
    assert grown == COUNT
    assert by_name["other"].counters == dict.fromkeys(counters.WATCHLIST_FIELDS, 0)
    assert all(each.live and each.collector == "default" for each in found.watchlists)
    assert found.node_id == scene.nodes[0].node_id
    assert found.losses == ()


def live_generation(agent: LabAgent) -> int:
    opened = bpf_calls.Map.open(agent.maps / "classifier_generation")
    return int.from_bytes(opened.lookup(bytes(4)), sys.byteorder)


def test_programs_are_those_that_are_pinned_and_attached(scene, agent):
    found = look(agent)
    assert found.build == found.sources_build == agent.maps.parent.name
    assert list(found.programs) == list(loader.PROGRAMS)
    for name, program in found.programs.items():
        known = told_by_bpftool(agent, name)
        assert program.id == known["id"]
        assert program.verified_instructions > 1000
        assert abs(time.time() - found.loaded_s - known["loaded_at"]) < 60


def told_by_bpftool(agent: LabAgent, program: str) -> dict[str, Any]:
    """The same by another reader."""
    pin = agent.maps.parent / "programs" / program
    command = ["bpftool", "--json", "prog", "show", "pinned", str(pin)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def test_runs_and_their_time_are_told_while_the_kernel_counts_them(scene, agent):
    before = look(agent).programs["ingress"]
    # the kernel counts as long as this is open
    counting = bpf_calls.bpf(ENABLE_STATS, struct.pack("=I", 0), "count runs")
    try:
        send(scene, 50)
    finally:
        os.close(counting)
    after, known = look(agent).programs["ingress"], told_by_bpftool(agent, "ingress")
    assert after.runs >= before.runs + 50
    # somebody else on this machine may have them counted as well
    later = look(agent).programs["ingress"]
    assert after.runs <= known["run_cnt"] <= later.runs
    assert after.run_time_ns <= known["run_time_ns"] <= later.run_time_ns
    shown = run(agent, "--interval", "0").stdout
    assert re.search(r"^ingress +\d+ +[\d,]+ +0 +[\d,]+ +[\d,]+ ns$", shown, re.MULTILINE)


def test_the_build_that_is_attached_is_told_whatever_else_is_pinned(scene, agent, tmp_path):
    shutil.copytree(loader.default_bpf_dir(), tmp_path / "bpf")
    with (tmp_path / "bpf" / "parse.h").open("a") as source:
        source.write("/* of another version */\n")
    other = loader.current(agent.pin_dir, tmp_path / "bpf")
    (other / "programs").mkdir(parents=True)
    try:
        found = look(agent, bpf_dir=tmp_path / "bpf")
    finally:
        (other / "programs").rmdir()
        other.rmdir()
    assert (found.build, found.sources_build) == (agent.maps.parent.name, other.name)


def test_flows_and_slots_are_as_many_as_there_were_flows_and_packets(scene, agent):
    name = next(NAMES)
    scene.watch(scenes.watchlist(UDP, "interval: 1s", name=name))
    client, server = scene.nodes[0].pods
    before = look(agent)
    with traffic.udp_sink(server.namespace, server.address, 4500):
        # so many that some share a set of the table; one port after the other, none would
        for port in random.Random(1).sample(range(20000, 60000), 600):
            traffic.send_udp(client.namespace, server.address, 4500, source_port=port)
    agent.settled(name)
    found = look(agent)
    assert found.flows - before.flows == 600
    assert found.flow_places == 65536
    assert sum(found.slots.values()) == 65536
    assert found.slots["pending"] == found.slots["taken"] == 0
    assert 1 <= found.slots["egressed"] <= before.slots["egressed"] + 600


def test_a_packet_that_waits_for_its_outcome_is_told(scene, agent):
    """It waits for the address of a neighbour that is not there."""
    name = next(NAMES)
    scene.watch(scenes.watchlist(UDP, name=name))
    client, server = scene.nodes[0].pods
    host, nobody = scene.nodes[0].namespace, "10.244.1.99"
    host.run("sysctl", "-qw", f"net.ipv4.neigh.{server.interface}.mcast_solicit=100")
    host.run("ip", "route", "add", f"{nobody}/32", "dev", server.interface)
    try:
        traffic.send_udp(client.namespace, nobody, 4999, count=3)
        found = eventually(agent, lambda told: told.watchlists[0].pending == 3)
        assert found.slots["pending"] == 3
        assert f"{name}: also 3 waiting for an outcome\n" in run(agent, "--interval", "0").stdout
    finally:
        host.run("ip", "neigh", "flush", "dev", server.interface)
        host.run("ip", "route", "del", f"{nobody}/32", "dev", server.interface)


def test_rates_are_those_of_the_traffic(scene, agent):
    """Half of the packets arrive, half die; each is reported. What the sender really sent is measured meanwhile."""
    name = next(NAMES)
    scene.watch(scenes.watchlist(UDP, ALWAYS, name=name))
    client, server = scene.nodes[0].pods
    with (
        blackhole(scene) as nowhere,
        traffic.udp_sink(server.namespace, server.address, 4000),
        steady(scene, server.address, 400) as arriving,
        steady(scene, nowhere, 200) as dying,
    ):

        def right(told: status.Status) -> bool:
            rates, real = told.rates, (arriving.real(), dying.real())
            return (
                rates is not None
                and rates.watched == pytest.approx(sum(real), rel=0.2)
                and rates.drops == pytest.approx(real[1], rel=0.2)
                and rates.sent == pytest.approx(rates.reports, rel=0.2)
                and 0.5 * real[0] < rates.reports
            )

        found = eventually(agent, right, interval_s=1.0)
    assert found.rates.seconds >= 1.0
    calm = eventually(agent, lambda told: told.rates.watched == 0, interval_s=0.2)
    assert calm.rates.reports == calm.rates.drops == 0
    assert look(agent).rates is None


def test_drops_are_told_by_the_kernels_reason(scene, agent):
    name = next(NAMES)
    scene.watch(scenes.watchlist(UDP, name=name))
    client, _ = scene.nodes[0].pods
    before = look(agent).drops
    with blackhole(scene) as nowhere:
        traffic.send_udp(client.namespace, nowhere, 4000, count=20)
    found = eventually(agent, lambda told: told.watchlists[0].counters["dropped"] == 20)
    grown = {r: n - before.get(r, 0) for r, n in found.drops.items() if n != before.get(r, 0)}
    assert sum(grown.values()) == 20
    (reason,) = grown
    assert f" {reason}" in run(agent, "--interval", "0").stdout


# who is attached


def test_a_program_of_others_is_told_after_ours_and_before_ours(scene, agent):
    """Before ours only while no agent runs that puts ours first again."""
    with cnis.Cni(scene.nodes[0]) as cni:
        cni.tcx(cnis.verdict(-1), "eth0", "ingress", first=False)
        cni.filter(cnis.verdict(-1), "eth0", "ingress", pref=9)
        last = cni.order("eth0", "ingress")[-1].program
        ingress, egress = hooks(look(agent), "eth0")
        assert (ingress.method, ingress.place, ingress.before) == ("tcx", 1, ())
        assert ingress.after[0] == f"cni [{last}]"
        assert ingress.after[1].endswith("[tc pref 9]")
        assert (egress.place, egress.before, egress.after) == (1, (), ())
        agent.kill()
        cni.tcx(cnis.verdict(-1), "eth0", "ingress", first=True)
        first = cni.order("eth0", "ingress")[0].program
        ingress, _ = hooks(look(agent), "eth0")
        assert (ingress.place, ingress.before) == (2, (f"cni [{first}]",))
        shown = run(agent, "--interval", "0").stdout
        assert f"ingress  tcx     2 of 4  cni [{first}] > hostint > cni [{last}] > " in shown
        agent.start()
        eventually(agent, lambda told: hooks(told, "eth0")[0].place == 1)


def hooks(told: status.Status, name: str):
    return next(each.hooks for each in told.interfaces if each.name == name)


def test_every_watched_interface_is_told_with_its_port_and_one_without_our_program_as_well(
    scene, agent
):
    node = scene.nodes[0]
    found = look(agent)
    assert {each.name: each.port for each in found.interfaces} == {
        name: node.port(name) for name in ("eth0", "pod0", "pod1")
    }
    agent.kill()
    for name, direction in (("pod0", "egress"), ("pod1", "ingress"), ("pod1", "egress")):
        (agent.pin_dir / "links" / f"tcx-{node.port(name)}-{direction}").unlink()
    ingress, egress = hooks(look(agent), "pod0")
    assert (ingress.method, ingress.place) == ("tcx", 1)
    assert (egress.method, egress.place) == (None, 0)
    assert [hook.method for hook in hooks(look(agent), "pod1")] == [None, None]
    assert re.search(r"egress +not attached\n", run(agent, "--interval", "0").stdout)


def test_filters_of_clsact_are_told_in_their_order_and_what_is_in_tcx_before_them():
    with scenes.scene("routed", 1, "--attach", "clsact") as built, cnis.Cni(built.nodes[0]) as cni:
        agent = built.agents[0]
        cni.filter(cnis.verdict(-1), "eth0", "ingress", pref=8)
        ingress, egress = hooks(look(agent), "eth0")
        assert (ingress.method, ingress.place, egress.place) == ("clsact", 1, 1)
        assert [each.endswith("[tc pref 8]") for each in ingress.after] == [True]
        cni.tcx(cnis.verdict(-1), "eth0", "ingress", first=True)
        first = cni.order("eth0", "ingress")[0].program
        ingress, _ = hooks(look(agent), "eth0")
        assert (ingress.place, ingress.before) == (2, (f"cni [{first}]",))


def test_from_another_network_namespace_it_says_that_it_cannot_see_the_interfaces(scene, agent):
    whole = [*COMMAND, *arguments(agent, "--interval", "0")]
    ended = subprocess.run(whole, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0
    assert "ATTACHED    not to be seen from here" in ended.stdout
    assert not look_outside(agent).interfaces


def look_outside(agent: LabAgent) -> status.Status:
    where = status.Where(agent.pin_dir, loader.default_bpf_dir(), agent.file.parent, "nobody")
    return status.gather(where, 0)


# with and without an agent


def test_it_says_whether_an_agent_runs_and_keeps_none_from_starting(scene, agent):
    assert (look(agent).agent_running, look(agent).agent_pid) == (True, agent.pid)
    assert f"AGENT       running, pid {agent.pid}\n" in run(agent, "--interval", "0").stdout
    agent.kill()
    found = look(agent)
    assert (found.agent_running, found.agent_pid) == (False, None)
    assert "AGENT       not running: " in run(agent, "--interval", "0").stdout
    with watching(agent, "--interval", "0.01", "--json"):
        agent.start()
    assert look(agent).agent_pid == agent.pid


def test_names_are_those_of_the_last_good_configuration_and_places_without_one(scene, agent):
    name = next(NAMES)
    scene.watch(scenes.watchlist(UDP, name=name))
    assert [each.name for each in look(agent).watchlists] == [name]
    strange = look_outside(agent)
    assert strange.configuration is None
    (only,) = strange.watchlists
    assert re.fullmatch(r"#\d+", only.name)
    assert only.counters == look(agent).watchlists[0].counters
    assert [each.address for each in strange.collectors] == [None]


def test_a_ring_fills_while_no_agent_runs_and_what_found_no_room_is_told(scene, agent):
    name = next(NAMES)
    scene.watch(scenes.watchlist(UDP, ALWAYS, name=name))
    assert not any(ring.waiting for ring in look(agent).rings)
    agent.kill()
    send(scene, 100)
    found = eventually(agent, lambda told: sum(ring.waiting for ring in told.rings) > 0)
    written = found.watchlists[0].counters["reported"]
    assert written == sum(ring.waiting for ring in found.rings)
    assert {ring.kind for ring in found.rings if ring.waiting} == {"flow"}

    def full(told: status.Status) -> bool:
        send(scene, 8000)
        return any(loss.name == "ring_full" for loss in told.losses)

    eventually(agent, full)
    agent.settled(name)
    found = look(agent)
    assert max(ring.waiting for ring in found.rings) == found.rings[0].size
    (loss,) = [each for each in found.losses if each.name == "ring_full"]
    count = agent.identity(name).counters["ring_full"]
    assert (loss.count, dict(loss.where)) == (count, {name: count})
    shown = run(agent, "--interval", "0").stdout
    assert f"{found.rings[0].size:,} of {found.rings[0].size:,} (100 %) on CPU" in shown
    assert re.search(rf"^ring_full +{count:,} +{name}$", shown, re.MULTILINE)
    assert "Reports found the ring of their CPU full" in shown
    agent.start()
    found = eventually(agent, lambda told: not any(ring.waiting for ring in told.rings))
    assert [each.count for each in found.losses if each.name == "ring_full"] == [count]


# what is lost


def test_reports_beyond_the_rate_limit_are_told(scene, agent):
    name = next(NAMES)
    limited = scene.objects(scenes.watchlist(UDP, ALWAYS, name=name))
    agent.change(
        limited.replace("spec: {address", "spec: {rateLimit: {reportsPerSecond: 10}, address")
    )
    send(scene, 500)
    agent.settled(name)
    found = look(agent)
    (loss,) = [each for each in found.losses if each.name == "rate_limited"]
    count = agent.identity(name).counters["rate_limited"]
    assert count > 0
    assert dict(loss.where) == {name: count}
    assert found.collectors[0].reports_per_second == 10
    shown = run(agent, "--interval", "0").stdout
    assert re.search(rf"^rate_limited +{count:,} +{name}$", shown, re.MULTILINE)
    assert "raise its reportsPerSecond" in shown


def test_a_loss_that_goes_on_is_told_from_one_that_is_over(scene, agent):
    name = next(NAMES)
    limited = scene.objects(scenes.watchlist(UDP, ALWAYS, name=name))
    agent.change(
        limited.replace("spec: {address", "spec: {rateLimit: {reportsPerSecond: 10}, address")
    )
    address = scene.nodes[0].pods[1].address

    def going_on(told: status.Status) -> bool:
        return any(each.name == "rate_limited" and each.per_second > 0 for each in told.losses)

    with steady(scene, address, 500):
        eventually(agent, going_on, interval_s=0.5)
    over = eventually(agent, lambda told: not going_on(told), interval_s=0.5)
    assert any(each.name == "rate_limited" and each.count > 0 for each in over.losses)


def test_reports_that_cannot_be_sent_are_told_with_their_collector(scene, agent):
    name = next(NAMES)
    objects = scene.objects(scenes.watchlist(UDP, ALWAYS, name=name))
    nowhere = objects.replace(scene.lab.collector_address, "198.51.100.1").replace(
        "metadata: {name: default}", "metadata: {name: nowhere}"
    )
    agent.change(nowhere.replace("report: {", "collectorRef: {name: nowhere}\n  report: {"))
    send(scene)

    def lost(told: status.Status) -> bool:
        return any(each.name == "reports_failed" for each in told.losses)

    eventually(agent, lost)
    agent.settled(name)
    found = eventually(agent, lambda told: not any(ring.waiting for ring in told.rings))
    (only,) = found.collectors
    assert (only.name, only.address, only.sent) == ("nowhere", "198.51.100.1", 0)
    (loss,) = [each for each in found.losses if each.name == "reports_failed"]
    assert dict(loss.where) == {"nowhere": only.failed}
    assert only.failed == found.watchlists[0].counters["reported"]
    shown = run(agent, "--interval", "0").stdout
    assert re.search(rf"^reports_failed +{only.failed:,} +nowhere$", shown, re.MULTILINE)
    scene.watch(scenes.watchlist(UDP, name=name))
    former = [each for each in look(agent).collectors if not each.live]
    assert [each.failed for each in former] == [only.failed]


# how it is told


def test_json_tells_what_the_text_tells(scene, agent):
    name = next(NAMES)
    scene.watch(scenes.watchlist(UDP, "interval: 1h", name=name))
    send(scene)
    agent.settled(name)
    scene.quiet()
    with frozen(agent):
        told = restored(status.Status, json.loads(run(agent, "--json", "--interval", "0").stdout))
        text = run(agent, "--interval", "0").stdout
        assert told == dataclasses.replace(look(agent), loaded_s=told.loaded_s)
    assert without_age(status_text.render(told, colours=False) + "\n") == without_age(text)
    assert told.watchlists[0].counters["watched"] == COUNT


@contextlib.contextmanager
def frozen(agent: LabAgent) -> Iterator[None]:
    """The programs look at no packet: a neighbour's ARP would free slots."""
    config = kernel.DatapathConfig(agent.maps)
    config.set_enabled(False)
    try:
        yield
    finally:
        config.set_enabled(True)


def without_age(text: str) -> str:
    return re.sub(r"loaded [\w ]+ ago", "loaded some time ago", text)


def restored(kind: Any, data: Any) -> Any:
    """A value of a type from what JSON made of it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        assert set(hints) == set(data)
        return kind(**{name: restored(hint, data[name]) for name, hint in hints.items()})
    if origin in (typing.Union, types.UnionType):
        rest = [each for each in inner if each is not type(None)]
        return None if data is None else restored(rest[0], data)
    if origin is tuple:
        return tuple(restored(inner[0], each) for each in data)
    if origin is Mapping:
        return {name: restored(inner[1], each) for name, each in data.items()}
    return data


def test_looking_changes_nothing(scene, agent):
    """Programs that look at no packet write nothing either."""
    name = next(NAMES)
    scene.watch(scenes.watchlist(UDP, name=name))
    agent.kill()
    send(scene, 50)
    with frozen(agent):
        before = everything(agent)
        for more in ((), ("--json", "--interval", "0")):
            assert run(agent, *more).returncode == 0
        assert everything(agent) == before


def everything(agent: LabAgent) -> tuple[object, ...]:
    """What is pinned, attached, kept on disk, and in the maps."""
    # A ring buffer has no elements; packets for any socket of the machine are written to scratches.
    pins = [p for p in agent.maps.iterdir() if p.name not in ("bell", "scratches")]
    maps = {p.name: bpf_calls.Map.open(p) for p in pins}
    hashes = {name: maps.pop(name) for name in ("ports", "own_sockets", "drop_functions")}
    return (
        sorted(str(path) for path in agent.pin_dir.rglob("*")),
        {name: opened.values() for name, opened in maps.items()},
        {name: {k: o.lookup(k) for k in list(o.keys())} for name, o in hashes.items()},
        look(agent).interfaces,
        {path.name: path.read_bytes() for path in agent.file.parent.iterdir()},
    )


@contextlib.contextmanager
def watching(agent: LabAgent, *more: str) -> Iterator[subprocess.Popen[str]]:
    """`status --watch` while it goes on."""
    whole = [*COMMAND, *arguments(agent, "--watch", *more)]
    process = agent.node.namespace.popen(*whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_watching_tells_again_and_again_until_it_is_interrupted(scene, agent):
    with watching(agent, "--json", "--interval", "0.1") as process:
        told = [json.loads(process.stdout.readline()) for _ in range(3)]
        assert [set(each) for each in told] == [set(dataclasses.asdict(look(agent)))] * 3
        assert told[0]["rates"]["seconds"] >= 0.1
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert not any(line.startswith("Traceback") for line in rest.splitlines())


def on_a_terminal(agent: LabAgent, *more: str, env: dict[str, str]) -> str:
    """What it prints within its first two pages on a terminal."""
    master, slave = pty.openpty()
    environment = {n: v for n, v in os.environ.items() if n != "NO_COLOR"} | env
    whole = agent.node.namespace.command(*COMMAND, *arguments(agent, *more))
    process = subprocess.Popen(whole, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown, deadline = b"", time.monotonic() + WAIT_S
    try:
        while shown.count(b"LOST") < 2 and time.monotonic() < deadline:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    part = os.read(master, 65536)
                except OSError as error:  # how the end of a terminal is told
                    assert error.errno == errno.EIO
                    break
                shown += part
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return shown.decode()


def test_colours_and_a_clear_screen_are_for_terminals(scene, agent):
    clear, bold = "\x1b[H\x1b[2J", "\x1b[1mNODE"
    once = on_a_terminal(agent, "--interval", "0", env={})
    assert bold in once
    assert clear not in once
    again = on_a_terminal(agent, "--watch", "--interval", "0.1", env={})
    assert again.count(clear) >= 2
    bare = on_a_terminal(agent, "--interval", "0", env={"NO_COLOR": "1"})
    assert "NODE" in bare
    assert "\x1b" not in bare
    assert "\x1b" not in run(agent, "--interval", "0").stdout
    with watching(agent, "--interval", "0.1") as process:
        lines = [process.stdout.readline() for _ in range(60)]
    assert sum(line.startswith("NODE") for line in lines) >= 2
    assert not any("\x1b" in line for line in lines)


def test_it_works_with_the_rights_of_the_agents_container(scene, agent):
    """Names of others' programs take more; their ids do not."""
    with cnis.Cni(scene.nodes[0]) as cni:
        cni.tcx(cnis.verdict(-1), "eth0", "ingress", first=False)
        last = cni.order("eth0", "ingress")[-1].program
        ended = run(agent, "--interval", "0", before=CONTAINER)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"hostint > program [{last}]\n" in ended.stdout


def test_without_rights_it_says_in_one_line_what_it_takes(scene, agent):
    bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    ended = run(agent, before=bare)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(
        r"hostint-agent: .*Operation not permitted; status needs CAP_BPF and CAP_NET_ADMIN: .*\n",
        ended.stderr,
    )


def test_the_metric_of_missed_drops_is_what_the_kernel_counts(scene, agent):
    fd = bpf_calls.obj_get(agent.maps.parent / "programs" / "drop")
    try:
        (line,) = [
            each
            for each in agent.get("/metrics").splitlines()
            if each.startswith("hostint_drop_recursion_misses_total ")
        ]
        assert float(line.split()[1]) == bpf_calls.program_info(fd).recursion_misses
    finally:
        os.close(fd)
    assert look(agent).programs["drop"].recursion_misses == float(line.split()[1])
    assert "# HELP hostint_drop_recursion_misses_total Drops not looked at" in agent.get("/metrics")


def test_once_it_is_unloaded_there_is_nothing_to_tell():
    with scenes.scene("routed", 1) as built:
        agent = built.agents[0]
        with watching(agent, "--json", "--interval", "0.1") as process:
            assert "build" in json.loads(process.stdout.readline())
            agent.remove()
            deadline = time.monotonic() + WAIT_S
            gone = {"error": f"no datapath is loaded at {agent.pin_dir}"}
            while json.loads(process.stdout.readline()) != gone:
                assert time.monotonic() < deadline
        ended = run(agent)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"hostint-agent: no datapath is loaded at {agent.pin_dir}\n"
