# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces with a cable between them, for reports that must leave the host."""

import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Iterator

from tests.lab.namespace import Namespace, ip

_INSTANCES = itertools.count()
FAR, FAR6 = "10.98.0.2", "fd98::2"
# addresses of nobody on the same cable
NOBODY, NOBODY6 = "10.98.0.77", "fd98::77"


@contextlib.contextmanager
def cable() -> Iterator[tuple[Namespace, Namespace]]:
    """A near and a far end, each with an eth0 (10.98.0.1 and .2, fd98::1 and ::2); they know each other's MAC address."""
    prefix = f"hx{os.getpid()}-{next(_INSTANCES)}"
    near, far = Namespace(f"{prefix}n"), Namespace(f"{prefix}f")
    try:
        ip(f"netns add {near.name}", f"netns add {far.name}")
        ip(f"-n {near.name} link add eth0 type veth peer name eth0 netns {far.name}")
        for number, end in enumerate((near, far), start=1):
            _configure(end.name, number, 3 - number)
        for end in (near, far):
            _wait_until_it_sends(end)
        yield near, far
    finally:
        for end in (near, far):
            subprocess.run(["ip", "netns", "del", end.name], capture_output=True, check=False)


def _configure(name: str, number: int, other: int) -> None:
    known = f"lladdr 02:00:00:00:00:0{other} dev eth0 nud permanent"
    ip(
        f"-n {name} link set lo up",
        f"-n {name} link set eth0 address 02:00:00:00:00:0{number} up",
        f"-n {name} addr add 10.98.0.{number}/24 dev eth0",
        f"-n {name} addr add fd98::{number}/64 dev eth0 nodad",
        f"-n {name} neigh replace 10.98.0.{other} {known}",
        f"-n {name} neigh replace fd98::{other} {known}",
    )


def _wait_until_it_sends(end: Namespace) -> None:
    """A device that has a carrier drops what it is given until the kernel's own next look at it."""
    deadline = time.monotonic() + 10
    while "state UP" not in (shown := end.run("ip", "-o", "link", "show", "eth0")):
        if time.monotonic() > deadline:
            raise TimeoutError(shown)
        time.sleep(0.01)
