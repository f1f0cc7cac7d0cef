# SPDX-License-Identifier: Apache-2.0
"""Another version of the programs takes the place of the one that runs, there and back, under 50,000 packets a second.

Every packet is delivered, and every one is accounted for: what was watched, by whichever version, adds up to what was sent.
"""

import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, counters, loader
from tests.lab import scene as scenes
from tests.lab import traffic
from tests.lab.cni import HOOKS, Cni
from tests.lab.delivery import Delivery
from tests.lab.scene import Scene

pytestmark = pytest.mark.lab
PORT, DEADLY_PORT = 7000, 7001
PER_SECOND = 50_000
# packets inside the host, or waiting for its softirq, while the programs of one interface after the other are replaced
IN_FLIGHT = 2_000
FIREWALL = f"rule inet deadly forward udp dport {DEADLY_PORT} drop"
# an agent that cannot attach to one interface as long as a file is there
FAULTY = textwrap.dedent(
    """
    import errno, sys
    from pathlib import Path
    from hostint_agent import __main__, attach
    ifindex, broken = int(sys.argv.pop(1)), Path(sys.argv.pop(1))
    ensure = attach.TcxHooks.ensure
    def failing(hooks, at, direction):
        if at == ifindex and broken.exists():
            raise OSError(errno.EPERM, "no exchange here")
        return ensure(hooks, at, direction)
    attach.TcxHooks.ensure = failing
    sys.exit(__main__.main())
    """
)
WATCHLIST = scenes.watchlist("protocol: UDP, source: {cidrs: [10.244.0.0/16]}", "interval: 10ms")


@pytest.fixture(scope="module")
def delivery(tmp_path_factory: pytest.TempPathFactory) -> Delivery:
    return Delivery(tmp_path_factory.mktemp("delivery"))


@pytest.fixture
def scene() -> Iterator[Scene]:
    with scenes.scene(nodes=1) as made:
        made.watch(WATCHLIST)
        hook = "{ type filter hook forward priority 0; }"
        for words in ("table inet deadly", f"chain inet deadly forward {hook}", FIREWALL):
            made.nodes[0].namespace.run("nft", f"add {words}")
        yield made


def version(directory: Path, name: str, *, other_maps: bool = False) -> Path:
    """Sources that do the same and are another build; with `other_maps` none that could go on with the maps there are."""
    made = directory / name
    shutil.copytree(loader.default_bpf_dir(), made)
    with (made / loader.MAIN_SOURCE).open("a") as source:
        source.write(f"/* {name} */\n" + ("#define OTHER_MAPS 1\n" if other_maps else ""))
    return made


@dataclass
class Dying:
    """Packets that the firewall drops, about a thousand a second."""

    sent: int = 0

    def run(self, scene: Scene, stopping: threading.Event) -> None:
        one, other = scene.nodes[0].pods
        socket = one.namespace.socket(traffic.socket.AF_INET, traffic.socket.SOCK_DGRAM)
        while not stopping.wait(0.001):
            socket.sendto(b"to die", (other.address, DEADLY_PORT))
            self.sent += 1
        socket.close()


@dataclass
class Outcome:
    """What came of the traffic while the agent was replaced."""

    sent: int
    received: int
    died: int
    identity: counters.Identity


def replace(scene: Scene, versions: Sequence[Path]) -> list[str]:
    """Stop the agent and start the next version's, one after the other; the builds that were pinned then."""
    agent, pinned = scene.agents[0], []
    for sources in versions:
        agent.stop()
        agent.bpf_dir = sources
        agent.start()
        builds = [build.name for build in loader.builds(agent.pin_dir)]
        assert builds == [loader.read_source(sources).build]
        pinned += builds
        time.sleep(0.5)
    return pinned


def under_load(scene: Scene, delivery: Delivery, deeds: Callable[[], object]) -> Outcome:
    """Do it under traffic that begins before and ends after."""
    one, other = scene.nodes[0].pods
    agent, dying, stopping = scene.agents[0], Dying(), threading.Event()
    before = agent.settled().counters["watched"]
    sent = received = 0
    with futures.ThreadPoolExecutor(2) as threads:
        killer = threads.submit(dying.run, scene, stopping)
        deed = threads.submit(deeds)
        while not deed.done():
            count = 2 * PER_SECOND
            target = (other.address, PORT)
            options = [f"rate={PER_SECOND}"]
            received += delivery.send(one.namespace, target, count, [other.namespace], *options)[0]
            sent += count
        stopping.set()
        killer.result()
        deed.result()
    identity = agent.settled()
    assert before == 0
    return Outcome(sent, received, dying.sent, identity)


def assert_nothing_lost(scene: Scene, outcome: Outcome, unresolved: int) -> None:
    counted = outcome.identity.counters
    print(outcome, scene.collector.gaps())
    assert outcome.sent > 2 * PER_SECOND
    assert outcome.died > 500
    assert outcome.received == outcome.sent
    assert outcome.identity.watched_difference == 0
    assert outcome.identity.drops_difference == 0
    assert counted["watched"] == outcome.sent + outcome.died
    assert counted["unresolved"] + counted["unverified"] <= unresolved
    assert outcome.died - unresolved <= counted["dropped"] <= outcome.died
    scene.quiet()
    assert scene.collector.gaps() == {}
    assert scene.agents[0].get("/metrics").count("hostint_reports_failed_total{") == 1
    reports = counted["reported"] + counted["drops_reported"]
    assert len(scene.collector.records()) == reports > 500


def test_there_and_back_with_the_same_maps_nothing_is_even_unresolved(scene, delivery, tmp_path):
    first, second = loader.default_bpf_dir(), version(tmp_path, "second")
    assert loader.have_same_maps(*(Path(loader.read_source(at).build) for at in (first, second)))
    ids = set()

    def there_and_back() -> None:
        for sources in (second, first, second):
            replace(scene, [sources])
            ids.add(map_id(scene.agents[0].maps / "slots"))

    outcome = under_load(scene, delivery, there_and_back)
    assert_nothing_lost(scene, outcome, unresolved=0)
    assert len(ids) == 1


def test_there_and_back_with_other_maps_every_packet_still_has_an_outcome(
    scene, delivery, tmp_path
):
    first, second = loader.default_bpf_dir(), version(tmp_path, "second", other_maps=True)
    builds: list[str] = []
    outcome = under_load(scene, delivery, lambda: builds.extend(replace(scene, [second, first])))
    assert not loader.have_same_maps(*map(Path, builds))
    assert_nothing_lost(scene, outcome, unresolved=IN_FLIGHT)


def tagging(directory: Path) -> Path:
    """Sources that do as earlier versions did: they leave a tag in tc_index, and know packets in other slots."""
    made = version(directory, "tagging", other_maps=True)
    main = made / loader.MAIN_SOURCE
    text = main.read_text()
    counted = "\tif (watchlist)\n\t\tcount_watched("
    assert text.count(counted) == 1
    tag = "\tskb->tc_index = (__u16)((now >> 5) | 0x8000);\n"
    main.write_text(text.replace(counted, tag + counted))
    return made


def test_from_programs_that_tag_packets_and_back_every_packet_has_an_outcome(
    scene, delivery, tmp_path
):
    first, tags = loader.default_bpf_dir(), tagging(tmp_path)
    outcome = under_load(scene, delivery, lambda: replace(scene, [tags, first]))
    assert_nothing_lost(scene, outcome, unresolved=IN_FLIGHT)


def map_id(pin: Path) -> int:
    """Kernel id of a pinned map."""
    opened = bpf_calls.Map.open(pin)
    return opened.id


@pytest.mark.parametrize("other_maps", [False, True], ids=["same maps", "other maps"])
def test_an_interface_that_cannot_be_exchanged_counts_where_somebody_reads_or_not_at_all(
    scene, delivery, tmp_path, other_maps
):
    node, agent = scene.nodes[0], scene.agents[0]
    one, other = node.pods
    index, broken, count = node.port(one.interface), tmp_path / "broken", 1000

    def send() -> dict[str, int]:
        received = delivery.send(one.namespace, (other.address, PORT), count, [other.namespace])
        assert received == [count]
        identity = agent.settled()
        assert (identity.watched_difference, identity.drops_difference) == (0, 0)
        return dict(identity.counters)

    with Cni(node) as hooks:

        def first() -> list[int]:
            return [next(iter(hooks.order(one.interface, hook))).program for hook in HOOKS]

        assert send()["watched"] == count
        older = first()
        broken.touch()
        agent.stop()
        agent.bpf_dir = version(tmp_path, "second", other_maps=other_maps)
        agent.command = (sys.executable, "-c", FAULTY, str(index), str(broken))
        agent.start()
        assert agent.maps.parent == loader.current(agent.pin_dir, agent.bpf_dir)
        assert loader.builds(agent.pin_dir) == [agent.maps.parent]
        assert "hostint_interfaces_failed 1.0" in agent.get("/metrics")
        if other_maps:
            assert [len(hooks.order(one.interface, hook)) for hook in HOOKS] == [0, 0]
            assert send()["watched"] == count
        else:
            assert first() == older
            assert send()["watched"] == 2 * count
        assert agent.log.read_text().count("older program detached") == 2 * other_maps
        before = agent.identity().counters["watched"]
        broken.unlink()
        deadline = time.monotonic() + 20
        while "hostint_interfaces_failed 0.0" not in agent.get("/metrics"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not set(first()) & set(older)
        counted = send()
        assert counted["watched"] == before + count
        assert counted["unresolved"] == 0
        scene.quiet()
        assert len(scene.collector.records()) == counted["reported"] > 0
        assert scene.collector.gaps() == {}
