# SPDX-License-Identifier: Apache-2.0
"""delivery.c for tests: datagrams as fast as their receivers take them, and packets that die as fast as they can be made."""

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.lab.namespace import Namespace


class Delivery:
    """The program, compiled below a directory."""

    def __init__(self, directory: Path) -> None:
        self._program = directory / "delivery"
        source = Path(__file__).with_name("delivery.c")
        command = ["gcc", "-O2", "-Wall", "-Werror", "-o", self._program, source]
        subprocess.run(command, check=True)

    def send(
        self,
        source: Namespace,
        target: tuple[str, int],
        count: int,
        receivers: Sequence[Namespace],
        *options: str,
        size: int = 64,
    ) -> list[int]:
        """Send so many datagrams; how many each socket of the receivers got. Options are those of delivery.c."""
        places = ",".join(str(receiver.path) for receiver in receivers)
        words = ["send", source.path, *target, count, size, places, *options]
        done = subprocess.run(
            [self._program, *map(str, words)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"delivery: {done.stderr}")
        sent, *received = (int(word) for word in done.stdout.split())
        # fewer were sent if some were lost: then a receiver got fewer as well
        assert sent == count or min(received) < count
        return received

    @contextlib.contextmanager
    def wasting(self, source: Namespace, *addresses: str, cpu: int | None = None) -> Iterator[None]:
        """Send to port 9 of these addresses by turns, on one CPU or any, until the block is left."""
        pinned = [] if cpu is None else ["taskset", "-c", str(cpu)]
        process = subprocess.Popen([*pinned, self._program, "waste", source.path, *addresses])
        try:
            yield
        finally:
            process.kill()
            process.wait()
