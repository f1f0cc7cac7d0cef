# SPDX-License-Identifier: Apache-2.0
"""`hostint-agent standalone` in a node of the lab."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from hostint_agent import counters, loader, unload
from tests.lab.topology import Lab, Node

_READY_S = 60.0
_HTTP = "127.0.0.1:9464"


class LabAgent:
    """An agent process; `objects` is the YAML it is given, `options` more of its command line."""

    def __init__(
        self,
        lab: Lab,
        node: Node,
        objects: str,
        *options: str,
        command: Sequence[str] = (sys.executable, "-m", "hostint_agent"),
    ) -> None:
        self.node = node
        self.command = command
        self._directory = Path(tempfile.mkdtemp(prefix="hostint-lab-"))
        self.file = self._directory / "objects.yaml"
        self.file.write_text(objects)
        self.log = self._directory / "agent.log"
        self.pin_dir = Path(f"/sys/fs/bpf/{node.namespace.name}")
        self.bpf_dir = loader.default_bpf_dir()
        self.options = options
        self._process: subprocess.Popen[str] | None = None
        lab.on_exit(self.remove)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Start it and wait until it is ready."""
        command = [*self.command, "standalone", str(self.file)]
        command += ["--pin-dir", str(self.pin_dir), "--bpf-dir", str(self.bpf_dir)]
        command += ["--state-dir", str(self._directory)]
        command += ["--node", self.node.namespace.name, "--node-id", self.node.address]
        command += ["--http", _HTTP, "--keep", "--log-format", "json", *self.options]
        before = self._times_replaced()
        with self.log.open("a") as log:
            self._process = self.node.namespace.popen(*command, stdout=log, stderr=log)
        self._wait_ready(before)
        return self

    def _times_replaced(self) -> int:
        return self.log.read_text().count("rules replaced") if self.log.exists() else 0

    def _wait_ready(self, before: int) -> None:
        deadline = time.monotonic() + _READY_S
        process = self._process
        assert process
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the agent ended: {self.log.read_text()[-2000:]}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                if self.get("/readyz").strip() == "ok" and self._times_replaced() > before:
                    return
            time.sleep(0.05)
        raise TimeoutError(
            f"the agent is not ready after {_READY_S} s: {self.log.read_text()[-2000:]}"
        )

    def get(self, path: str) -> str:
        """Ask its HTTP server."""
        url = f"http://{_HTTP}{path}"

        def ask() -> str:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read().decode()

        return self.node.namespace.inside(ask)

    def change(self, objects: str) -> None:
        """Give it other objects, and wait until they are live."""
        before = self._times_replaced()
        fresh = self.file.with_suffix(".new")
        fresh.write_text(objects)
        os.replace(fresh, self.file)
        deadline = time.monotonic() + 10
        while self._times_replaced() == before:
            if time.monotonic() > deadline:
                raise TimeoutError(f"new objects not live: {self.log.read_text()[-1000:]}")
            time.sleep(0.02)

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process
        return self._process.pid

    @property
    def maps(self) -> Path:
        """Where its maps are pinned."""
        return loader.current(self.pin_dir, self.bpf_dir) / "maps"

    def identity(self, watchlist: str = "test") -> counters.Identity:
        """The accounting identity of one watchlist that is live."""
        kept = self._directory / f"last-good-{self.node.namespace.name}.json"
        place = json.loads(kept.read_text())["watchlists"]["names"][watchlist]
        return counters.Counters(self.maps).identity(place)

    def settled(self, watchlist: str = "test", timeout_s: float = 5.0) -> counters.Identity:
        """The identity once it holds; as it is at the time-out if it does not."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.identity(watchlist)
            balanced = not found.watched_difference and not found.drops_difference
            if balanced or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, as a crash would end it; the datapath stays."""
        assert self._process
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM and wait; its exit status."""
        if self._process is None or self._process.poll() is not None:
            return self._process.returncode if self._process else 0
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(15)

    def remove(self) -> None:
        """Stop it, and remove its datapath, its log and its state."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.stop()
        if self._process and self._process.poll() is None:
            self.kill()
        try:
            self.node.namespace.inside(lambda: unload.unload(self.pin_dir))
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)
