# SPDX-License-Identifier: Apache-2.0
"""An agent's token writes the status of its own node's IntNodeConfig, whatever its namespace and its rights."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests import accounts
from tests.manifests.accounts import CONFIGS, NODES, Account
from tests.testcluster import ControlPlane

pytestmark = pytest.mark.cluster
MANIFESTS = Path(__file__).parents[2] / "manifests"
POLICY = "hostint-agent-own-node-only"
OWN, OTHER = NODES
NAMES_NO_NODE = "the service account's token names no node"


@dataclass(frozen=True)
class Installed:
    """The manifests on an API server, in one namespace."""

    plane: ControlPlane
    namespace: str

    def account(self, name: str) -> Account:
        """Return a service account with a token that is bound to nothing."""
        return Account(self.plane, accounts.token(self.plane, self.namespace, name))


def overlay(directory: Path, **more: Any) -> Path:
    """Write a kustomization on top of ours; return its directory."""
    bases = [os.path.relpath(path, directory) for path in (MANIFESTS, MANIFESTS / "collector")]
    (directory / "kustomization.yaml").write_text(yaml.safe_dump({"resources": bases, **more}))
    return directory


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what an API server does a moment after it has answered."""
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.fixture(scope="module", params=["hostint-system", "observability"])
def installed(
    api_server: ControlPlane,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Installed]:
    """The manifests as they are, and as an overlay puts them into another namespace."""
    directory = overlay(tmp_path_factory.mktemp("overlay"), namespace=request.param)
    api_server.kubectl("apply", "-k", str(directory), check=False)  # the CRDs are not served yet
    api_server.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    api_server.kubectl("apply", "-k", str(directory))
    assert api_server.kubectl("diff", "-k", str(directory)).stdout == ""
    accounts.add_nodes(api_server)
    yield Installed(api_server, request.param)
    accounts.remove_nodes(api_server)


@pytest.fixture(scope="module")
def agent(installed: Installed) -> Iterator[Account]:
    """The agent of a pod on OWN, once the policy is in force."""
    with accounts.token_of_pod(
        installed.plane, installed.namespace, "hostint-agent", OWN
    ) as bearer:
        made = Account(installed.plane, bearer)
        until(lambda: made.apply_status(OTHER)[0] == 403, "the policy is not in force")
        yield made


@pytest.fixture
def all_rights(installed: Installed) -> Iterator[None]:
    """Let every service account of the namespace do everything with IntNodeConfigs, as far as RBAC goes."""
    kubectl, name = installed.plane.kubectl, "test-all-rights"
    resources = "intnodeconfigs.hostint.dev,intnodeconfigs.hostint.dev/status"
    kubectl("create", "clusterrole", name, "--verb=*", f"--resource={resources}")
    group = f"--group=system:serviceaccounts:{installed.namespace}"
    kubectl("create", "clusterrolebinding", name, f"--clusterrole={name}", group)
    yield
    kubectl("delete", "clusterrole,clusterrolebinding", name)


def test_agent_writes_the_status_of_its_own_node(agent: Account) -> None:
    assert agent.apply_status(OWN)[0] == 200


def test_agent_writes_no_status_of_another_node(agent: Account) -> None:
    status, text = agent.apply_status(OTHER)
    assert status == 403
    words = f"token of node {OWN} may not write the status of node {OTHER}"
    assert words in text


@pytest.mark.parametrize("node", NODES)
def test_token_that_names_no_node_writes_no_status(
    installed: Installed, agent: Account, node: str
) -> None:
    status, text = installed.account("hostint-agent").apply_status(node)
    assert (status, NAMES_NO_NODE in text) == (403, True), text


def test_account_of_another_name_is_guarded_too(
    installed: Installed, agent: Account, all_rights: None
) -> None:
    """An overlay may give the agent's account a prefix, or name another one."""
    kubectl = installed.plane.kubectl
    kubectl("create", "serviceaccount", "other", "-n", installed.namespace)
    try:
        unbound = installed.account("other")
        until(lambda: NAMES_NO_NODE in unbound.apply_status(OWN)[1], "the rights are not there")
        with accounts.token_of_pod(installed.plane, installed.namespace, "other", OWN) as bearer:
            other = Account(installed.plane, bearer)
            assert other.apply_status(OWN)[0] == 200
            assert other.apply_status(OTHER)[0] == 403
    finally:
        kubectl("delete", "serviceaccount", "other", "-n", installed.namespace)


STATUS_ONLY = "an agent may only update the status"
BEYOND = {
    "apply": (
        "PATCH",
        f"{CONFIGS}/{OWN}?fieldManager=a&force=true&",
        {"nodeID": 2},
        accounts.APPLY,
    ),
    "merge": ("PATCH", f"{CONFIGS}/{OWN}?", {"nodeID": 2}, "application/merge-patch+json"),
    "create": ("POST", f"{CONFIGS}?", {"nodeID": 2}, "application/json"),
    "delete": ("DELETE", f"{CONFIGS}/{OWN}?", None, "application/json"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_agent_with_all_rights_writes_the_status_only(
    agent: Account, all_rights: None, name: str
) -> None:
    """RBAC forbids it as well; the policy still stands where somebody has given the agent more rights."""
    method, path, spec, content = BEYOND[name]
    body = None if spec is None else accounts.config(OWN, spec=spec)

    def send() -> tuple[int, str]:
        return agent.send(method, f"{path}dryRun=All", body, content)

    until(lambda: STATUS_ONLY in send()[1], "the rights are not there, or the policy is not")
    assert send()[0] == 403


def test_operator_writes_specs_and_no_status(installed: Installed, agent: Account) -> None:
    operator = installed.account("hostint-operator")
    assert operator.apply(OWN, spec={"nodeID": 3})[0] == 200
    assert operator.apply_status(OWN)[0] == 403


def test_policy_that_cannot_be_evaluated_refuses(installed: Installed, agent: Account) -> None:
    """It fails closed: what it cannot judge is not written."""

    def set_variable(expression: str) -> None:
        path = "/spec/variables/0/expression"
        patch = json.dumps([{"op": "replace", "path": path, "value": expression}])
        kind = "validatingadmissionpolicy"
        installed.plane.kubectl("patch", kind, POLICY, "--type=json", "-p", patch)

    def is_checked() -> bool:
        found = installed.plane.get("validatingadmissionpolicy", POLICY)
        seen = found.get("status", {}).get("observedGeneration")
        return bool(seen == found["metadata"]["generation"])

    until(is_checked, "the policy's types are not checked")
    policy = installed.plane.get("validatingadmissionpolicy", POLICY)
    assert policy["status"]["typeChecking"] == {}
    set_variable("request.userInfo.extra['missing'][0]")
    try:
        until(lambda: agent.apply_status(OWN)[0] != 200, "a broken policy lets an agent write")
        status, text = agent.apply_status(OWN)
        assert (status, "no such key: missing" in text) == (422, True), text
    finally:
        set_variable(policy["spec"]["variables"][0]["expression"])
    until(lambda: agent.apply_status(OWN)[0] == 200, "the policy is not back")


def test_collector_follows_its_service_into_an_overlay(installed: Installed) -> None:
    found = installed.plane.get("icol", "default")["spec"]["service"]
    assert found["namespace"] == installed.namespace
    installed.plane.kubectl("get", "service", found["name"], "-n", found["namespace"])
