# SPDX-License-Identifier: Apache-2.0
"""`hostint-agent status`: what is a loss, what a person is told of it, and how it ends where there is nothing to tell."""

import dataclasses
import fcntl
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostint_agent import __main__ as command
from hostint_agent import bpf_calls, bpf_types, counters, loader, metrics, pinned
from hostint_agent.status import hook_orders, tallies
from hostint_agent.status import look as status
from hostint_agent.status import text as status_text
from tests.agent.nobody import NOBODY
from tests.agent.snapshots import NOW

COMMAND = [sys.executable, "-m", "hostint_agent", "status"]
NOTHING = dict.fromkeys(counters.WATCHLIST_FIELDS, 0)
NO_COUNTS = {c.name.lower(): 0 for c in bpf_types.DatapathCounter}
HUGE = 123_456_789_012_345
# counted, and no loss: packets that are none of ours, and what became of those that are
NO_LOSS_OF_WATCHLIST = {
    *("watched", "reported", "suppressed", "sampled_out", "not_asked", "dropped", "dropped_late"),
    *("drops_reported", "drops_suppressed", "drops_sampled_out", "drops_not_asked"),
}
NO_LOSS_OF_DATAPATH = {"not_ip", "stale_drop"}


def tally(at_s: float = 0.0, sent: int = 0, failed: int = 0, misses: int = 0, **more: int):
    """Counters of the watchlist `web`, of the datapath and of the collector `default`."""
    ours = {name: count for name, count in more.items() if name in NOTHING}
    rest = {name: count for name, count in more.items() if name not in NOTHING}
    return tallies.Tally(
        at_s=at_s,
        watchlists={"web": NOTHING | ours},
        datapath=NO_COUNTS | rest,
        collectors={"default": (sent, failed)},
        recursion_misses=misses,
    )


def hook(direction: str = "ingress", method: str | None = "tcx", before=(), after=()):
    place = len(before) + 1 if method else 0
    return hook_orders.Hook(direction, method, place, tuple(before), tuple(after))


def interface(name: str = "eth0", kind: str = "uplink", *hooks: hook_orders.Hook, index: int = 2):
    hooks = hooks or (hook(), hook("egress"))
    return hook_orders.Interface(index, name, kind, index, hooks)


def watchlist(name: str = "web", **more: object) -> status.Watchlist:
    plain = {"live": True, "rules": 2, "collector": "default", "pending": 0, "counters": NOTHING}
    return status.Watchlist(name=name, **plain | more)


def collector(name: str = "default", **more: object) -> status.Collector:
    plain = {"live": True, "address": "192.0.2.9", "port": 32766, "reports_per_second": 0}
    return status.Collector(name=name, **plain | {"sent": 7, "failed": 0} | more)


def told(**more: object) -> status.Status:
    """The status of a node on which all is well."""
    program = bpf_calls.ProgramInfo(17, 5, 0, 0, 0, 4321)
    well = {
        "version": "1.2.3",
        "node": "node-a",
        "node_id": 0x0A000001,
        "pin_dir": "/sys/fs/bpf/hostint",
        "agent_running": True,
        "agent_pid": 4242,
        "build": "0123456789abcdef",
        "sources_build": "0123456789abcdef",
        "loaded_s": 3700.0,
        "enabled": True,
        "holding": False,
        "own_namespace": True,
        "configuration": 3,
        "programs": dict.fromkeys(loader.PROGRAMS, program),
        "interfaces": (interface(),),
        "unseen": (),
        "generation": 12,
        "rules": 2,
        "own_rules": 1,
        "watchlists": (watchlist(),),
        "drops": {},
        "drop_functions": {},
        "collectors": (collector(),),
        "flows": 655,
        "flow_places": 65536,
        "slots": {"free": 65000, "egressed": 536, "pending": 0},
        "rings": tuple(status.Ring(c, k, 0, 512) for c in range(2) for k in ("flow", "drop")),
        "rates": tallies.Rates(1.0, 1234.0, 5.5, 5.0, 0.0),
        "losses": (),
    }
    return status.Status(**well | more)


def text(**more: object) -> str:
    return status_text.render(told(**more), colours=False)


def line(begin: str, **more: object) -> str:
    """The line of the text that begins like this."""
    found = [each for each in text(**more).splitlines() if each.strip().startswith(begin)]
    assert len(found) == 1, found
    return found[0]


# what is a loss


def test_every_counter_is_a_loss_or_known_to_be_none():
    of_watchlists = set(tallies.MEANINGS) & set(counters.WATCHLIST_FIELDS)
    assert of_watchlists | NO_LOSS_OF_WATCHLIST == set(counters.WATCHLIST_FIELDS)
    assert not of_watchlists & NO_LOSS_OF_WATCHLIST
    of_datapath = set(tallies.MEANINGS) & set(NO_COUNTS)
    assert of_datapath | NO_LOSS_OF_DATAPATH == set(NO_COUNTS)
    assert not of_datapath & NO_LOSS_OF_DATAPATH


@pytest.mark.parametrize("name", tallies.MEANINGS)
def test_a_loss_is_one_sentence_and_has_the_name_of_a_metric(name):
    words = tallies.MEANINGS[name]
    assert re.fullmatch(r"[A-Z][^.]+\.", words), words
    assert f"hostint_{name}" in {family.name for family in metrics.families(NOW)}


def test_nothing_is_lost_where_everything_that_was_watched_had_an_outcome():
    harmless = dict.fromkeys(NO_LOSS_OF_WATCHLIST | NO_LOSS_OF_DATAPATH, 5)
    assert tallies.losses(None, tally(sent=9, **harmless)) == ()


@pytest.mark.parametrize("name", tallies.MEANINGS)
def test_each_loss_is_told_with_how_much_and_where(name):
    field = {"reports_failed": "failed", "drop_recursion_misses": "misses"}.get(name, name)
    owner = "web" if name in NOTHING else "default" if field == "failed" else None
    before, now = tally(10.0, **{field: 20}), tally(14.0, **{field: 30})
    (loss,) = tallies.losses(before, now)
    assert (loss.name, loss.count, loss.per_second) == (name, 30, 2.5)
    assert loss.where == ({owner: 30} if owner else {})
    assert loss.meaning == tallies.MEANINGS[name]


def test_of_a_single_look_nobody_knows_what_is_lost_now():
    (loss,) = tallies.losses(None, tally(ring_full=1))
    assert loss.per_second is None


def test_a_counter_that_began_anew_did_not_grow():
    (loss,) = tallies.losses(tally(0.0, ring_full=9), tally(1.0, ring_full=4))
    assert loss.per_second == 0


def test_rates_are_what_came_between_two_looks():
    before = tally(10.0, watched=100, reported=10, drops_reported=1, dropped=3, sent=11)
    now = tally(
        12.0,
        watched=300,
        reported=30,
        drops_reported=3,
        dropped=5,
        dropped_late=4,
        sent=33,
    )
    assert tallies.rates(before, now) == tallies.Rates(2.0, 100.0, 11.0, 11.0, 3.0)


# what a person is told


def test_a_node_on_which_all_is_well_says_so():
    assert text().endswith("LOST        nothing lost")
    assert line("AGENT") == "AGENT       running, pid 4242"
    assert line("NODE") == "NODE        node-a, node id 10.0.0.1"
    assert "build 0123456789abcdef of hostint 1.2.3, loaded 1 h 1 min ago" in line("DATAPATH")
    assert "first in order on 2 of 2 hooks of 1 interfaces" in line("ATTACHED")
    assert line("RULES") == (
        "RULES       2 directed (1 more of our own), generation 12, of configuration 3"
    )
    assert line("FLOWS") == "FLOWS       655 of 65,536 (1 %) places of the table taken"
    assert line("SLOTS") == "SLOTS       of 65,536: 65,000 free, 536 egressed"
    assert line("RATES") == (
        "RATES       1,234/s watched, 5.5/s reported, 5.0/s sent, 0/s dropped (over 1.0 s)"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"agent_running": False}, "not running: packets are still watched"),
        ({"enabled": False}, "not enabled: no packet is looked at"),
        ({"holding": True}, "reports are held back until an upgrade is complete"),
        ({"sources_build": "f" * 16}, "hostint 1.2.3 is build ffffffffffffffff"),
        ({"own_namespace": False}, "not to be seen from here"),
        ({"configuration": None}, "names are not known: no last good configuration"),
        ({"watchlists": (watchlist(live=False),)}, "web: not live"),
        ({"interfaces": ()}, "first in order on 0 of 0 hooks"),
        ({"unseen": ("the default route is on wg0",)}, "the default route is on wg0"),
    ],
)
def test_what_is_not_as_it_should_be_is_told(change, words):
    assert words in text(**change)
    assert words not in text()


def test_programs_that_others_attached_are_told_in_the_order_in_which_they_run():
    hooks = (hook(before=["cni [7]"], after=["log [8]"]), hook("egress", None, after=["cni [9]"]))
    shown = text(interfaces=(interface("eth0", "uplink", *hooks),))
    assert "ingress  tcx     2 of 3  cni [7] > hostint > log [8]\n" in shown
    assert "egress   not attached    cni [9]\n" in shown
    assert "first in order on 0 of 2 hooks" in shown


def test_interfaces_that_are_alike_are_told_together_and_uplinks_first():
    pods = [interface(f"pod{i}", "pod", index=i + 3) for i in range(3)]
    shown = text(interfaces=(*pods, interface()))
    assert shown.count("ingress") == 3  # of two groups, and the program
    assert shown.index("eth0") < shown.index("pod0 pod1 pod2")


def test_a_ring_is_told_by_what_waits_in_it():
    rings = [status.Ring(0, "flow", 512, 512), status.Ring(0, "drop", 0, 512)]
    rings += [status.Ring(1, "flow", 128, 512), status.Ring(1, "drop", 3, 512)]
    shown = text(rings=tuple(rings))
    assert "flow: 512 of 512 (100 %) on CPU 0, 128 of 512 (25 %) on CPU 1\n" in shown
    assert "drop: 3 of 512 (1 %) on CPU 1, the others empty\n" in shown


def test_counters_without_a_column_are_told_where_they_are_not_0():
    counted = NOTHING | {"watched": 50, "sampled_out": 4, "not_asked": 0, "ring_full": 9}
    shown = text(watchlists=(watchlist(counters=counted, pending=2),))
    assert "web: also 2 waiting for an outcome, 4 sampled out\n" in shown


def test_every_counter_of_a_watchlist_is_told_somewhere():
    counted = {name: 1_000_003 + i for i, name in enumerate(counters.WATCHLIST_FIELDS)}
    now = dataclasses.replace(tally(), watchlists={"web": counted})
    shown = text(watchlists=(watchlist(counters=counted),), losses=tallies.losses(None, now))
    for name, count in counted.items():
        assert f"{count:,}" in shown, name


def test_drops_are_shown_by_function():
    shown = line(
        "DROPS",
        drops={"NETFILTER_DROP": 40, "NOT_SPECIFIED": 33},
        drop_functions={"NOT_SPECIFIED": {"ip_error": 30, "dst_discard": 3}},
    )
    assert shown.split(maxsplit=1)[1] == (
        "40 NETFILTER_DROP, 30 NOT_SPECIFIED in ip_error, 3 NOT_SPECIFIED in dst_discard"
    )


def test_drops_of_unknown_functions_are_shown_by_reason():
    functions = {"NOT_SPECIFIED": {"ip_error": 30}}
    shown = line("DROPS", drops={"NOT_SPECIFIED": 33}, drop_functions=functions)
    assert shown.endswith("30 NOT_SPECIFIED in ip_error, 3 NOT_SPECIFIED")


def test_run_time_is_told_where_the_kernel_counts_it():
    program = bpf_calls.ProgramInfo(17, 5, 1000, 250_000, 3, 4321)
    programs = dict.fromkeys(loader.PROGRAMS, program)
    assert line("drop  ", programs=programs).split() == (
        ["drop", "17", "4,321", "3", "1,000", "250", "ns"]
    )
    assert line("drop  ").split() == ["drop", "17", "4,321", "0"]


def test_a_collector_that_failed_and_is_used_no_more_is_still_told():
    gone = collector("#3", live=False, address=None, port=0, failed=44)
    assert line("#3", collectors=(collector(), gone)).split() == (
        ["#3", "not", "in", "use", "-", "7", "44"]
    )


def crowded() -> status.Status:
    """As much of everything as there can be, with names as long as they can be."""
    long = "x" * 63
    counted = dict.fromkeys(counters.WATCHLIST_FIELDS, HUGE)
    names = [f"{i}{long}"[:63] for i in range(255)]
    pods = tuple(interface(f"veth{i:011}", "pod", index=i + 3) for i in range(250))
    neighbours = [f"cil_from_contai [{i}]" for i in range(10)]
    odd = interface("e" * 15, "uplink", hook(before=neighbours, after=neighbours), hook("egress"))
    now = tallies.Tally(
        at_s=2.0,
        watchlists=dict.fromkeys(names, counted),
        datapath=dict.fromkeys(NO_COUNTS, HUGE),
        collectors=dict.fromkeys(names[:16], (HUGE, HUGE)),
        recursion_misses=HUGE,
    )
    quiet = dataclasses.replace(tally(), watchlists={}, collectors={})
    return told(
        node="n" * 253,
        pin_dir=f"/sys/fs/bpf/{'d' * 80}",
        interfaces=(*pods, odd),
        watchlists=tuple(
            watchlist(n, rules=15000, collector=long, pending=HUGE, counters=counted) for n in names
        ),
        collectors=tuple(
            collector(n, address="2001:db8:1111:2222:3333:4444:5555:6666", failed=HUGE)
            for n in names[:16]
        ),
        drops={f"REASON_{'R' * 40}_{i}": HUGE for i in range(60)},
        drop_functions={f"REASON_{'R' * 40}_0": {f"{i}{long}"[:55]: HUGE for i in range(256)}},
        rings=tuple(status.Ring(c, k, 511, 512) for c in range(128) for k in ("flow", "drop")),
        rates=tallies.Rates(1.0, 1e9, 1e9, 1e9, 1e9),
        losses=tallies.losses(quiet, now),
        programs=dict.fromkeys(
            loader.PROGRAMS, bpf_calls.ProgramInfo(10**9, 5, HUGE, HUGE, HUGE, 999_999)
        ),
    )


@pytest.mark.parametrize("colours", [False, True])
def test_nothing_is_wider_than_100_columns(colours):
    shown = status_text.render(crowded(), colours=colours)
    plain = re.sub(r"\x1b\[\d+m", "", shown)
    assert (plain != shown) == colours
    assert max(map(len, plain.splitlines())) <= 100


def test_colours_change_no_letter():
    shown = status_text.render(crowded(), colours=True)
    bare = re.sub(r"\x1b\[\d+m", "", shown)
    plain = status_text.render(crowded(), colours=False)
    assert [each.rstrip() for each in bare.splitlines()] == plain.splitlines()


def test_a_name_that_a_terminal_would_obey_is_not_printed():
    shown = text(interfaces=(interface("\x1b[2J\udcff"),))
    assert "\x1b" not in shown
    assert "?[2J?" in shown


# how it ends


def run(*arguments: object, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60, **more
    )


@pytest.mark.parametrize("value", ["-1", "soon", "nan", "3601"])
def test_an_interval_that_is_none_is_wrong_usage(value, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["status", f"--interval={value}"])
    assert ended.value.code == 2
    assert f"'{value}' is not 0..3600 seconds" in capsys.readouterr().err


def test_an_agent_without_pins_is_told(tmp_path):
    """It is starting, or somebody removed them."""
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ended = run("--pin-dir", tmp_path)
    os.close(descriptor)
    words = f"an agent works with {tmp_path}, but no datapath is pinned there"
    assert (ended.returncode, ended.stderr) == (1, f"hostint-agent: {words}\n")


def test_without_a_datapath_there_is_one_line_and_status_1(tmp_path):
    for pin_dir in (tmp_path, tmp_path / "none"):
        ended = run("--pin-dir", pin_dir)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr == f"hostint-agent: no datapath is loaded at {pin_dir}\n"


@pytest.fixture
def pin_dir() -> Iterator[Path]:
    directory = Path(f"/sys/fs/bpf/hostint-status-{os.getpid()}-{time.monotonic_ns()}")
    directory.mkdir()
    yield directory
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir()
    directory.rmdir()


@pytest.mark.bpf
def test_a_datapath_without_its_maps_is_told_in_one_line(pin_dir):
    build = pin_dir / "0123456789abcdef"
    (build / "maps").mkdir(parents=True)
    ended = run("--pin-dir", pin_dir)
    assert ended.returncode == 1
    words = f"hostint-agent: the datapath {build} is not complete: no open {build}/maps/"
    assert ended.stderr.startswith(words)
    assert ended.stderr.count("\n") == 1


@pytest.mark.bpf
def test_who_may_not_look_at_the_pins_is_told_what_it_takes(pin_dir):
    pin_dir.chmod(0o700)
    arguments = [*NOBODY, sys.executable, "-m", "hostint_agent"]
    arguments += ["status", "--pin-dir", str(pin_dir)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        f"hostint-agent: {pin_dir}: Permission denied; status needs CAP_BPF and CAP_NET_ADMIN: "
        "run it as root, or in the agent's container\n"
    )


# whether an agent runs


def test_nobody_who_holds_the_lock_is_no_agent(tmp_path):
    assert pinned.agent(tmp_path) == (False, None)


def test_who_holds_the_lock_is_the_agent_and_asking_neither_waits_nor_keeps_it(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert pinned.agent(tmp_path) == (False, None)
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert pinned.agent(tmp_path) == (True, os.getpid())
    finally:
        os.close(directory)
    assert pinned.agent(tmp_path) == (False, None)


def test_two_who_ask_at_once_do_not_take_each_other_for_an_agent(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert pinned.agent(tmp_path) == (False, None)
    finally:
        os.close(directory)
