# SPDX-License-Identifier: Apache-2.0
"""The whole operator on a real API server; agents are clients that write status."""

import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest

from hostint_api import names
from tests.operator.cluster import Cluster, Operator, replica, until

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster(api_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(api_server, tmp_path_factory.mktemp("operator"))
    made.set_up()
    yield made
    made.tear_down()


@pytest.fixture(scope="module")
def operator(cluster: Cluster) -> Iterator[Operator]:
    with replica(cluster, "first") as made:
        until("leadership", made.leads)
        yield made
        assert made.stop() == 0


@pytest.fixture
def world(cluster: Cluster, operator: Operator) -> Iterator[Cluster]:
    """Start every test with one collector and no watchlist."""
    cluster.kubectl("delete", "iwl,icol", "--all")
    cluster.apply(cluster.collector())
    for node in cluster.nodes:
        cluster.agent_ready(node, True)
        cluster.until_told(node, {})
    cluster.answer_all()
    yield cluster
    assert operator.process.poll() is None, operator.log.read_text()


def ready_watchlist(world: Cluster, name: str, **spec: Any) -> None:
    world.apply(world.watchlist(name, **spec))
    for node in world.nodes:
        world.until_current(node, name)
    world.answer_all()
    world.becomes("iwl", name, "Ready", "True", "Programmed")


def test_a_watchlist_reaches_its_nodes_and_becomes_ready_when_the_agents_say_so(
    world: Cluster,
) -> None:
    world.apply(world.watchlist("w"))
    message = world.becomes("iwl", "w", "Ready", "False", "Progressing")
    assert message == "0 of 2 nodes run generation 1"
    world.answer(world.nodes[0])
    until("half way", lambda: world.get("iwl", "w")["status"]["nodes"]["ready"] == 1)
    world.answer(world.nodes[1])
    world.kubectl("wait", "iwl/w", "--for=condition=Ready", "--timeout=10s")
    status = world.get("iwl", "w")["status"]
    assert status["nodes"] == {"desired": 2, "ready": 2, "failed": 0, "summary": "2/2"}
    assert (status["rules"], status["observedGeneration"]) == (1, 1)
    assert {c["type"] for c in status["conditions"]} == {"Accepted", "Ready"}
    spec = world.told(world.nodes[0])
    assert spec["nodeID"] == (10 << 24) + (77 << 16) + 1
    assert spec["collectors"][0]["address"] == "192.0.2.9"
    assert {"address": "192.0.2.9", "port": 4000} in spec["ignored"]
    assert world.condition("icol", f"c-{world.run}", "Ready")["status"] == "True"


def test_a_failing_node_is_named_with_the_agents_words(world: Cluster) -> None:
    world.apply(world.watchlist("w"))
    for node in world.nodes:
        world.until_current(node, "w")
    world.answer(world.nodes[0])
    world.answer(world.nodes[1], ready=False, reachable=False)
    message = world.becomes("iwl", "w", "Ready", "False", "NodesFailed")
    assert message == f"1 of 2 nodes failed: {world.nodes[1]}: no room in the chain"
    assert world.get("iwl", "w")["status"]["failures"] == [
        {"node": world.nodes[1], "reason": "AttachFailed", "message": "no room in the chain"}
    ]
    message = world.becomes("icol", f"c-{world.run}", "CollectorReachable", "False", "NoRoute")
    assert message == f"not reachable from 1 of 2 nodes; {world.nodes[1]}: no route to host"


def test_a_node_without_a_ready_agent_is_named_and_comes_back(world: Cluster) -> None:
    ready_watchlist(world, "w")
    world.agent_ready(world.nodes[0], False)
    message = world.becomes("iwl", "w", "Ready", "False", "NodesFailed")
    assert f"{world.nodes[0]}: no agent pod is Ready on this node" in message
    status = world.get("iwl", "w")["status"]
    assert [(f["node"], f["reason"]) for f in status["failures"]] == [
        (world.nodes[0], "AgentMissing")
    ]
    world.agent_ready(world.nodes[0], True)
    world.becomes("iwl", "w", "Ready", "True", "Programmed")


def test_one_watchlist_changes_without_the_other_ever_looking_unready(world: Cluster) -> None:
    ready_watchlist(world, "steady")
    before = world.condition("iwl", "steady", "Ready")["lastTransitionTime"]
    time.sleep(1.1)  # transition times have seconds
    ready_watchlist(world, "other")
    ready_watchlist(world, "other", priority=5)
    after = world.condition("iwl", "steady", "Ready")
    assert (after["status"], after["lastTransitionTime"]) == ("True", before)


def test_a_watchlist_without_its_collector_is_not_accepted_until_the_collector_comes(
    world: Cluster,
) -> None:
    late = f"late-{world.run}"
    world.apply(
        world.watchlist("waits", collectorRef={"name": late}), world.watchlist("unaffected")
    )
    message = world.becomes("iwl", "waits", "Accepted", "False", "CollectorNotFound")
    assert message == f"IntCollector '{late}' does not exist"
    world.until_told(world.nodes[0], {"unaffected": 1})
    world.apply(world.collector(late, address="192.0.2.10"))
    world.becomes("iwl", "waits", "Accepted", "True", "Valid")
    both = {"unaffected": 1, "waits": 1}
    world.until_told(world.nodes[0], both)
    world.kubectl("delete", "icol", late)
    world.becomes("iwl", "waits", "Accepted", "False", "CollectorNotFound")
    world.until_told(world.nodes[0], {"unaffected": 1})


def endpoint_slice(world: Cluster, *addresses: str) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "collector-1",
            "namespace": world.namespace,
            "labels": {"kubernetes.io/service-name": "collector"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [a], "conditions": {"ready": True}} for a in addresses],
        "ports": [{"name": "reports", "port": 5000, "protocol": "UDP"}],
    }


def test_the_endpoints_of_a_service_are_followed_and_its_cluster_ip_is_refused(
    world: Cluster,
) -> None:
    key = f"{world.namespace}/collector"
    reference = {"namespace": world.namespace, "name": "collector", "port": 4000}
    world.apply(world.watchlist("w"), world.collector(service=reference))
    name = f"c-{world.run}"
    message = world.becomes("icol", name, "CollectorReachable", "False", "ServiceNotFound")
    assert message == f"Service {key} does not exist"
    port = {"name": "reports", "port": 4000, "targetPort": 5000, "protocol": "UDP"}
    world.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "collector", "namespace": world.namespace},
            "spec": {"ports": [port]},
        }
    )
    world.becomes("icol", name, "CollectorReachable", "False", "NoEndpoints")
    message = world.becomes("iwl", "w", "Ready", "False", "CollectorUnreachable")
    assert f"Service {key} has no ready endpoint for UDP port 4000" in message
    for address in ("10.88.0.1", "10.88.0.2"):  # the second one: the pod has moved
        world.apply(endpoint_slice(world, address))
        for node in world.nodes:
            world.until_reports_go_to(node, address, 5000, seconds=3)
    world.becomes("icol", name, "CollectorReachable", "True", "Resolved")
    world.apply(endpoint_slice(world))
    world.until_told(world.nodes[0], {})
    world.becomes("iwl", "w", "Ready", "False", "CollectorUnreachable")
    virtual = world.get("svc", "collector", "-n", world.namespace)["spec"]["clusterIP"]
    world.kubectl("delete", "icol", name)
    world.apply(world.collector(address=virtual, port=4000))
    message = world.becomes("icol", name, "Accepted", "False", "ClusterIPAddress")
    assert f"use service: {{namespace: {world.namespace}, name: collector, port: 4000}}" in message
    world.kubectl("delete", "svc", "collector", "-n", world.namespace)
    world.becomes("icol", name, "Accepted", "True", "Valid")


def test_a_config_edited_or_deleted_by_hand_is_put_right(world: Cluster) -> None:
    ready_watchlist(world, "w")
    node = world.nodes[0]
    wanted = world.told(node)
    edits = [
        [{"op": "replace", "path": "/spec/nodeID", "value": 1}],
        [{"op": "replace", "path": "/spec/digest", "value": f"sha256:{0:064}"}],
        [{"op": "remove", "path": "/spec/rules/0"}],
        [{"op": "add", "path": "/spec/rules/0/protocol", "value": "UDP"}],
        [{"op": "add", "path": "/spec/rules/0/source", "value": {"cidrs": ["10.0.0.0/8"]}}],
        [{"op": "add", "path": "/spec/ignored/-", "value": {"address": "10.9.9.9", "port": 1}}],
    ]
    for edit in edits:
        world.kubectl("patch", "inc", node, "--type=json", "-p", json.dumps(edit))
        until(f"put right after {edit}", lambda: world.told(node) == wanted, seconds=3)
    world.kubectl("delete", "inc", node)
    until("made again", lambda: world.told(node) == wanted, seconds=3)


def test_the_config_of_a_node_goes_with_the_node(world: Cluster) -> None:
    extra = f"n3-{world.run}"
    world.add_node(extra, "10.77.0.3")
    until("configured", lambda: world.told(extra))
    world.kubectl("delete", "node", extra)
    until("collected", lambda: not world.get("inc", extra), seconds=60)


def test_a_change_is_written_within_moments_and_so_is_the_agents_answer(world: Cluster) -> None:
    ready_watchlist(world, "w")
    changes, answers = [], []
    for priority in range(1, 8):
        world.apply(world.watchlist("w", priority=priority))
        started = time.monotonic()
        for node in world.nodes:
            world.until_told(node, {"w": priority + 1})
        changes.append(time.monotonic() - started)
        world.answer_all()
        started = time.monotonic()
        world.becomes("iwl", "w", "Ready", "True", "Programmed")
        answers.append(time.monotonic() - started)
    # Each look costs a kubectl, about 0.1 s on a busy machine.
    assert statistics.median(changes) < 0.8
    assert statistics.median(answers) < 1.0


def test_nothing_of_the_users_objects_is_touched_but_their_status(world: Cluster) -> None:
    ready_watchlist(world, "w")
    for kind, name in (("iwl", "w"), ("icol", f"c-{world.run}")):
        metadata = world.get(kind, name, "--show-managed-fields")["metadata"]
        assert "finalizers" not in metadata
        assert list(metadata["annotations"]) == ["kubectl.kubernetes.io/last-applied-configuration"]
        managers = {(m["manager"], m.get("subresource", "")) for m in metadata["managedFields"]}
        assert {m for m in managers if not m[0].startswith("kubectl")} == {
            (names.OPERATOR_STATUS_MANAGER, "status")
        }
    metadata = world.get("inc", world.nodes[0], "--show-managed-fields")["metadata"]
    managers = {(m["manager"], m.get("subresource", "")) for m in metadata["managedFields"]}
    assert managers == {(names.OPERATOR_MANAGER, ""), (names.AGENT_MANAGER, "status")}


def test_a_leader_whose_lease_was_taken_exits(world: Cluster, operator: Operator) -> None:
    def hold(identity: str) -> None:
        patch = json.dumps({"spec": {"holderIdentity": identity}})
        world.kubectl("patch", "lease", "hostint-operator", "-n", world.namespace, "-p", patch)

    until("leadership", operator.leads)
    hold("thief")
    assert operator.process.wait(20) == 1
    assert "leadership lost" in operator.log.read_text()
    hold("")
    operator.start()
    operator.ready()
    until("leadership", operator.leads)


def test_a_second_replica_waits_and_takes_over_and_a_restart_writes_nothing(
    world: Cluster, operator: Operator
) -> None:
    ready_watchlist(world, "w")

    def versions() -> list[str]:
        objects = [("iwl", "w"), ("icol", f"c-{world.run}"), *(("inc", n) for n in world.nodes)]
        return [world.get(kind, name)["metadata"]["resourceVersion"] for kind, name in objects]

    time.sleep(1)  # longer than any status is held back
    before = versions()
    with replica(world, "second") as second:
        time.sleep(2)
        assert not second.leads()
        assert second.metric("hostint_operator_applies_total") == 0
        started = time.monotonic()
        assert operator.stop() == 0
        assert time.monotonic() - started < 3
        until("take-over", second.leads, seconds=10)
        world.apply(world.watchlist("w"))
        time.sleep(2)
        assert versions() == before
        world.apply(world.watchlist("w", priority=9))
        until("written by the second", lambda: world.told_watchlists(world.nodes[0])["w"] == 2)
        assert second.stop() == 0
        lease = world.get("lease", "hostint-operator", "-n", world.namespace)["spec"]
        assert lease.get("holderIdentity", "") == ""
    operator.start()
    operator.ready()
