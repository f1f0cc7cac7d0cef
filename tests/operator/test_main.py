# SPDX-License-Identifier: Apache-2.0
"""The command line."""

import pathlib
import subprocess
import sys

import pytest

from hostint_operator import __main__ as program


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
