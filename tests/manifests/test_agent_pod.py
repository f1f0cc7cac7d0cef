# SPDX-License-Identifier: Apache-2.0
"""What the agent's pod asks of its node, and whom it lets ask."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hostint_agent import command_line, settings

MANIFESTS = Path(__file__).parents[2] / "manifests"


def pod(file: str) -> dict[str, Any]:
    """The pod of the agent's DaemonSet in a file."""
    documents = yaml.safe_load_all((MANIFESTS / file).read_text())
    (daemon_set,) = [item for item in documents if item["kind"] == "DaemonSet"]
    return daemon_set["spec"]["template"]


def container(file: str) -> dict[str, Any]:
    (only,) = pod(file)["spec"]["containers"]
    return only


def read(environment: dict[str, str]) -> settings.Settings:
    """What the agent makes of its environment."""
    parsed = command_line.parser(environment).parse_args(["run"])
    return settings.from_options(parsed)


def environment(*files: str) -> dict[str, str]:
    return {
        entry["name"]: entry.get("value", "") for file in files for entry in container(file)["env"]
    }


def test_readiness_is_asked_where_no_pod_and_no_other_port_matters():
    probe = container("agent.yaml")["readinessProbe"]["httpGet"]
    chosen = read(environment("agent.yaml"))
    assert chosen.health == (probe["host"], probe["port"]) == ("127.0.0.1", 9465)
    assert probe["path"] == "/readyz"
    assert chosen.http == ("::", 9464)


@pytest.mark.parametrize("probe", ["livenessProbe", "startupProbe"])
def test_no_probe_kills_the_agent(probe):
    assert probe not in container("agent.yaml")


def test_no_host_port_keeps_the_agent_from_being_scheduled():
    assert pod("agent.yaml")["spec"]["hostNetwork"] is True
    assert "ports" not in container("agent.yaml")


def test_only_this_host_is_allowed_by_default_and_pods_with_the_component():
    assert read(environment("agent.yaml")).http_allow == ()
    chosen = read(environment("agent.yaml", "prometheus/agent.yaml"))
    assert [str(network) for network in chosen.http_allow] == ["10.244.0.0/16"]
    annotations = pod("prometheus/agent.yaml")["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(chosen.http[1])
