# SPDX-License-Identifier: Apache-2.0
"""The benches run, measure what they say, and write what docs/performance.md promises."""

import contextlib
import fnmatch
import json
import math
import os
import re
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from hostint_agent import classifier
from tests.bench import __main__ as bench
from tests.bench import agent, forwarding, generator, kept, measure, plots, rule_sets, share
from tests.bench import node as nodes
from tests.bench.figure import Figure
from tests.bench.measure import Variant

pytestmark = pytest.mark.lab
DOCS = Path(__file__).parents[2] / "docs" / "performance.md"
REPORT_HEADER_BYTES = 28


@pytest.fixture(scope="module")
def node():
    with nodes.node() as made:
        yield made


@pytest.fixture
def short(monkeypatch):
    """Two benches with the fewest rounds that have quartiles."""
    for module in (forwarding, share):
        monkeypatch.setattr(module, "_ROUNDS", (2, 2))


def documented() -> list[str]:
    """Keys of the first column of the table, some of them patterns."""
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    return [key for row in rows for key in re.findall(r"`([\w*]+)`", row.split("|")[1])]


def test_a_quick_run_writes_every_documented_key_and_the_plot(short, tmp_path, capsys):
    output = tmp_path / "build" / "bench.json"
    status = bench.main(["--quick", "--only", "share,forwarding", "--output", str(output)])
    told = capsys.readouterr()
    assert (status, told.err) == (0, "")
    found = json.loads(output.read_text())
    keys = set(found["figures"])
    wanted = [k for k in documented() if k.startswith(("forward_", "share_"))]
    assert [key for key in wanted if not fnmatch.filter(keys, key)] == []
    assert [key for key in keys if not any(fnmatch.fnmatch(key, w) for w in wanted)] == []
    for key, figure in found["figures"].items():
        values = [figure[name] for name in ("value", "low", "high")]
        assert all(math.isfinite(value) for value in values), key
        assert figure["low"] <= figure["value"] <= figure["high"], key
    assert found["quick"] is True
    assert found["failed"] == {}
    assert found["machine"]["kernel"] == os.uname().release
    assert found["machine"]["cpus"] == os.cpu_count()
    picture = (output.parent / "bench-watched-share.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    for text in ("about ", "unwatched packet, added / plain forwarding", str(output)):
        assert text in told.out


def test_every_key_that_a_bench_names_is_documented_once():
    listed = documented()
    assert len(listed) == len(set(listed))
    sources = [DOCS.parents[1] / "tests" / "bench" / f"{name}.py" for name in bench.BENCHES]
    text = "".join(source.read_text() for source in sources)
    named = re.findall(r'[fF]igure\(\s*"([a-z]+_[a-z0-9_]+)",', text)
    assert {"forward_watched", "export_idle_cpu", "change_10000_rules_s", "loader_gone"} <= set(
        named
    )
    assert [key for key in named if not any(fnmatch.fnmatch(key, d) for d in listed)] == []


def test_a_bench_that_fails_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    def fail(quick, say):
        raise nodes.WrongCount("3 of 4 packets came through")

    monkeypatch.setattr(forwarding, "run", fail)
    monkeypatch.setattr(agent, "run", lambda quick, say: [Figure("idle", "idle agent", 1.5, "%")])
    output = tmp_path / "bench.json"
    assert bench.main(["--quick", "--only", "forwarding,agent", "--output", str(output)]) == 1
    found = json.loads(output.read_text())
    assert found["failed"] == {"forwarding": "WrongCount: 3 of 4 packets came through"}
    assert found["figures"]["idle"]["value"] == 1.5
    assert "forwarding could not run: WrongCount: 3 of 4" in capsys.readouterr().err


def test_what_is_interrupted_leaves_nothing(short, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "checked_run", interrupt)
    assert bench.main(["--quick", "--only", "share", "--output", str(tmp_path / "b.json")]) == 130
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert f"hl{os.getpid()}-bench" not in names
    assert not Path(f"/sys/fs/bpf/hostint-bench-{os.getpid()}").exists()
    assert "stopped" in capsys.readouterr().out


RULES = rule_sets.pods_and_services(16)
IMAGE = classifier.compile_rules(RULES)


def test_generated_packets_are_those_that_were_asked_for(node):
    wanted = rule_sets.watched(RULES, 16)
    node.commit(IMAGE, **nodes.EVERY_PACKET)
    node.use("ours")
    node.generators[0].send(generator.traffic(wanted))
    node.empty_rings()
    node.run(16 * 8)
    frames = [report[REPORT_HEADER_BYTES:] for report in node.datapath.drain()]
    seen = Counter((f[23], struct.unpack("!IIHH", f[26:38])) for f in frames)
    assert seen == {
        (p.protocol, (p.source, p.destination, p.source_port, p.destination_port)): 8
        for p in wanted
    }
    assert {len(frame) for frame in frames} == {generator.FRAME_BYTES}


def test_emptied_rings_hold_nothing(node):
    node.commit(IMAGE, **nodes.EVERY_PACKET)
    node.use("ours")
    node.generators[0].send(generator.traffic(rule_sets.watched(RULES, 16)))
    node.run(128)
    node.empty_rings()
    assert node.datapath.drain() == []


def test_what_a_killed_bench_has_pinned_is_removed(node):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = Path(f"/sys/fs/bpf/hostint-bench-{gone.pid}-load0")
    left.mkdir()
    nodes.remove_leftover_pins()
    assert not left.exists()
    assert Path(f"/sys/fs/bpf/hostint-bench-{os.getpid()}").exists()


@pytest.mark.parametrize("name", ["empty", "clock"])
def test_what_we_compare_with_runs_at_both_hooks_of_every_packet(node, name):
    node.use(name)
    program = node.program(name)
    with nodes.run_times():
        before = nodes.program_times(program)[1]
        node.run(1000)
        assert nodes.program_times(program)[1] - before == 2 * 1000
    os.close(program)


def test_plain_forwarding_runs_no_program(node):
    node.use("ours")
    node.use("none")
    programs = [node.program("empty"), node.datapath.program("ingress")]
    with nodes.run_times():
        before = [nodes.program_times(program) for program in programs]
        node.run(1000)
        assert [nodes.program_times(program) for program in programs] == before
    for program in programs:
        os.close(program)


@pytest.mark.parametrize(
    ("outcome", "packets"),
    [("suppressed", rule_sets.unwatched(16)), (None, rule_sets.watched(RULES, 16))],
    ids=["watched that are not", "unwatched that are"],
)
def test_a_variant_that_is_not_what_it_says_gives_no_figure(node, outcome, packets):
    claimed = Variant(
        "claimed",
        generator.traffic(packets),
        image=IMAGE,
        policy=nodes.NO_NEWS,
        outcome=outcome,
    )
    with pytest.raises(nodes.WrongCount, match="claimed"):
        measure.measure(node, [[claimed]], rounds=1)


def test_packets_that_do_not_come_through_give_no_figure(node):
    node.use("none")
    node.generators[0].send(generator.traffic(rule_sets.unwatched(16)))
    node.namespace.run("ip", "route", "add", "blackhole", "10.96.0.0/16")
    try:
        with pytest.raises(nodes.WrongCount, match="0 of 1000 packets came through"):
            node.run(1000)
    finally:
        node.namespace.run("ip", "route", "del", "blackhole", "10.96.0.0/16")


def test_all_generators_at_once_send_each_its_part(node):
    if len(node.generators) == 1:
        assert len(os.sched_getaffinity(0)) == 1
        return
    for number, made in enumerate(node.generators):
        made.send(generator.traffic(rule_sets.unwatched(16, services=nodes.WAYS_OUT[number])))
    before = node.came_out()
    with contextlib.suppress(generator.NotTogether):
        assert node.run_together(2 * 20_480) > 0
    assert [now - was for now, was in zip(node.came_out(), before, strict=True)] == [20_480] * 2


def test_a_process_with_the_compiler_in_it_is_found():
    code = "import bcc; print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout and child.stdout.readline() == "ready\n"
        assert agent.has_compiler(child.pid)
        assert child.pid in agent.family(os.getpid())
        child.communicate("\n")
    assert not agent.has_compiler(os.getpid())


def test_the_cpu_time_of_a_child_counts():
    code = "while True: pass"
    before, deadline = agent.cpu_s(os.getpid()), time.monotonic() + 30
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        own = time.process_time()
        while agent.cpu_s(os.getpid()) - before < 0.5 + time.process_time() - own:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()


def test_too_few_figures_draw_nothing(tmp_path):
    assert plots.draw([], tmp_path) == []
    assert list(tmp_path.iterdir()) == []


FIGURES = [
    Figure("cost", "cost of a packet", 0.25, "ratio", "<=", 0.2, "600 ns/packet"),
    Figure("rate", "reports", 1_200_000, "reports/s", ">=", 1_000_000),
    Figure("lost", "reports lost", 0, "reports", "==", 0),
    Figure("point", "of a plot", 1.0, "ns", shown=False),
]
MACHINE = {"date": "2026-01-01", "kernel": "6.18", "cpu": "any", "cpus": 2}


@pytest.fixture
def docs(tmp_path):
    (tmp_path / kept.PAGE).write_text(f"before\n{kept._BEGIN}\nold\n{kept._END}\nafter\n")
    return tmp_path


def test_a_kept_table_is_there_to_read_and_to_compare_with(docs):
    kept.save(FIGURES, MACHINE, docs)
    kept.save(FIGURES, MACHINE, docs)
    page = (docs / kept.PAGE).read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert page.count("| cost of a packet | 0.25 | ratio | <= 0.2 | **no** | 600 ns/packet |") == 1
    assert "2026-01-01, kernel 6.18" in page and "of a plot" not in page
    assert kept.load(docs) == {"cost": 0.25, "rate": 1_200_000, "lost": 0, "point": 1.0}


@pytest.mark.parametrize(
    ("key", "value", "words", "worse"),
    [
        ("cost", 0.27, "0.25 (+8%)", False),
        ("cost", 0.28, "0.25 (+12%)", True),
        ("cost", 0.1, "0.25 (-60%)", False),
        ("rate", 1_000_000, "1,200,000 (-17%)", True),
        ("rate", 2_000_000, "1,200,000 (+67%)", False),
        ("lost", 0, "0", False),
        ("lost", 1, "0", True),
        ("new", 1, "", False),
    ],
)
def test_what_is_worse_than_what_was_kept_shows(docs, key, value, words, worse):
    kept.save(FIGURES, MACHINE, docs)
    compare = next((f.compare for f in FIGURES if f.key == key), "<=")
    found = Figure(key, key, value, "", compare, 1)
    assert kept.change(found, kept.load(docs)) == (words, worse)


def test_a_page_without_a_place_for_the_table_is_left_alone(tmp_path):
    (tmp_path / kept.PAGE).write_text("nothing here\n")
    with pytest.raises(kept.NotKept, match="has no '<!-- table"):
        kept.save(FIGURES, MACHINE, tmp_path)
    assert kept.load(tmp_path) == {}


def test_only_a_whole_run_is_kept(capsys):
    for more in (["--quick"], ["--only", "share"]):
        with pytest.raises(SystemExit):
            bench.main(["--keep", *more])
    assert "--keep needs all of it" in capsys.readouterr().err
