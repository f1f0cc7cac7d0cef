# SPDX-License-Identifier: Apache-2.0
"""The command line, what the probes are told, and that only the holder of the lease writes."""

import asyncio
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest

from hostint_operator import __main__ as program
from hostint_operator import reconcile
from hostint_operator.kube import client


def test_options_win_over_the_environment_and_the_environment_over_defaults() -> None:
    environment = {
        "HOSTINT_NAMESPACE": "env",
        "HOSTINT_HTTP": "127.0.0.1:1",
        "HOSTINT_LEADER_ELECTION": "no",
    }
    read = program.parse(["--namespace", "option", "--kubeconfig", "/k"], environment)
    assert read.namespace == "option"
    assert (read.http_host, read.http_port) == ("127.0.0.1", 1)
    assert read.leader_election is False
    assert read.kubeconfig == pathlib.Path("/k")
    assert program.parse([], {}).namespace == "hostint-system"
    assert program.parse(["--leader-election"], environment).leader_election is True


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("NAMESPACE", "n", "namespace", "n"),
        ("LOG_LEVEL", "debug", "log_level", "debug"),
        ("HTTP", "[::1]:1", "http_host", "::1"),
        ("IDENTITY", "i", "identity", "i"),
        ("LEADER_ELECTION", "false", "leader_election", False),
        ("KUBECONFIG", "/k", "kubeconfig", pathlib.Path("/k")),
    ],
)
def test_every_option_can_be_given_in_the_environment(
    name: str, value: str, field: str, expected: object
) -> None:
    assert getattr(program.parse([], {}), field) != expected
    assert getattr(program.parse([], {f"HOSTINT_{name}": value}), field) == expected


@pytest.mark.parametrize("value", ["8080", "host:", "host:http", "host:70000", ":x"])
def test_an_http_address_without_a_port_is_refused(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        program.parse(["--http", value], {})
    assert refused.value.code == 2
    assert f"--http '{value}' is not HOST:PORT" in capsys.readouterr().err


def test_without_a_way_to_the_api_server_it_says_so_and_exits_with_2(
    tmp_path: pathlib.Path,
) -> None:
    missing = tmp_path / "missing.conf"
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "hostint_operator",
            "--kubeconfig",
            str(missing),
            "--http",
            "127.0.0.1:0",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 2
    assert f"kubeconfig '{missing}'" in ran.stderr
    assert "Traceback" not in ran.stderr


class Applied:
    """An API that takes every apply."""

    async def apply(self, path: str, intent: dict[str, Any], manager: str) -> dict[str, Any]:
        return intent


@pytest.mark.parametrize(
    ("option", "leads", "writes"),
    [
        ("--leader-election", False, False),
        ("--leader-election", True, True),
        ("--no-leader-election", False, True),
    ],
)
def test_only_the_holder_of_the_lease_writes(
    monkeypatch: pytest.MonkeyPatch, option: str, leads: bool, writes: bool
) -> None:
    async def work() -> None:
        operator = program.Operator(Applied(), program.parse([option], {}))  # type: ignore[arg-type]
        monkeypatch.setattr(operator.lease, "may_write", lambda: leads)
        apply = operator.reconciler._apply("node_config", "/path", {"a": 1}, "manager")
        leader = [m for m in operator._gauges() if m.name == "hostint_operator_leader"]
        assert [s.value for m in leader for s in m.samples] == [float(writes)]
        if writes:
            assert await apply == {"a": 1}
            return
        with pytest.raises(client.ApiError, match="does not hold the lease"):
            await apply

    asyncio.run(work())


def operator() -> program.Operator:
    return program.Operator(Applied(), program.parse([], {}))  # type: ignore[arg-type]


def test_operator_that_is_stuck_is_not_alive() -> None:
    """In one write, or in the sweep; a write or a sweep that takes its time is neither."""

    async def work() -> None:
        made = operator()
        made._swept.set()
        key, now = reconcile.Key("node", "n1"), time.monotonic()
        made.reconciler.busy_since[key] = now - program.STUCK_S + 10
        made._swept_at = now - program.STUCK_S + 10
        assert made._dead() == []
        made.reconciler.busy_since[key] = now - program.STUCK_S - 10
        made._swept_at = now - program.STUCK_S - 20
        assert made._dead() == [
            "node n1 is being worked on for 130 s",
            "no sweep for 140 s",
        ]

    asyncio.run(work())


def test_operator_is_ready_when_everything_is_known_and_watched() -> None:
    async def work() -> None:
        made = operator()
        everything = set(made._not_ready())
        lists = {f"{name} not listed yet" for name in made.observers.reflectors}
        assert everything == {*lists, "the custom resources are not served yet"}
        for reflector in made.observers.reflectors.values():
            reflector.synced.set()
        assert made._not_ready() == ["the custom resources are not served yet"]
        made._swept.set()
        assert made._not_ready() == ["not everything that is compiled from is known yet"]
        made._compiling = True
        assert made._not_ready() == ["the watch of the custom resources has not started"]
        made._kopf_ready.set()
        assert made._not_ready() == []

    asyncio.run(work())
