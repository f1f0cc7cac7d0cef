# SPDX-License-Identifier: Apache-2.0
"""The command: what it prints, what it survives, how it ends."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hostint_collector import embedded

GOLDEN = Path(__file__).parents[1] / "report" / "golden"


def report(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text())


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start():
    started = []

    def run(*arguments: str) -> tuple[subprocess.Popen[str], int]:
        port = free_port()
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "hostint_collector",
                "--listen",
                f"127.0.0.1:{port}",
                *arguments,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child, port

    yield run
    for child in started:
        if child.poll() is None:
            child.kill()
        child.wait()


def send_until(child: subprocess.Popen[str], port: int, *datagrams: bytes) -> None:
    """Send again and again until the program has ended: it may not listen yet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        while child.poll() is None:
            for data in datagrams:
                sender.sendto(data, ("127.0.0.1", port))
            try:
                child.wait(0.2)
            except subprocess.TimeoutExpired:
                continue


def test_json_is_one_object_a_line_and_malformed_is_not_fatal(start):
    child, port = start("--output", "json", "--count", "30")
    send_until(child, port, b"not a report", report("v05-flow-tcp"), report("v05-drop-tcp"))
    lines = child.stdout.read().splitlines()
    kinds = {json.loads(line)["kind"] for line in lines}
    assert kinds == {"malformed", "flow", "drop"}
    assert child.returncode == 0
    assert "malformed" in child.stderr.read()


def test_a_signal_ends_it_with_a_summary_and_status_0(start):
    child, _ = start("--output", "table")
    assert child.stdout.readline().startswith("TIME")
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == 0
    assert child.stderr.read().startswith("0 reports")


def test_a_port_that_is_taken_is_told(start):
    with embedded.CollectorThread("127.0.0.1") as taken:
        result = subprocess.run(
            [sys.executable, "-m", "hostint_collector", "--listen", f"127.0.0.1:{taken.port}"],
            capture_output=True,
            text=True,
        )
    assert result.returncode == 1
    assert "Address already in use" in result.stderr


def test_a_listen_address_that_is_none_is_wrong_usage():
    result = subprocess.run(
        [sys.executable, "-m", "hostint_collector", "--listen", "32766"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert "'32766' is not HOST:PORT" in result.stderr


def test_the_embedded_collector_waits_for_a_record():
    with (
        embedded.CollectorThread("127.0.0.1") as collector,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        sender.sendto(report("v05-drop-tcp"), ("127.0.0.1", collector.port))
        assert collector.wait_for(lambda r: r["kind"] == "drop")["sequence"] == 2
        with pytest.raises(TimeoutError, match="1 others"):
            collector.wait_for(lambda r: r["kind"] == "queue", timeout_s=0.3)
