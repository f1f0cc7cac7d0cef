# SPDX-License-Identifier: Apache-2.0
"""Records have the documented keys, and no others."""

import re
from pathlib import Path

import pytest

from hostint_collector import record, show

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "report" / "golden"
NAMES = ("v05-flow-tcp", "v05-flow-udp", "v05-drop-tcp", "v05-flow-ipv6", "v05-quirk-ihr-drop")


def of(name: str) -> record.Record:
    data = bytes.fromhex((GOLDEN / f"{name}.hex").read_text())
    return record.from_datagram(data, "192.0.2.1", 1_700_000_000_123_456_789)


def keys(value: record.Record, prefix: str = "") -> set[str]:
    found = set()
    for key, inside in value.items():
        found |= keys(inside, f"{key}.") if isinstance(inside, dict) else {prefix + key}
    return found


def test_every_key_is_documented_and_every_documented_key_exists():
    table = (ROOT / "docs" / "collector.md").read_text().split("## JSON keys")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    documented = {key for row in rows for key in re.findall(r"`([\w.]+)`", row)}
    malformed = record.from_datagram(b"?", "192.0.2.1", 0)
    assert set().union(*(keys(of(name)) for name in NAMES), keys(malformed)) == documented


@pytest.mark.parametrize(
    ("name", "kind"), [("v05-flow-tcp", "flow"), ("v05-drop-tcp", "drop"), ("v05-flow-udp", "flow")]
)
def test_kinds(name, kind):
    assert of(name)["kind"] == kind


def test_a_drop_has_its_reason_in_words_and_no_latency():
    drop = of("v05-drop-tcp")
    assert (drop["dropReason"], drop["dropReasonName"]) == (80, "denied by policy")
    assert "hopLatency" not in drop


def test_what_is_no_report_is_malformed_with_the_reason():
    broken = record.from_datagram(bytes(5), "192.0.2.1", 0)
    assert broken["kind"] == "malformed"
    assert "the fixed header has 12" in broken["reason"]


def test_table_lines_show_who_spoke_to_whom():
    line = show.table_line(of("v05-flow-ipv6"), coloured=False)
    assert "[fd00:10:244:1::a]:40001 > [fd00:10:244:2::14]:443 TCP" in line
    assert "87.7 us" in line
    assert "\x1b" not in line


def test_colours_are_for_terminals():
    assert "\x1b[31m" in show.table_line(of("v05-drop-tcp"), coloured=True)
