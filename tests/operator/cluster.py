# SPDX-License-Identifier: Apache-2.0
"""A namespace, nodes and agents on a real API server, and the operator as a process with the least rights it needs."""

import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from hostint_api import names

CRDS = pathlib.Path(__file__).parents[2] / "crds"
MANIFESTS = pathlib.Path(__file__).parents[2] / "manifests"
RUN_LABEL = "test.hostint.dev/run"


def _rules(kind: str) -> list[dict[str, Any]]:
    """What the manifests let the operator do."""
    objects = yaml.safe_load_all((MANIFESTS / "operator.yaml").read_text())
    return next(list(each["rules"]) for each in objects if each["kind"] == kind)


def until(what: str, condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Poll until the condition holds and return what it returned."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.03)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def install_crds(api_server: Any) -> None:
    """Make the API server serve our kinds."""
    for crd in sorted(CRDS.glob("int*.yaml")):
        api_server.kubectl("apply", "-f", str(crd))
        api_server.kubectl("wait", "--for=condition=Established", "-f", str(crd), "--timeout=30s")


class Cluster:
    """A namespace, two nodes with agent pods, and short ways to look and to write."""

    def __init__(self, api_server: Any, directory: pathlib.Path) -> None:
        self.api_server = api_server
        # With a letter before it: kubectl reads 6257e4 in YAML as a number.
        self.run = f"r{uuid.uuid4().hex[:6]}"
        self.namespace = f"hostint-{self.run}"
        self.nodes = [f"n1-{self.run}", f"n2-{self.run}"]
        self.directory = directory
        self.kubeconfig = directory / "operator.conf"
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat)

    def kubectl(self, *words: str, **more: Any) -> str:
        return str(self.api_server.kubectl(*words, **more).stdout)

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(objects))

    def get(self, kind: str, name: str, *more: str) -> dict[str, Any]:
        text = self.kubectl("get", kind, name, "-o", "json", "--ignore-not-found", *more)
        return json.loads(text) if text else {}

    def set_up(self) -> None:
        install_crds(self.api_server)
        meta = {"name": "operator", "namespace": self.namespace}
        subject = [{"kind": "ServiceAccount", **meta}]
        rbac = "rbac.authorization.k8s.io"
        role = {"apiGroup": rbac, "kind": "Role", "name": "operator"}
        cluster_role = {"apiGroup": rbac, "kind": "ClusterRole", "name": self.namespace}
        v1 = f"{rbac}/v1"
        wide = {"name": self.namespace}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": wide})
        self.apply(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
            {"apiVersion": v1, "kind": "Role", "metadata": meta, "rules": _rules("Role")},
            {
                "apiVersion": v1,
                "kind": "RoleBinding",
                "metadata": meta,
                "subjects": subject,
                "roleRef": role,
            },
            {
                "apiVersion": v1,
                "kind": "ClusterRole",
                "metadata": wide,
                "rules": _rules("ClusterRole"),
            },
            {
                "apiVersion": v1,
                "kind": "ClusterRoleBinding",
                "metadata": wide,
                "subjects": subject,
                "roleRef": cluster_role,
            },
        )
        config = yaml.safe_load(self.api_server.kubeconfig.read_text())
        token = self.kubectl("create", "token", "operator", "-n", self.namespace).strip()
        config["users"][0]["user"] = {"token": token}
        self.kubeconfig.write_text(yaml.safe_dump(config))
        until("default service account", lambda: self.get("sa", "default", "-n", self.namespace))
        for i, node in enumerate(self.nodes, 1):
            self.add_node(node, f"10.77.0.{i}")
            self.add_agent(node)
        self._heart.start()

    def add_node(self, name: str, address: str) -> None:
        labels = {RUN_LABEL: self.run}
        self.apply(
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
        )
        self._node_status(name, [{"type": "InternalIP", "address": address}])

    def _node_status(self, name: str, addresses: list[dict[str, str]] | None = None) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        condition = {"type": "Ready", "status": "True", "reason": "Test", "lastHeartbeatTime": now}
        status: dict[str, Any] = {"conditions": [condition]}
        if addresses:
            status["addresses"] = addresses
        patch = json.dumps({"status": status})
        self.kubectl("patch", "node", name, "--subresource=status", "-p", patch, check=False)

    def _beat(self) -> None:
        """Keep the nodes alive, or the controller manager would declare their pods not ready."""
        while not self._stop.wait(15):
            for node in self.nodes:
                self._node_status(node)

    def add_agent(self, node: str) -> None:
        container = {"name": "agent", "image": "none"}
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"agent-{node}",
                    "namespace": self.namespace,
                    "labels": {names.AGENT_LABEL: names.AGENT_NAME},
                },
                "spec": {
                    "nodeName": node,
                    "containers": [container],
                    "tolerations": [{"operator": "Exists"}],
                },
            }
        )
        self.agent_ready(node, True)

    def agent_ready(self, node: str, ready: bool) -> None:
        condition = {"type": "Ready", "status": str(ready)}
        patch = json.dumps({"status": {"phase": "Running", "conditions": [condition]}})
        self.kubectl(
            *("patch", "pod", f"agent-{node}", "-n", self.namespace),
            *("--subresource=status", "-p", patch),
        )

    def answer(self, node: str, *, ready: bool = True, reachable: bool = True) -> None:
        """Do what an agent does once it runs its configuration."""
        config = self.get("inc", node)
        spec = config["spec"]
        words = {} if ready else {"reason": "AttachFailed", "message": "no room in the chain"}
        lost = {} if reachable else {"reason": "NoRoute", "message": "no route to host"}
        status = {
            "observedGeneration": config["metadata"]["generation"],
            "observedDigest": spec["digest"],
            "watchlists": [
                {"name": w["name"], "generation": w["generation"], "ready": ready, **words}
                for w in spec["watchlists"]
            ],
            "collectors": [
                {"name": c["name"], "reachable": reachable, **lost} for c in spec["collectors"]
            ],
        }
        told = {
            "apiVersion": names.API_VERSION,
            "kind": names.NODE_CONFIG_KIND,
            "metadata": {"name": node},
            "status": status,
        }
        self.kubectl(
            *("apply", "--server-side", "--force-conflicts", "--subresource=status"),
            *("--field-manager", names.AGENT_MANAGER, "-f", "-"),
            input=json.dumps(told),
        )

    def answer_all(self) -> None:
        for node in self.nodes:
            self.answer(node)

    def watchlist(self, name: str, **spec: Any) -> dict[str, Any]:
        rule = {"name": "web", "protocol": "TCP", "destination": {"ports": [{"port": 80}]}}
        return {
            "apiVersion": names.API_VERSION,
            "kind": names.WATCHLIST_KIND,
            "metadata": {"name": name},
            "spec": {
                "collectorRef": {"name": f"c-{self.run}"},
                "nodeSelector": {"matchLabels": {RUN_LABEL: self.run}},
                "rules": [rule],
                **spec,
            },
        }

    def collector(self, name: str | None = None, **spec: Any) -> dict[str, Any]:
        return {
            "apiVersion": names.API_VERSION,
            "kind": names.COLLECTOR_KIND,
            "metadata": {"name": name or f"c-{self.run}"},
            "spec": spec or {"address": "192.0.2.9", "port": 4000},
        }

    def condition(self, kind: str, name: str, condition: str) -> dict[str, Any]:
        """Return a condition if it is about the current generation."""
        found = self.get(kind, name)
        for entry in found.get("status", {}).get("conditions", []):
            if entry["type"] == condition:
                current = entry["observedGeneration"] == found["metadata"]["generation"]
                return dict(entry) if current else {}
        return {}

    def becomes(self, kind: str, name: str, condition: str, status: str, reason: str) -> str:
        """Wait for a condition and return its message."""

        def found() -> dict[str, Any]:
            entry = self.condition(kind, name, condition)
            good = (entry.get("status"), entry.get("reason")) == (status, reason)
            return entry if good else {}

        return str(until(f"{kind} {name} {condition}={status} {reason}", found)["message"])

    def told(self, node: str) -> dict[str, Any]:
        return dict(self.get("inc", node).get("spec", {}))

    def told_watchlists(self, node: str) -> dict[str, int]:
        return {w["name"]: w["generation"] for w in self.told(node).get("watchlists", [])}

    def until_told(self, node: str, expected: dict[str, int], seconds: float = 20.0) -> None:
        """Wait until a node is told exactly these watchlists in these generations."""
        until(
            f"{node} is told {expected}",
            lambda: self.told(node) and self.told_watchlists(node) == expected,
            seconds,
        )

    def until_reports_go_to(self, node: str, address: str, port: int, seconds: float) -> None:
        """Wait until a node has exactly this destination."""

        def destinations() -> list[tuple[str, int]]:
            return [(c["address"], c["port"]) for c in self.told(node)["collectors"]]

        until(f"reports to {address}", lambda: destinations() == [(address, port)], seconds)

    def until_current(self, node: str, name: str) -> None:
        """Wait until a node is told the newest generation of a watchlist."""
        generation = self.get("iwl", name)["metadata"]["generation"]
        until(
            f"{node} is told {name} {generation}",
            lambda: self.told_watchlists(node).get(name) == generation,
        )

    def tear_down(self) -> None:
        self._stop.set()
        self._heart.join()
        own = f"{RUN_LABEL}={self.run}"
        self.kubectl("delete", "iwl,icol", "--all", "--wait=false")
        self.kubectl("delete", "nodes", "-l", own, "--wait=false")
        self.kubectl("delete", "pods", "--all", "-n", self.namespace, "--force", "--grace-period=0")
        self.kubectl("delete", "ns", self.namespace, "--wait=false")
        self.kubectl("delete", "clusterrole,clusterrolebinding", self.namespace)


class Operator:
    """One replica."""

    def __init__(self, cluster: Cluster, identity: str, kubeconfig: pathlib.Path | None) -> None:
        self.port = free_port()
        self.log = cluster.directory / f"{identity}.log"
        self._words = [
            "--kubeconfig",
            str(kubeconfig or cluster.kubeconfig),
            "--namespace",
            cluster.namespace,
        ]
        self._words += ["--http", f"127.0.0.1:{self.port}", "--identity", identity]
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hostint_operator", *self._words], stdout=log, stderr=log
            )

    def get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, ConnectionError):
            return ""

    def ready(self) -> None:
        until("readyz", lambda: self.get("/readyz") == "ok\n" or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()

    def metric(self, name: str) -> float:
        found = [line for line in self.get("/metrics").splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def leads(self) -> bool:
        return self.metric("hostint_operator_leader ") == 1

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@contextlib.contextmanager
def replica(
    cluster: Cluster, identity: str, kubeconfig: pathlib.Path | None = None
) -> Iterator[Operator]:
    """Run a replica, by default with the rights of its own service account straight to the API server."""
    made = Operator(cluster, identity, kubeconfig)
    try:
        made.ready()
        yield made
    finally:
        if made.process.poll() is None:
            made.kill()
        sys.stdout.write(made.log.read_text())
