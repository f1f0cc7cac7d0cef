# SPDX-License-Identifier: Apache-2.0
"""The manifests apply, and an agent's token may do what an agent needs and nothing else."""

import json
import ssl
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
MANIFESTS = Path(__file__).parents[2] / "manifests"
NAMESPACE = "hostint-system"
AGENT = f"system:serviceaccount:{NAMESPACE}:hostint-agent"
NODES = ("policy-node-1", "policy-node-2")


@pytest.fixture(scope="module")
def installed(api_server):
    kubectl = api_server.kubectl
    kubectl("apply", "-k", str(MANIFESTS))
    kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    kubectl("apply", "-k", str(MANIFESTS / "collector"))
    for node in NODES:
        for kind, version, spec in (
            ("Node", "v1", {}),
            ("IntNodeConfig", "hostint.dev/v1alpha1", {"nodeID": 1}),
        ):
            body = {"apiVersion": version, "kind": kind, "metadata": {"name": node}, "spec": spec}
            kubectl("apply", "-f", "-", input=json.dumps(body))
    yield api_server
    kubectl("delete", "inc,node", *NODES, "--ignore-not-found", "--wait=false")
    kubectl("delete", "-k", str(MANIFESTS / "collector"), "--wait=false")


@pytest.fixture(scope="module")
def as_agent(installed):
    """kubectl with the token of an agent pod that is bound to the first node."""
    name = f"agent-{uuid.uuid4().hex[:6]}"
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "nodeName": NODES[0],
            "serviceAccountName": "hostint-agent",
            "containers": [{"name": "a", "image": "none"}],
        },
    }
    installed.kubectl("apply", "-f", "-", input=json.dumps(pod))
    bound = ["--bound-object-kind", "Pod", "--bound-object-name", name]
    token = installed.kubectl("create", "token", "hostint-agent", "-n", NAMESPACE, *bound).stdout

    def run(*arguments: str):
        # the administrator's client certificate must not speak for it
        where = [
            f"--server={installed.server}",
            f"--certificate-authority={installed.pki.path('ca.crt')}",
        ]
        return installed.kubectl(
            "--kubeconfig=/dev/null", *where, f"--token={token.strip()}", *arguments, check=False
        )

    run.token = token.strip()
    yield run
    installed.kubectl("delete", "pod", name, "-n", NAMESPACE, "--force", "--ignore-not-found")


def patch(node: str, body: dict, *more: str) -> list[str]:
    return ["patch", "inc", node, "--type=merge", "-p", json.dumps(body), *more]


def test_everything_is_there_after_one_apply(installed):
    kinds = "deployment/hostint-operator,daemonset/hostint-agent"
    shown = installed.kubectl("get", "-n", NAMESPACE, *kinds.split(","), "-o", "name").stdout
    assert shown.split() == ["deployment.apps/hostint-operator", "daemonset.apps/hostint-agent"]
    assert installed.kubectl("get", "icol", "default").returncode == 0


def test_what_is_applied_is_what_the_files_say(installed):
    """No field that the server drops or defaults differently: a GitOps tool would see that as drift for ever."""
    different = installed.kubectl("diff", "-k", str(MANIFESTS), check=False)
    assert (different.returncode, different.stdout) == (0, ""), different.stderr


def test_the_agent_has_no_more_capabilities_than_it_needs(installed):
    daemon_set = installed.get("daemonset", "hostint-agent", "-n", NAMESPACE)
    security = daemon_set["spec"]["template"]["spec"]["containers"][0]["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["BPF", "NET_ADMIN", "PERFMON"]}
    assert security["readOnlyRootFilesystem"] is True
    assert "privileged" not in security


def test_an_agent_reads_node_configs(as_agent):
    assert as_agent("get", "inc", NODES[0], "-o", "name").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("get", "secrets", "-A"),
        ("get", "iwl"),
        ("get", "icol"),
        ("get", "nodes"),
        ("get", "pods", "-A"),
        ("delete", "inc", NODES[0]),
        ("create", "namespace", "x"),
    ],
    ids=" ".join,
)
def test_an_agent_may_do_nothing_else(as_agent, arguments):
    refused = as_agent(*arguments)
    assert refused.returncode != 0
    assert "orbidden" in refused.stderr


def test_an_agent_writes_no_spec_not_even_its_own(as_agent):
    refused = as_agent(*patch(NODES[0], {"spec": {"nodeID": 2}}))
    assert refused.returncode != 0
    assert "orbidden" in refused.stderr


def server_side_apply_status(installed, as_agent, node: str):
    """As the agent does it: kubectl's own patch reads the subresource first, which an agent may not."""
    body = {
        "apiVersion": "hostint.dev/v1alpha1",
        "kind": "IntNodeConfig",
        "metadata": {"name": node},
        "status": {"observedGeneration": 1},
    }
    token = as_agent.token
    request = urllib.request.Request(
        f"{installed.server}/apis/hostint.dev/v1alpha1/intnodeconfigs/{node}/status"
        "?fieldManager=hostint-agent&force=true",
        data=json.dumps(body).encode(),
        method="PATCH",
        headers={
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/apply-patch+yaml",
        },
    )
    context = ssl.create_default_context(cafile=str(installed.pki.path("ca.crt")))
    try:
        with urllib.request.urlopen(request, context=context, timeout=10) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_an_agent_writes_the_status_of_its_own_node(installed, as_agent):
    assert server_side_apply_status(installed, as_agent, NODES[0]) == (200, "")


def test_an_agent_does_not_write_the_status_of_another_node(installed, as_agent):
    status, text = server_side_apply_status(installed, as_agent, NODES[1])
    assert status == 403
    assert "may not write the intnodeconfig of node policy-node-2" in text
