# SPDX-License-Identifier: Apache-2.0
"""`hostint-agent doctor` as a user meets it: its options, what it prints, and how it ends."""

import contextlib
import json
import os
import pty
import subprocess

import pytest

from hostint_agent import __main__ as hostint_agent
from hostint_agent import command_line, settings
from hostint_agent.doctor import command as doctor
from hostint_agent.doctor import finding
from tests.agent.doctor.findings import COMMAND, run


def wrong_usage(capsys, *options: str) -> str:
    """What is said of options that end the command with status 2."""
    with pytest.raises(SystemExit) as ended:
        hostint_agent.main(["doctor", *options])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("192.0.2.9:1", "192.0.2.9", 1), ("[fd00::9]:65535", "fd00::9", 65535), ("a.b:5", "a.b", 5)],
)
def test_a_collector_is_named_by_host_and_port(text, host, port):
    parsed = command_line.parse_collector(text)
    assert (parsed.name, parsed.address, parsed.port) == (text, host, port)


@pytest.mark.parametrize(
    "text", ["", "a", "a:", ":5", "a:0", "a:65536", "a:-1", "a:b", "fd00::9:5"]
)
def test_what_is_no_host_and_port_is_wrong_usage(text, capsys):
    assert f"'{text}' is not HOST:PORT" in wrong_usage(capsys, f"--collector={text}")


@pytest.mark.parametrize("option", ["--nonsense", "--attach=xdp", "--collector=x", "file"])
def test_wrong_usage_ends_with_2(option, capsys):
    assert "usage: hostint-agent" in wrong_usage(capsys, option)


_TOLD = [
    finding.ok("kernel", "Linux 6.18"),
    finding.warning("tcx", "none", "boot another"),
    finding.failure("drop tracepoint", "none", "boot yet another"),
    finding.failure("rings", "none", "boot"),
]


def test_the_text_has_a_line_each_and_what_to_do_on_a_second():
    assert doctor.as_text(_TOLD, colours=False).splitlines() == [
        "ok       kernel           Linux 6.18",
        "warning  tcx              none",
        "         do: boot another",
        "failure  drop tracepoint  none",
        "         do: boot yet another",
        "failure  rings            none",
        "         do: boot",
        "1 ok, 1 warning, 2 failures",
    ]
    assert doctor.as_text(_TOLD[:1], colours=False).splitlines()[-1] == "1 ok"


def test_colours_change_nothing_else():
    text = doctor.as_text(_TOLD, colours=True)
    for code in ("32", "33", "31"):
        assert f"\x1b[{code}m" in text
        text = text.replace(f"\x1b[{code}m", "")
    assert text.replace("\x1b[0m", "") == doctor.as_text(_TOLD, colours=False)


def test_json_is_an_array_of_objects_with_four_keys():
    told = json.loads(doctor.as_json(_TOLD))
    assert told[0] == {"check": "kernel", "result": "ok", "found": "Linux 6.18", "remedy": ""}
    assert [each["result"] for each in told] == ["ok", "warning", "failure", "failure"]


def on_a_terminal(*options: object, **variables: str) -> str:
    """What it prints on a terminal."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | variables
    process = subprocess.Popen(
        [*COMMAND, *map(str, options)], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 65536):
            printed += part
    os.close(ours)
    process.wait(60)
    return printed.decode()


@pytest.mark.parametrize(
    ("terminal", "variables", "wanted"),
    [(True, {}, True), (True, {"NO_COLOR": ""}, True), (True, {"NO_COLOR": "1"}, False), (False, {}, False)],
)  # fmt: skip
def test_colours_are_for_terminals_and_not_for_who_wants_none(terminal, variables, wanted):
    assert settings.wants_colours(terminal, variables) is wanted


@pytest.mark.bpf
def test_a_terminal_gets_colours():
    assert "\x1b[32mok     \x1b[0m  kernel" in on_a_terminal("--bpf-dir", "/none")
    assert "\x1b" not in on_a_terminal("--bpf-dir", "/none", NO_COLOR="1")
    assert "\x1b" not in run("--bpf-dir", "/none").stdout


@pytest.mark.bpf
def test_warnings_end_with_0_and_a_failure_with_1(tmp_path):
    options = ("--state-dir", tmp_path, "--http", "none")
    ended = run(*options)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1].endswith(" ok, 1 warning")
    ended = run(*options, "--bpf-dir", tmp_path)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.splitlines()[-1].endswith(" ok, 1 warning, 1 failure")


@pytest.mark.lab
def test_any_name_of_an_interface_can_be_printed(near, pin_dir):
    name = b"e\xff\x1b[31m"
    command = [b"nsenter", f"--net={near.path}".encode()]
    subprocess.run([*command, b"ip", b"link", b"set", b"eth0", b"down"], check=True)
    subprocess.run([*command, b"ip", b"link", b"set", b"eth0", b"name", name], check=True)
    assert json.loads(run("--json", "--pin-dir", pin_dir, before=near.command()).stdout)
    ended = run("--pin-dir", pin_dir, before=near.command())
    assert "Traceback" not in ended.stderr
    assert r"1 to watch: e\udcff\x1b[31m (pod)" in ended.stdout
