# SPDX-License-Identifier: Apache-2.0
"""One network namespace: run programs in it, and get sockets of it into this process."""

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
T = TypeVar("T")


class Namespace:
    """A network namespace by its name in /var/run/netns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path("/var/run/netns") / name

    def command(self, *arguments: str) -> list[str]:
        """A command line that runs in here. Not `ip netns exec`: that hides the bpffs."""
        return ["nsenter", f"--net={self.path}", *arguments]

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run a program and return what it prints; what it says on failure is in the exception."""
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    def popen(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        """Start a program."""
        return subprocess.Popen(self.command(*arguments), text=True, **more)

    def enter(self) -> None:
        """Move the calling thread in here, for good."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            if _LIBC.setns(handle, _CLONE_NEWNET):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(self.path))
        finally:
            os.close(handle)

    def inside(self, function: Callable[[], T]) -> T:
        """Call a function in a thread that is in here; sockets it makes stay here, whoever uses them."""
        result: list[T] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                self.enter()
                result.append(function())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of this namespace."""
        return self.inside(lambda: socket.socket(family, kind, protocol))


def ip(*lines: str) -> None:
    """Run `ip` commands, those of one namespace (`-n NAME` in front) in one go."""
    groups: list[tuple[list[str], list[str]]] = []
    for line in lines:
        words = line.split()
        where = words[:2] if words[0] == "-n" else []
        rest = " ".join(words[len(where) :])
        if groups and groups[-1][0] == where:
            groups[-1][1].append(rest)
        else:
            groups.append((where, [rest]))
    for where, commands in groups:
        done = subprocess.run(
            ["ip", *where, "-batch", "-"],
            input="\n".join(commands),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"ip {' '.join(where)}: {done.stderr.strip()}")
