# SPDX-License-Identifier: Apache-2.0
"""Service accounts on a real API server: their tokens, and requests that nobody else's credentials speak for."""

import json
import ssl
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hostint_api import names
from tests.testcluster import ControlPlane

CONFIGS = f"/apis/{names.API_VERSION}/{names.NODE_CONFIGS}"
APPLY = "application/apply-patch+yaml"
NODES = ("policy-node-1", "policy-node-2")


def add_nodes(plane: ControlPlane) -> None:
    """Make two nodes, each with an IntNodeConfig."""
    for node in NODES:
        add_object(plane, "v1", "Node", {"name": node})
        add_object(plane, names.API_VERSION, names.NODE_CONFIG_KIND, {"name": node}, nodeID=1)


def add_object(
    plane: ControlPlane, version: str, kind: str, metadata: dict[str, str], **spec: Any
) -> None:
    """Apply an object as administrator."""
    body = {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}
    plane.kubectl("apply", "-f", "-", input=json.dumps(body))


def remove_nodes(plane: ControlPlane) -> None:
    """Remove what `add_nodes` made."""
    plane.kubectl("delete", "inc,node", *NODES, "--ignore-not-found", "--wait=false")


def token(plane: ControlPlane, namespace: str, account: str, *bound: str) -> str:
    """Return a new token of a service account."""
    words = ("create", "token", account, "-n", namespace, *bound)
    return plane.kubectl(*words).stdout.strip()


@contextmanager
def token_of_pod(plane: ControlPlane, namespace: str, account: str, node: str) -> Iterator[str]:
    """Yield a token that is bound to a pod on a node, as the kubelet of that node would mount it."""
    name = f"{account}-{uuid.uuid4().hex[:6]}"
    add_object(
        plane,
        "v1",
        "Pod",
        {"name": name, "namespace": namespace},
        nodeName=node,
        serviceAccountName=account,
        containers=[{"name": "a", "image": "none"}],
    )
    bound = ("--bound-object-kind", "Pod", "--bound-object-name", name)
    try:
        yield token(plane, namespace, account, *bound)
    finally:
        plane.kubectl("delete", "pod", name, "-n", namespace, "--force", "--ignore-not-found")


class Account:
    """Whoever holds a token."""

    def __init__(self, plane: ControlPlane, bearer: str) -> None:
        self._plane = plane
        self._token = bearer

    def kubectl(self, *arguments: str) -> Any:
        """Run kubectl; the administrator's client certificate does not speak for it."""
        where = [
            f"--server={self._plane.server}",
            f"--certificate-authority={self._plane.pki.path('ca.crt')}",
        ]
        return self._plane.kubectl(
            "--kubeconfig=/dev/null", *where, f"--token={self._token}", *arguments, check=False
        )

    def send(
        self, method: str, path: str, body: Any = None, content: str = "application/json"
    ) -> tuple[int, str]:
        """Send one request; return the status and the body."""
        request = urllib.request.Request(
            self._plane.server + path,
            data=None if body is None else json.dumps(body).encode(),
            method=method,
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": content},
        )
        context = ssl.create_default_context(cafile=str(self._plane.pki.path("ca.crt")))
        try:
            with urllib.request.urlopen(request, context=context, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def apply(self, node: str, part: str = "", **content: Any) -> tuple[int, str]:
        """Server-side apply an IntNodeConfig or, with `part` "/status", its status, as our programs do."""
        path = f"{CONFIGS}/{node}{part}?fieldManager=test&force=true"
        return self.send("PATCH", path, config(node, **content), APPLY)

    def apply_status(self, node: str) -> tuple[int, str]:
        """Write a status, as an agent does."""
        return self.apply(node, "/status", status={"observedGeneration": 1})


def config(node: str, **content: Any) -> dict[str, Any]:
    """Return an IntNodeConfig."""
    head = {"apiVersion": names.API_VERSION, "kind": names.NODE_CONFIG_KIND}
    return head | {"metadata": {"name": node}} | content
