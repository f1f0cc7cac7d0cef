# SPDX-License-Identifier: Apache-2.0
"""Whatever way a packet takes through a node: what is watched is matched from ingress to egress, and nothing is made up.

Ground truth is in truth.py, the ways are in paths/table.py. HOSTINT_PATH_PACKETS packets of each kind come in on each way in
each IP version, half of them with all flows watched.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostint_agent import loader
from tests.lab.paths import bench, table, traffic

pytestmark = pytest.mark.lab
PACKETS = int(os.environ.get("HOSTINT_PATH_PACKETS", "100000"))
# of the flows in per cent: the share of the packets
SHARES = {100: 0.5, 25: 0.25, 1: 0.25}
# a slot is one of 65,536: now and then another packet takes it while its packet is inside the node
MISSED_SHARE, MISSED_ALWAYS = 0.0001, 2
# acknowledgements, background, and what is sent until the senders know that it is enough
RECORDS_PER_CPU = 200_000 + 6 * PACKETS
BUILD = Path(__file__).parents[2] / "build"
COLUMNS = ("packets", "watched", "matched", "false", "unverified", "unresolved")


@dataclasses.dataclass(frozen=True)
class Run:
    """One test of the matrix."""

    path: table.Path
    version: int
    name: str
    kind: traffic.Kind
    percent: int

    @property
    def target(self) -> int:
        return int(PACKETS * SHARES[self.percent])

    @property
    def id(self) -> str:
        return f"{self.path.name}-ipv{self.version}-{self.name}-{self.percent}pct"


RUNS = [
    Run(path, version, name, kind, percent)
    for path in table.PATHS
    for version in (4, 6)
    for name, kind in path.kinds
    for percent in SHARES
]


@pytest.fixture(scope="module")
def lab_bench(tmp_path_factory) -> Iterator[bench.Bench]:
    made = bench.Bench(tmp_path_factory.mktemp("paths"), RECORDS_PER_CPU)
    yield made
    made.close()


@pytest.fixture(scope="module")
def stage(request, lab_bench) -> Iterator[bench.Stage]:
    with lab_bench.stage(request.param) as built:
        yield built


@pytest.fixture(scope="module")
def talking(request, stage) -> Iterator[traffic.Traffic]:
    with stage.talking(request.param) as running:
        yield running


@pytest.fixture(scope="module")
def rows(pytestconfig) -> Iterator[list[dict]]:
    """What was found, for people: a table at the end, and build/paths.json."""
    found: list[dict] = []
    yield found
    BUILD.mkdir(exist_ok=True)
    (BUILD / "paths.json").write_text(json.dumps(found, indent=1))
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + _table(found))


def _table(rows: list[dict]) -> str:
    """One line for each way, IP version and kind, all shares together."""
    sums: dict[tuple, dict[str, int]] = {}
    for row in rows:
        line = sums.setdefault(
            (row["path"], row["version"], row["kind"]), dict.fromkeys(COLUMNS, 0)
        )
        for column in COLUMNS:
            line[column] += row[column]
    lines = [f"{'path':24}{'':6}{'':6}" + "".join(f"{column:>11}" for column in COLUMNS)]
    for (path, version, kind), line in sums.items():
        line["matched"] = f"{100 * line['matched'] / max(line['watched'], 1):.3f}%"
        cells = "".join(f"{line[column]:>11}" for column in COLUMNS)
        lines.append(f"{path:24}{f'IPv{version}':6}{kind:6}{cells}")
    return "\n".join(lines)


def _row(run: Run, result: bench.Result) -> dict:
    found = result.judgement
    ways = [way for way in found.due if way in run.path.claims]
    return {
        "path": run.path.name,
        "version": run.version,
        "kind": run.name,
        "percent": run.percent,
        "packets": found.packets,
        "watched": sum(found.due[way] for way in ways),
        "matched": sum(found.matched[way] for way in ways),
        "false": found.false_reports,
        "tolerated": sum(found.false[reason] for reason in run.path.tolerates),
        "unverified": result.counted["unverified"],
        "unresolved": result.counted["unresolved"] + result.counted["pending"],
        "by way": {way: [found.matched[way], found.due[way]] for way in ways},
    }


@pytest.mark.parametrize(
    ("run", "stage", "talking"),
    [pytest.param(run, run.path, run.version, id=run.id) for run in RUNS],
    indirect=["stage", "talking"],
)
def test_nothing_watched_is_missed_and_nothing_is_made_up(run, stage, talking, rows):
    result = stage.run(talking, run.kind, run.version, run.percent, run.target)
    rows.append(_row(run, result))
    _assert_nothing_made_up(run, result)
    _assert_claims(run, result)
    _assert_counts(result)


def _assert_nothing_made_up(run: Run, result: bench.Result) -> None:
    found = result.judgement
    assert {r: n for r, n in found.false.items() if n and r not in run.path.tolerates} == {}


def _assert_claims(run: Run, result: bench.Result) -> None:
    found = result.judgement
    assert found.packets >= run.target
    for way, due in found.due.items():
        missed = due - found.matched[way] - _excused(way, result.counted)
        claim = run.path.claim(way, run.version, run.name)
        if claim == table.ALL:
            assert due
            assert missed <= max(MISSED_ALWAYS, MISSED_SHARE * due), (way, due)
        elif claim == table.NONE:
            assert due
            assert found.matched[way] == 0


def _excused(way: str, counted: dict[str, int]) -> int:
    """With one observation point every latency is the same: a later report from another CPU suppresses an earlier one.

    And what no socket took is told as a drop.
    """
    if way not in ("sent", "arrived"):
        return 0
    return counted["suppressed"] + (counted["dropped"] if way == "arrived" else 0)


def _assert_counts(result: bench.Result) -> None:
    """What was watched is what was in a rule, and each of it has one outcome; none was lost for want of room."""
    found, counted = result.judgement, result.counted
    assert counted["ring_full"] == 0
    # a report that is false has taken the place of another packet
    least, most = found.watched - found.false_reports, found.watched + found.false_reports
    assert least <= counted["watched"] <= most + counted["suppressed"]
    for identity in result.identities:
        assert identity.watched_difference == 0
        assert identity.drops_difference == 0


# what is asked of a packet that has the address of another, and what would be if it were not
_ASKS_TAG = {"\tif (tc_index == slot->tag)\n\t\treturn PROOF_TAG;\n": "\treturn PROOF_TAG;\n"}
_ASKS_PRINT = {"one->print == other->print": "true"}
_TAGS_DIFFER = {"#define TAG_TIME 0x3fff": "#define TAG_TIME 0"}


def _without(tmp_path: Path, changes: dict[str, str]) -> Path:
    """The programs without some of the proofs that a packet is the one that has left the slot."""
    copied = Path(shutil.copytree(loader.default_bpf_dir(), tmp_path / "bpf"))
    slot = copied / "slot.h"
    text = slot.read_text()
    for asked, not_asked in changes.items():
        assert text.count(asked) == 1
        text = text.replace(asked, not_asked)
    slot.write_text(text)
    return copied


@contextlib.contextmanager
def _talking_on(
    tmp_path: Path, name: str, bpf_dir: Path
) -> Iterator[tuple[bench.Stage, traffic.Traffic]]:
    """A path with other programs, and IPv4 traffic on it."""
    path = next(path for path in table.PATHS if path.name == name)
    made = bench.Bench(tmp_path, RECORDS_PER_CPU, bpf_dir)
    try:
        with made.stage(path) as stage, stage.talking(4) as talking:
            yield stage, talking
    finally:
        made.close()


def test_an_address_alone_would_make_up_thousands(tmp_path):
    bpf_dir = _without(tmp_path, _ASKS_TAG | _ASKS_PRINT)
    with _talking_on(tmp_path, "routed", bpf_dir) as (stage, talking):
        result = stage.run(talking, traffic.UDP, 4, 25, PACKETS)
    assert result.judgement.false["another arrival"] > PACKETS / 100


def test_of_drops_whose_tags_are_the_same_by_chance_the_print_tells_nearly_all(tmp_path):
    """Clones that waited at a raw socket die by the thousand: each has a tag, and an address that was another packet's.

    One tag in 16,384 is the same by chance; here all are, and without a look at the print hundreds of drops are made up.
    """
    with _talking_on(tmp_path, "sctp", _without(tmp_path, _TAGS_DIFFER)) as (stage, talking):
        result = stage.run(talking, traffic.SCTP, 4, 25, PACKETS // 4)
    assert result.judgement.packets >= PACKETS // 4
    dropped = [identity.counters["dropped"] for identity in result.identities]
    assert sum(dropped) < 30, dropped
