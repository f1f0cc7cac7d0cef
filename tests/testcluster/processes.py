# SPDX-License-Identifier: Apache-2.0
"""Start servers, keep their ids on disk, and end exactly those, also the ones that a killed run left behind."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class Processes:
    """Servers of one cluster: NAME.pid and NAME.log in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def start(
        self, name: str, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        """Start a server in a session of its own, so that Ctrl-C does not reach it."""
        with (self._directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
            )
        (self._directory / f"{name}.pid").write_text(f"{process.pid} {_started(process.pid)}")

    def stop(self, name: str, timeout_s: float = 5.0) -> None:
        """End a server if it is ours and still there."""
        path = self._directory / f"{name}.pid"
        if not path.exists():
            return
        pid, started = path.read_text().split()
        if _started(int(pid)) == started:
            for number, patience_s in ((signal.SIGTERM, timeout_s), (signal.SIGKILL, 5.0)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(pid), number)
                if _wait_gone(int(pid), patience_s):
                    break
        path.unlink()

    def log(self, name: str, characters: int = 2000) -> str:
        """The end of a server's log."""
        path = self._directory / f"{name}.log"
        return path.read_text(errors="replace")[-characters:] if path.exists() else ""


def _started(pid: int) -> str:
    """When a process was started, in clock ticks: with the pid, its identity. Empty: no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def _wait_gone(pid: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        if not _started(pid):
            return True
        time.sleep(0.05)
    return False


def wait_until(condition: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    """Poll a condition. Raises TimeoutError with what `what` says then."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what()}")
        time.sleep(0.1)
