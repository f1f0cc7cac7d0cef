# SPDX-License-Identifier: Apache-2.0
"""The manifests apply, and an agent's token may do what an agent needs and nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.manifests import accounts
from tests.manifests.accounts import NODES, Account
from tests.testcluster import ControlPlane

pytestmark = pytest.mark.cluster
MANIFESTS = Path(__file__).parents[2] / "manifests"
NAMESPACE = "hostint-system"


@pytest.fixture(scope="module")
def installed(api_server: ControlPlane) -> Iterator[ControlPlane]:
    kubectl = api_server.kubectl
    kubectl("apply", "-k", str(MANIFESTS))
    kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    kubectl("apply", "-k", str(MANIFESTS / "collector"))
    accounts.add_nodes(api_server)
    yield api_server
    accounts.remove_nodes(api_server)
    kubectl("delete", "-k", str(MANIFESTS / "collector"), "--wait=false")


@pytest.fixture(scope="module")
def as_agent(installed: ControlPlane) -> Iterator[Account]:
    """The agent of a pod on the first node."""
    with accounts.token_of_pod(installed, NAMESPACE, "hostint-agent", NODES[0]) as bearer:
        yield Account(installed, bearer)


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
    assert as_agent.kubectl("get", "inc", NODES[0], "-o", "name").returncode == 0


REVIEW = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
# What every account may do: ask who it is and what it may.
FOR_ALL = {"authentication.k8s.io", "authorization.k8s.io"}


READ, FOLLOW = {"get", "list", "watch"}, {"list", "watch"}
RIGHTS = {
    "hostint-agent": {"intnodeconfigs": READ, "intnodeconfigs/status": {"patch"}},
    "hostint-operator": {
        "intwatchlists": FOLLOW,
        "intcollectors": FOLLOW,
        "intwatchlists/status": {"patch"},
        "intcollectors/status": {"patch"},
        "intnodeconfigs": FOLLOW | {"create", "patch"},
        "nodes": FOLLOW,
        "services": FOLLOW,
        "endpointslices": FOLLOW,
        "pods": FOLLOW,
        "leases": {"create", "get", "update"},
    },
}


# Of these the operator sees none in other namespaces.
IN_ITS_NAMESPACE = {"pods", "leases"}


@pytest.mark.parametrize("namespace", [NAMESPACE, "kube-system"])
@pytest.mark.parametrize("name", RIGHTS)
def test_an_account_has_exactly_the_rights_listed_here(installed, name, namespace):
    account = Account(installed, accounts.token(installed, NAMESPACE, name))
    status, text = account.send("POST", REVIEW, {"spec": {"namespace": namespace}})
    assert status == 201, text
    found: dict[str, set[str]] = {}
    for rule in json.loads(text)["status"]["resourceRules"]:
        if rule["apiGroups"][0] not in FOR_ALL:
            for resource in rule["resources"]:
                found.setdefault(resource, set()).update(rule["verbs"])
            if "update" in rule["verbs"]:
                assert rule["resourceNames"] == ["hostint-operator"]  # of leases, its own
    elsewhere = IN_ITS_NAMESPACE if namespace != NAMESPACE else set()
    assert found == {what: verbs for what, verbs in RIGHTS[name].items() if what not in elsewhere}


@pytest.mark.parametrize(
    "arguments",
    [
        ("get", "secrets", "-A"),
        ("get", "iwl"),
        ("get", "icol"),
        ("get", "nodes"),
        ("get", "pods", "-A"),
        ("delete", "inc", NODES[0]),
        ("patch", "inc", NODES[0], "--type=merge", "-p", '{"spec": {"nodeID": 2}}'),
        ("create", "namespace", "x"),
    ],
    ids=" ".join,
)
def test_an_agent_is_refused(as_agent, arguments):
    refused = as_agent.kubectl(*arguments)
    assert refused.returncode != 0
    assert "orbidden" in refused.stderr
