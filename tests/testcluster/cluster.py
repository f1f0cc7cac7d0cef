# SPDX-License-Identifier: Apache-2.0
"""The whole: control plane on a bridge, nodes beside it. One at a time on a machine, since pods have fixed addresses."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Self

from tests.testcluster import binaries, images, packages
from tests.testcluster.control_plane import ControlPlane
from tests.testcluster.node import Node, ip
from tests.testcluster.processes import wait_until

STATE_DIR = Path(os.environ.get("HOSTINT_TESTCLUSTER_DIR", "/run/hostint-testcluster"))
_PREFIX = "hi"
_BRIDGE = "hibr"
_ADDRESS = "10.98.0.1"
_READY_S = 90


class ClusterBusy(RuntimeError):
    """Another process runs the test cluster."""


class Cluster:
    """`nodes` nodes with these images loaded. Use as a context, or `start` and `stop`."""

    def __init__(
        self,
        *,
        nodes: int = 2,
        wanted_images: Sequence[images.Image] = (),
        state_dir: Path = STATE_DIR,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.state_dir = state_dir
        self._images = tuple(wanted_images)
        self._say = say
        self.plane = ControlPlane(state_dir / "cluster", _ADDRESS, scheduler=True)
        self.nodes = [Node(self.plane, number, _PREFIX, _BRIDGE) for number in range(1, nodes + 1)]
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def kubeconfig(self) -> Path:
        """Administrator's kubeconfig."""
        return self.plane.kubeconfig

    def set_images(self, wanted: Sequence[images.Image]) -> None:
        """Which images `start` is to load."""
        self._images = tuple(wanted)

    def kubectl(self, *arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
        """Run kubectl as administrator. Raises control_plane.KubectlError."""
        return self.plane.kubectl(*arguments, **more)

    def get(self, *arguments: str) -> Any:
        """`kubectl get ... -o json`, parsed."""
        return self.plane.get(*arguments)

    def node(self, number: int) -> Node:
        """Node by number, from 1."""
        return self.nodes[number - 1]

    def start(self) -> None:
        """Start everything and wait until all nodes are Ready. Raises ClusterBusy."""
        packages.ensure(packages.CONTROL_PLANE, packages.NODES)
        binaries.ensure()
        self._take_lock()
        self._clean()
        started = time.monotonic()
        self._bridge()
        with ThreadPoolExecutor() as pool:
            plane = pool.submit(self.plane.start)
            pause = pool.submit(images.pause)
            plane.result()
            wanted = [pause.result(), *self._images]
            list(pool.map(lambda node: self._start_node(node, wanted), self.nodes))
        wait_until(self._all_ready, _READY_S, self._why_not_ready)
        self._say(
            f"cluster of {len(self.nodes)} nodes Ready after {time.monotonic() - started:.1f} s"
        )

    def _start_node(self, node: Node, wanted: Sequence[images.Image]) -> None:
        node.start(self.nodes)
        for image in wanted:
            node.load_image(image)
        node.start_kubelet()

    def _all_ready(self) -> bool:
        listed = self.kubectl("get", "nodes", "--no-headers", check=False).stdout.splitlines()
        return sum(" Ready" in line for line in listed) == len(self.nodes)

    def _why_not_ready(self) -> str:
        return "\n".join(node.processes.log("kubelet", 1500) for node in self.nodes)

    def stop(self) -> None:
        """End everything, also what a killed process left."""
        if self._lock is None:
            try:
                self._take_lock()
            except ClusterBusy:
                return
        self._clean()
        if self._lock:
            self._lock.close()
            self._lock = None

    def release(self) -> None:
        """Leave the cluster running when this process ends; `python -m tests.testcluster down` stops it."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        self.state_dir.mkdir(parents=True, exist_ok=True)
        lock = (self.state_dir / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise ClusterBusy("another process runs the test cluster; wait for it to end") from None
        self._lock = lock

    def _clean(self) -> None:
        for node in [*self.nodes, Node(self.plane, 3, _PREFIX, _BRIDGE)]:
            node.stop()
        for name in ("scheduler", "kcm", "apiserver", "etcd"):
            self.plane.processes.stop(name)
        ip("link", "del", _BRIDGE, check=False)
        for leftover in Path("/var/run/netns").glob("cni-*"):
            # made in the nodes' own mount namespaces; here only the empty file is left
            if not os.path.ismount(leftover):
                with contextlib.suppress(OSError):
                    leftover.unlink()
        shutil.rmtree(self.plane.directory, ignore_errors=True)
        self.plane.directory.mkdir(parents=True, exist_ok=True)

    def _bridge(self) -> None:
        if not os.path.ismount("/sys/fs/bpf"):
            subprocess.run(["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"], check=True)
        ip("link", "add", _BRIDGE, "type", "bridge")
        ip("addr", "add", f"{_ADDRESS}/24", "dev", _BRIDGE)
        ip("link", "set", _BRIDGE, "up")
        subprocess.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"], check=True)
