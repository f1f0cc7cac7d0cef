# SPDX-License-Identifier: Apache-2.0
"""The way to a collector: it is seen to be there, and what is wrong with it is told."""

from pathlib import Path

import pytest

from hostint_agent import command_line, last_good, node_rules
from hostint_agent.doctor import collector_checks, finding
from hostint_api import NodeConfigSpec
from tests.agent.cable import FAR, FAR6
from tests.agent.doctor.findings import examine, fails, is_ok, warns
from tests.agent.nobody import NOBODY
from tests.lab.namespace import Namespace, ip


def reached(near: Namespace, text: str, tmp_path: Path) -> finding.Finding:
    given = [command_line.parse_collector(text)]
    found = the_one(near.inside(lambda: collector_checks.check(given, tmp_path, "a")))
    assert found.check == f"collector {text}"
    return found


def the_one(findings: list[finding.Finding]) -> finding.Finding:
    assert len(findings) == 1
    return findings[0]


@pytest.mark.lab
def test_a_collector_is_reached_over_an_interface_from_an_address(near, tmp_path):
    is_ok(
        reached(near, f"{FAR}:32766", tmp_path),
        f"{FAR}:32766 over eth0 from 10.98.0.1, MTU 1500, needed are 220",
    )
    is_ok(
        reached(near, f"[{FAR6}]:32766", tmp_path),
        f"[{FAR6}]:32766 over eth0 from fd98::1, MTU 1500, needed are 240",
    )


@pytest.mark.lab
@pytest.mark.parametrize("text", ["192.0.2.9:5000", "[2001:db8::9]:5000"])
def test_a_collector_without_a_route_fails_and_is_named(near, tmp_path, text):
    found = reached(near, text, tmp_path)
    fails(found, f"{text}: Network is unreachable", "add a route to")
    ip(
        f"-n {near.name} route add prohibit 192.0.2.0/24",
        f"-n {near.name} route add blackhole 2001:db8::/32",
    )
    fails(reached(near, text, tmp_path), text, "add a route to")


@pytest.mark.lab
def test_a_small_mtu_of_the_interface_or_of_the_path_is_a_warning(near, tmp_path):
    ip(f"-n {near.name} route add 203.0.113.0/24 via {FAR} mtu lock 219")
    found = reached(near, "203.0.113.9:5000", tmp_path)
    warns(found, "MTU 219: the biggest report is a packet of 220 bytes", "eth0", "snapLength")
    ip(f"-n {near.name} link set eth0 mtu 220")
    is_ok(reached(near, f"{FAR}:5000", tmp_path), "MTU 220")
    ip(f"-n {near.name} link set eth0 mtu 219")
    warns(reached(near, f"{FAR}:5000", tmp_path), "MTU 219", "in fragments")


@pytest.mark.parametrize(("address", "needed"), [("192.0.2.9", 220), ("2001:db8::9", 240)])
def test_what_is_needed_is_a_report_and_its_headers(address, needed):
    destination = node_rules.Destination("a", address, 5000, 0)
    way = lambda mtu: collector_checks.Way("eth0", "source", mtu)  # noqa: E731
    is_ok(collector_checks.fits(destination, address, way(needed)))
    warns(collector_checks.fits(destination, address, way(needed - 1)), str(needed))


@pytest.mark.lab
def test_a_name_that_cannot_be_looked_up_fails(near, tmp_path):
    text = "collector.invalid:5000"
    fails(reached(near, text, tmp_path), "collector.invalid: ", "correct the name")
    fails(reached(near, f"{'a' * 70}:1", tmp_path), "label too long", "correct the name")
    is_ok(reached(near, "localhost:5000", tmp_path), "over lo from")


def keep(directory: Path, node: str, *addresses: str) -> None:
    collectors = [
        {"name": f"of-{address[:3]}", "address": address, "port": 5000, "dscp": 46}
        | {"format": "TelemetryReportV05", "snapLength": 128, "reportsPerSecond": 0}
        for address in addresses
    ]
    spec = NodeConfigSpec.model_validate({"nodeID": 1, "collectors": collectors})
    nothing = node_rules.Indexes()
    good = last_good.LastGood(spec, 1, nothing, nothing)
    last_good.Keeper(directory, node).save(good)


@pytest.mark.lab
def test_collectors_of_the_last_configuration_are_looked_at_unless_others_are_given(near, tmp_path):
    keep(tmp_path, "node-1", FAR, "192.0.2.9", FAR6)
    options = ("--state-dir", tmp_path, "--node", "node-1")
    found = examine(*options, before=near.command())
    is_ok(found["collector of-10."], f"{FAR}:5000 over eth0")
    is_ok(found["collector of-fd9"], f"[{FAR6}]:5000 over eth0")
    fails(found["collector of-192"], "192.0.2.9:5000: Network is unreachable")
    found = examine(*options, "--collector", "127.0.0.1:1", before=near.command())
    assert [check for check in found if check.startswith("collector")] == ["collector 127.0.0.1:1"]


def test_where_no_collector_is_known_it_is_told_why(tmp_path):
    check = lambda node: the_one(collector_checks.check([], tmp_path, node))  # noqa: E731
    warns(check("a"), f"none is known: {tmp_path} keeps no configuration of node a", "--collector")
    keep(tmp_path, "a")
    warns(check("a"), "the last configuration of node a has none")
    warns(check("b"), "no usable configuration of node b, but last-good-a.json", "--node")
    (tmp_path / "last-good-b.json").write_text("{")
    warns(check("b"), "no usable configuration of node b, but")
    warns(the_one(collector_checks.check([], tmp_path / "none", "a")), "none is known")


@pytest.mark.bpf
def test_a_state_directory_that_may_not_be_read_is_a_failure(tmp_path):
    tmp_path.chmod(0o700)
    found = examine("--state-dir", tmp_path, before=NOBODY)
    fails(found["collectors"], f"{tmp_path}: Permission denied", "run doctor as root")
