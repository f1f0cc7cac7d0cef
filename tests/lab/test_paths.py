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
RECORDS_PER_CPU = 300_000 + 9 * PACKETS
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
    assert {r: n for r, n in found.false.items() if n} == {}


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
    """What the host sends has one observation point: a later report from another CPU suppresses an earlier one."""
    return counted["suppressed"] if way == "sent" else 0


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


MOST_RUNS = 10
# what is asked of a packet that has the address of another
_ASKS_CONTENT = {
    "slot->fingerprint == scratch->fingerprint": "true",
    "!is_reversed(&scratch->key, &slot->key)": "true",
}


def _without(tmp_path: Path, changes: dict[str, str]) -> Path:
    """The programs without the proof that a packet is the one that has left the slot."""
    copied = Path(shutil.copytree(loader.default_bpf_dir(), tmp_path / "bpf"))
    main = copied / "int_host.c"
    text = main.read_text()
    for asked, not_asked in changes.items():
        assert text.count(asked) == 1
        text = text.replace(asked, not_asked)
    main.write_text(text)
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


def test_an_address_alone_would_make_up_hundreds(tmp_path):
    bpf_dir = _without(tmp_path, _ASKS_CONTENT)
    with _talking_on(tmp_path, "routed", bpf_dir) as (stage, talking):
        made_up = 0
        # how many in a run is up to where the kernel puts the next packet
        for _ in range(MOST_RUNS):
            result = stage.run(talking, traffic.UDP, 4, 25, PACKETS)
            made_up += result.judgement.false["another arrival"]
            if made_up > PACKETS / 1000:
                break
    assert made_up > PACKETS / 1000
