# SPDX-License-Identifier: Apache-2.0
"""The command as a user meets it: what it prints, how it ends, and what it leaves behind."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hostint_agent import __main__ as command
from hostint_agent import bpf_calls, loader
from tests.agent.test_standalone import COLLECTOR, files, watchlist

COMMAND = [sys.executable, "-m", "hostint_agent"]


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def pin_dir() -> Iterator[Path]:
    directory = Path(f"/sys/fs/bpf/hostint-main-{os.getpid()}-{time.monotonic_ns()}")
    yield directory
    # the pins are all that holds the namespace's programs
    for path in (directory / "links", *loader.builds(directory), directory):
        shutil.rmtree(path, ignore_errors=True)


class Running:
    """`hostint-agent standalone` in a network namespace of its own."""

    def __init__(
        self,
        tmp_path: Path,
        pin_dir: Path,
        *options: str,
        command: Sequence[str] = COMMAND,
        collector: str = COLLECTOR,
    ) -> None:
        self.paths = files(tmp_path, collector, watchlist())
        self.log = tmp_path / "log"
        arguments = ["standalone", str(self.paths[0]), "--pin-dir", str(pin_dir)]
        arguments += ["--state-dir", str(tmp_path / "state"), "--node-id", "1", *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
                + [*command, *arguments],
                stdout=log,
                stderr=log,
            )

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, float]:
        """Exit status, and how long it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(30), time.monotonic() - began


@contextlib.contextmanager
def running(tmp_path: Path, pin_dir: Path, *options: str, **more: Any) -> Iterator[Running]:
    agent = Running(tmp_path, pin_dir, *options, **more)
    try:
        agent.wait_for("rules replaced")
        yield agent
    finally:
        if agent.process.poll() is None:
            agent.process.kill()
            agent.process.wait()


def test_no_command_is_wrong_usage():
    ended = run()
    assert ended.returncode == 2
    assert "usage: hostint-agent" in ended.stderr


@pytest.mark.parametrize(
    "command", ["run", "standalone", "check", "doctor", "status", "unload", "counters"]
)
def test_every_command_has_help(command):
    ended = run(command, "--help")
    assert ended.returncode == 0
    assert ended.stdout.startswith(f"usage: hostint-agent {command}")


def test_an_agent_does_not_pay_for_doctor_and_status_with_its_memory():
    code = (
        "import sys; from hostint_agent import __main__ as command, cluster;"
        "command._COMMANDS['run'] = lambda options: print(*sys.modules);"
        "command.main(['run'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ended.stdout.split()
    assert {"hostint_agent.cluster", "hostint_agent.attach"} <= set(loaded)
    beyond = ("hostint_agent.doctor", "hostint_agent.status", "hostint_agent.pinned")
    assert [name for name in loaded if name.startswith(beyond)] == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--http", "nonsense"], "'nonsense' is not HOST:PORT or none"),
        (["--health", "nonsense"], "'nonsense' is not HOST:PORT or none"),
        (["--http-allow", "10.0.0.0/8,10.0.0.1/8"], "'10.0.0.1/8' is not a CIDR without host bits"),
        (["--http-allow", "10.0.0.0/255.0.0.0"], "'10.0.0.0/255.0.0.0' is not a CIDR"),
        (["--http-allow", "pods"], "'pods' is not a CIDR"),
        (["--node-id", "x"], "node id 'x' is not 0..4294967295 or an IPv4 address"),
        (["--attach", "xdp"], "invalid choice: 'xdp'"),
    ],
)
def test_a_wrong_option_is_told(options, words):
    ended = run("standalone", "file", *options)
    assert ended.returncode == 2
    assert words in ended.stderr


@pytest.mark.bpf
def test_agent_that_ends_since_another_has_its_directory_unloads_nothing_of_that(tmp_path, pin_dir):
    with running(tmp_path, pin_dir, "--http", "none") as agent:
        removed = pin_dir.with_name(f"{pin_dir.name}-removed")
        pin_dir.rename(removed)
        pin_dir.mkdir()
        theirs = pin_dir / "0123456789abcdef"
        theirs.mkdir()
        descriptor = os.open(pin_dir, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            assert agent.process.wait(30) == 1
        finally:
            os.close(descriptor)
            for path in (removed / "links", *loader.builds(removed), removed):
                shutil.rmtree(path, ignore_errors=True)
        assert list(pin_dir.iterdir()) == [theirs]
        assert "datapath not unloaded" in agent.log.read_text()


@pytest.mark.bpf
def test_agent_that_locked_its_directory_again_unloads_it(tmp_path, pin_dir):
    with running(tmp_path, pin_dir, "--http", "none") as agent:
        aside = pin_dir.with_name(f"{pin_dir.name}-removed")
        pin_dir.rename(aside)
        shutil.rmtree(aside)
        agent.wait_for("pins were removed below the running agent")
        assert agent.stop()[0] == 0
        assert "datapath unloaded" in agent.log.read_text()
        assert not pin_dir.exists()


def test_a_bad_file_ends_the_start_before_anything_is_loaded(tmp_path, pin_dir):
    paths = files(tmp_path, COLLECTOR, watchlist(interval="1ms"))
    ended = run("standalone", *paths, "--pin-dir", pin_dir, "--http", "none")
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"hostint-agent: {paths[0]}: IntWatchlist shop: spec.report")
    assert not pin_dir.exists()


def test_a_pin_directory_outside_of_a_bpffs_is_refused(tmp_path):
    paths = files(tmp_path, COLLECTOR, watchlist())
    ended = run("standalone", *paths, "--pin-dir", tmp_path / "pins", "--http", "none")
    assert ended.returncode == 1
    assert "is not in a bpffs; choose one below /sys/fs/bpf" in ended.stderr


@pytest.mark.bpf
def test_without_root_the_message_says_what_is_needed(tmp_path):
    paths = files(tmp_path, COLLECTOR, watchlist())
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *COMMAND]
    command += ["standalone", str(paths[0]), "--pin-dir", f"/sys/fs/bpf/none-{os.getpid()}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    shutil.rmtree(f"/sys/fs/bpf/none-{os.getpid()}", ignore_errors=True)
    assert ended.returncode == 1
    assert "needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (run as root" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.bpf
def test_unload_of_nothing_succeeds(pin_dir):
    ended = run("unload", "--pin-dir", pin_dir)
    assert (ended.returncode, ended.stdout) == (0, "nothing of ours is loaded\n")


@pytest.mark.bpf
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["term", "int"])
def test_standalone_ends_within_two_seconds_and_leaves_nothing(tmp_path, pin_dir, number):
    with running(tmp_path, pin_dir, "--http", "none") as agent:
        assert (pin_dir / "links" / "kfree_skb").exists()
        status, seconds = agent.stop(number)
        assert status == 0, agent.log.read_text()
        assert seconds < 2
        assert not pin_dir.exists()


# an agent whose ports another program has, until a file is there
_PORTS_TAKEN = textwrap.dedent(
    """
    import socket, sys, threading, time
    from pathlib import Path
    from hostint_agent import __main__, http_server
    http_server._LAST_RETRY_S = 0.2
    others = [socket.create_server(("127.0.0.1", port)) for port in (9464, 9465)]
    released = Path(sys.argv.pop(1))
    def release():
        while not released.exists():
            time.sleep(0.05)
        for other in others:
            other.close()
    threading.Thread(target=release, daemon=True).start()
    sys.exit(__main__.main())
    """
)


@pytest.mark.bpf
def test_ports_in_use_cost_the_pages_and_not_the_reports(tmp_path, pin_dir):
    released = tmp_path / "released"
    command = [sys.executable, "-c", _PORTS_TAKEN, str(released)]
    options = ("--health", "127.0.0.1:9465", "--log-format", "json")
    with running(tmp_path, pin_dir, *options, command=command) as agent:
        time.sleep(1)
        released.touch()
        agent.wait_for(
            '"pages": "metrics", "address": "127.0.0.1:9464", "event": "http port served'
        )
        agent.wait_for('"pages": "health", "address": "127.0.0.1:9465", "event": "http port served')
        assert agent.stop()[0] == 0, agent.log.read_text()
    assert agent.log.read_text().count("http port not served, retrying") == 2


@pytest.mark.bpf
def test_standalone_starts_without_dns_and_says_so(tmp_path, pin_dir):
    """In a network namespace without any way out."""
    named = COLLECTOR.replace("192.0.2.9", "collector.example")
    options = ("--http", "none", "--log-format", "json")
    with running(tmp_path, pin_dir, *options, collector=named) as agent:
        told = [json.loads(line) for line in agent.log.read_text().splitlines()]
        (missing,) = [entry for entry in told if entry["event"].startswith("collector name not")]
        assert (missing["name"], missing["level"]) == ("collector.example", "error")
        status, seconds = agent.stop()
        assert (status, seconds < 2) == (0, True), agent.log.read_text()


@pytest.mark.bpf
def test_standalone_makes_its_first_rules_live_once(tmp_path, pin_dir):
    with running(tmp_path, pin_dir, "--http", "none"):
        word = bpf_calls.Map.open(loader.current(pin_dir) / "maps" / "classifier_generation")
        assert word.lookup(bytes(4)) == (1).to_bytes(8, sys.byteorder)


@pytest.mark.bpf
def test_a_kept_datapath_stays_and_is_unloaded_on_demand(tmp_path, pin_dir):
    with running(tmp_path, pin_dir, "--http", "none", "--keep") as agent:
        assert agent.stop()[0] == 0
    assert (pin_dir / "links" / "kfree_skb").exists()
    ended = run("unload", "--pin-dir", pin_dir)
    assert ended.returncode == 0
    assert {"link kfree_skb", "program drop", "map slots"} <= set(ended.stdout.splitlines())
    assert not pin_dir.exists()


@pytest.mark.bpf
def test_a_second_agent_is_refused_and_the_first_one_keeps_its_datapath(tmp_path, pin_dir):
    with running(tmp_path, pin_dir, "--http", "none") as agent:
        for command in (("standalone", agent.paths[0], "--http", "none"), ("unload",)):
            ended = run(*command, "--pin-dir", pin_dir)
            assert ended.returncode == 1
            assert "is in use by another hostint-agent" in ended.stderr
        assert (pin_dir / "links" / "kfree_skb").exists()
        assert agent.process.poll() is None


@pytest.mark.bpf
def test_sigterm_while_it_starts_leaves_nothing(tmp_path, pin_dir):
    agent = Running(tmp_path, pin_dir, "--http", "none")
    deadline = time.monotonic() + 30
    while not list(pin_dir.glob("*/maps")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert agent.stop()[0] == 0, agent.log.read_text()
    assert "Traceback" not in agent.log.read_text()
    assert not pin_dir.exists()


def test_the_lock_of_a_directory_that_was_removed_meanwhile_is_no_lock(pin_dir, monkeypatch):
    """Whoever had it removed the directory and a third made it anew: both would believe to be alone."""
    pin_dir.mkdir()
    lock = fcntl.flock

    def slow(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(command.fcntl, "flock", lock)
        pin_dir.rmdir()
        pin_dir.mkdir()
        lock(descriptor, operation)

    monkeypatch.setattr(command.fcntl, "flock", slow)
    assert command._locked(pin_dir) is None
    descriptor = command._locked(pin_dir)
    assert descriptor is not None
    assert command._locked(pin_dir) is None
    os.close(descriptor)


# an agent of which a function fails, once a file is there, with what no one expects there
_FAULTY = textwrap.dedent(
    """
    import importlib, sys
    from pathlib import Path
    from hostint_agent import __main__
    module, owner, name, broken = (sys.argv.pop(1) for _ in range(4))
    owner = getattr(importlib.import_module(module), owner)
    function = getattr(owner, name)
    def failing(*arguments):
        if Path(broken).exists():
            raise LookupError("nobody thought of this")
        return function(*arguments)
    setattr(owner, name, failing)
    sys.exit(__main__.main())
    """
)


@pytest.mark.bpf
@pytest.mark.parametrize(
    ("thread", "function"),
    [
        ("attach", ("hostint_agent.attach", "TcxHooks", "in_place")),
        ("export", ("hostint_agent.exporter", "_Waiter", "wait")),
    ],
    ids=["attach", "export"],
)
def test_an_agent_of_which_a_thread_has_ended_ends(tmp_path, pin_dir, thread, function):
    """It would go on saying that all is well, and nobody would attach to new pods, or send."""
    broken = tmp_path / "broken"
    command = [sys.executable, "-c", _FAULTY, *function, str(broken)]
    options = ("--http", "none", "--log-format", "json", "--attach", "tcx")
    with running(tmp_path, pin_dir, *options, command=command) as agent:
        broken.touch()
        assert agent.process.wait(20) == 1
    told = [json.loads(line) for line in agent.log.read_text().splitlines()]
    (ended,) = [entry for entry in told if entry["event"] == "thread ended"]
    assert (ended["thread"], ended["error"]) == (thread, "nobody thought of this")
    assert "LookupError" in ended["exception"]
    (failed,) = [entry for entry in told if entry["event"] == "agent failed"]
    assert failed["error"] == f"the {thread} thread has ended"
    assert told[-2]["event"] == "datapath unloaded"
