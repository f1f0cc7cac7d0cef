# SPDX-License-Identifier: Apache-2.0
"""hostint on the test cluster as a user would install it, and what tests and the demo look at."""

import json
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.testcluster import Cluster

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
APP = Path(__file__).with_name("app")
NAMESPACE = "hostint-system"
Record = dict[str, Any]


def install(cluster: Cluster) -> None:
    """`kubectl apply -k manifests/`, and wait until operator and agents are ready."""
    cluster.kubectl("apply", "-k", str(MANIFESTS))
    for what in ("deployment/hostint-operator", "daemonset/hostint-agent"):
        cluster.kubectl("rollout", "status", "-n", NAMESPACE, what, "--timeout=90s", timeout=100)


def install_collector(cluster: Cluster) -> None:
    """The optional collector, as the IntCollector `default`."""
    cluster.kubectl("apply", "-k", str(MANIFESTS / "collector"))
    cluster.kubectl(
        "rollout", "status", "-n", NAMESPACE, "deployment/hostint-collector", "--timeout=60s"
    )


def install_app(cluster: Cluster) -> None:
    """Client, web service and backend."""
    cluster.kubectl("apply", "-k", str(APP))
    for name in ("backend", "web", "client"):
        cluster.kubectl("rollout", "status", "-n", "demo", f"deployment/{name}", "--timeout=60s")


def apply(cluster: Cluster, *objects: dict[str, Any]) -> None:
    """Apply objects."""
    cluster.kubectl("apply", "-f", "-", input="\n---\n".join(json.dumps(o) for o in objects))


def watchlist(name: str, *rules: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """An IntWatchlist; rules without names are numbered."""
    named = [{"name": f"r{i}"} | rule for i, rule in enumerate(rules)]
    return {
        "apiVersion": "hostint.dev/v1alpha1",
        "kind": "IntWatchlist",
        "metadata": {"name": name},
        "spec": {"rules": named, **spec},
    }


def collector(name: str, **spec: Any) -> dict[str, Any]:
    """An IntCollector."""
    return {
        "apiVersion": "hostint.dev/v1alpha1",
        "kind": "IntCollector",
        "metadata": {"name": name},
        "spec": spec,
    }


def conditions(item: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    """(status, reason, message) by condition type."""
    listed = item.get("status", {}).get("conditions", [])
    return {c["type"]: (c["status"], c["reason"], c["message"]) for c in listed}


def wait_for(
    question: Callable[[], Any], timeout_s: float, what: Callable[[], str] = lambda: ""
) -> Any:
    """Ask until the answer is true. Raises TimeoutError with what `what` says then."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s: {what()}")
        time.sleep(0.02)


def wait_condition(
    cluster: Cluster, kind: str, name: str, condition: str, status: str, timeout_s: float
) -> tuple[str, str, str]:
    """Wait until a condition has a status; returns it."""

    def look() -> tuple[str, str, str] | None:
        found = conditions(cluster.get(kind, name)).get(condition)
        return found if found and found[0] == status else None

    return wait_for(look, timeout_s, lambda: str(conditions(cluster.get(kind, name))))


@dataclass(frozen=True)
class PodAddress:
    """Where a pod is."""

    name: str
    address: str
    node: str


def pod(cluster: Cluster, namespace: str, app: str) -> PodAddress:
    """The running pod of an app."""
    return pod_of(cluster, namespace, f"app={app}")


def pod_of(cluster: Cluster, namespace: str, selector: str) -> PodAddress:
    """The running pod with these labels."""
    items = cluster.get("pods", "-n", namespace, "-l", selector)["items"]
    running = [
        p
        for p in items
        if p["status"].get("phase") == "Running" and "deletionTimestamp" not in p["metadata"]
    ]
    item = running[0]
    return PodAddress(item["metadata"]["name"], item["status"]["podIP"], item["spec"]["nodeName"])


class CollectorLog:
    """What the collector pod prints, record by record, while it prints it; follows the pod when it moves."""

    def __init__(
        self, cluster: Cluster, on_record: Callable[[Record], None] = lambda _: None
    ) -> None:
        self._cluster = cluster
        self._on_record = on_record
        self._records: deque[Record] = deque(maxlen=200_000)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._child: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop following."""
        self._stopping.set()
        if self._child:
            self._child.kill()
        self._thread.join(5)

    def _run(self) -> None:
        plane = self._cluster.plane
        command = [str(plane.bin_dir / "kubectl"), f"--kubeconfig={plane.kubeconfig}", "logs", "-f"]
        command += ["-n", NAMESPACE, "deployment/hostint-collector"]
        while not self._stopping.is_set():
            self._child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert self._child.stdout
            for line in self._child.stdout:
                if line.startswith("{"):
                    record = json.loads(line)
                    with self._lock:
                        self._records.append(record)
                    self._on_record(record)
            self._child.wait()
            self._stopping.wait(0.3)

    def clear(self) -> None:
        """Forget what came so far."""
        with self._lock:
            self._records.clear()

    def records(self, wanted: Callable[[Record], bool] = lambda _: True) -> list[Record]:
        """Records so far that `wanted` accepts."""
        with self._lock:
            return [r for r in self._records if wanted(r)]

    def wait(self, wanted: Callable[[Record], bool], timeout_s: float = 10.0) -> Record:
        """The first such record. Raises TimeoutError."""
        found: list[Record] = wait_for(
            lambda: self.records(wanted), timeout_s, lambda: f"last: {self.records()[-3:]}"
        )
        return found[0]
