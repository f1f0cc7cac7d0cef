# SPDX-License-Identifier: Apache-2.0
"""Processes of `hostint-agent` that end by SIGKILL just before a chosen step of theirs.

A step is a bpf(2) command, a netlink request, a write to a table, a batch sent, a change below the pin directory, or a process
started. Every step of a process is written to its trace, so that a run that lives says where another one can die. The processes are
forked from one that has imported everything: they start at once, and what is killed is our code and not Python's importing.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.lab.namespace import Namespace

_WATCHED_EVENTS = frozenset({"os.rename", "os.mkdir", "os.rmdir", "os.remove", "subprocess.Popen"})


@dataclass(frozen=True)
class Step:
    """The `occurrence`th step of this name, from 1."""

    name: str
    occurrence: int


class Process:
    """One of them, from outside."""

    def __init__(self, pid: int, log: Path, trace: Path) -> None:
        self.pid = pid
        self.log = log
        self._trace = trace

    @property
    def alive(self) -> bool:
        """False once it has ended."""
        return Path(f"/proc/{self.pid}").exists()

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self, timeout_s: float = 60.0) -> None:
        """Wait for its end."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() > deadline:
                raise TimeoutError(self.log.read_text()[-2000:])
            time.sleep(0.002)

    def said(self, text: str, count: int = 1, timeout_s: float = 60.0) -> bool:
        """Wait until its log says this so often; False if it ended before."""
        deadline = time.monotonic() + timeout_s
        while self.log.read_text().count(text) < count:
            if not self.alive:
                return self.log.read_text().count(text) >= count
            if time.monotonic() > deadline:
                raise TimeoutError(self.log.read_text()[-2000:])
            time.sleep(0.005)
        return True

    def steps(self) -> list[Step]:
        """What it has done, or tried, so far."""
        seen: Counter[str] = Counter()
        found = []
        for name in self._trace.read_text().splitlines():
            seen[name] += 1
            found.append(Step(name, seen[name]))
        return found


class Nursery:
    """Makes processes in a network namespace; those that still live when it is left are killed."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self._made: list[Process] = []
        with (directory / "nursery.log").open("w") as log:
            self._parent = namespace.popen(
                sys.executable,
                *("-m", "tests.lab.mortal"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._made:
            if process.alive:
                process.kill()
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait(30)

    def start(self, *arguments: object, dies_at: Step | None = None) -> Process:
        """Run `hostint-agent` with these arguments."""
        self._count += 1
        log, trace = (self._directory / f"{self._count}.{name}" for name in ("log", "trace"))
        log.touch()
        trace.touch()
        order = {
            "arguments": [str(argument) for argument in arguments],
            "log": str(log),
            "trace": str(trace),
            "dies_at": [dies_at.name, dies_at.occurrence] if dies_at else None,
        }
        assert self._parent.stdin
        assert self._parent.stdout
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        process = Process(int(self._parent.stdout.readline()), log, trace)
        self._made.append(process)
        return process


# inside


class _Fate:
    """Counts the steps of this process and ends it before the chosen one."""

    def __init__(self, trace: str, dies_at: list[Any] | None) -> None:
        self._trace = os.open(trace, os.O_WRONLY | os.O_APPEND)
        self._dies_at = tuple(dies_at) if dies_at else None
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def step(self, name: str) -> None:
        with self._lock:
            self._seen[name] += 1
            os.write(self._trace, f"{name}\n".encode())
            if (name, self._seen[name]) == self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def before(self, module: object, function: str, name: Callable[..., str]) -> None:
        """Make every call of a function a step."""
        original = getattr(module, function)

        def stepping(*arguments: Any, **more: Any) -> Any:
            self.step(name(*arguments))
            return original(*arguments, **more)

        setattr(module, function, stepping)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _WATCHED_EVENTS:
            self.step(event)


def _kind(what: str) -> str:
    """The words of a bpf(2) command, without numbers and paths."""
    return "bpf " + re.sub(r"[/\d].*", "", what).strip()


def _run(order: dict[str, Any]) -> None:
    from hostint_agent import __main__ as command
    from hostint_agent import bpf_calls, netlink, senders, tables

    fate = _Fate(order["trace"], order["dies_at"])
    fate.before(bpf_calls, "bpf", lambda _, __, what: _kind(what))
    fate.before(netlink.Socket, "request", lambda *_: "netlink request")
    fate.before(tables.Tables, "_write", lambda _, name, *__: f"table {name}")
    fate.before(tables.Tables, "_flip", lambda *_: "flip")
    fate.before(senders.Sender, "send", lambda *_: "send")
    sys.addaudithook(fate.audit)
    sys.exit(command.main(order["arguments"]))


def _child(order: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _run(order)


def main() -> None:
    """Fork a process for every line that is read."""
    import hostint_agent.__main__  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            _child(json.loads(line))
        print(pid, flush=True)


if __name__ == "__main__":
    main()
