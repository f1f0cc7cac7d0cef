# SPDX-License-Identifier: Apache-2.0
"""Status tells the truth, in words, soon: collectors that are not there, agents that are gone, hands that edit."""

import json
import time

import pytest

from tests.e2e import deployment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
ALL = {"source": {"cidrs": ["10.244.0.0/16"]}}
# where no liveness time-out is involved
SOON_S = 5.0
LIVENESS_S = 40.0


def expect(clean, name: str, condition: str, status: str, reason: str, words: str, within_s: float):
    found = deployment.wait_condition(clean.cluster, "iwl", name, condition, status, within_s)
    assert found[1] == reason, found
    assert words in found[2], found


def test_a_collector_that_does_not_exist(clean):
    deployment.apply(
        clean.cluster, deployment.watchlist("lost", ALL, collectorRef={"name": "nowhere"})
    )
    expect(clean, "lost", "Accepted", "False", "CollectorNotFound", "nowhere", SOON_S)
    deployment.wait_condition(clean.cluster, "iwl", "lost", "Ready", "False", SOON_S)


def test_a_watchlist_beside_a_bad_one_is_not_disturbed(clean):
    clean.watch("good", ALL)
    deployment.apply(
        clean.cluster, deployment.watchlist("bad", ALL, collectorRef={"name": "nowhere"})
    )
    expect(clean, "bad", "Accepted", "False", "CollectorNotFound", "nowhere", SOON_S)
    assert deployment.conditions(clean.cluster.get("iwl", "good"))["Ready"][0] == "True"


def test_a_collector_name_that_does_not_resolve(clean):
    deployment.apply(
        clean.cluster,
        deployment.collector("odd", address="collector.invalid"),
        deployment.watchlist("odd", ALL, collectorRef={"name": "odd"}),
    )

    def told() -> tuple[str, str, str] | None:
        found = deployment.conditions(clean.cluster.get("icol", "odd")).get("CollectorReachable")
        return found if found and found[1] == "DNSFailure" else None

    found = deployment.wait_for(told, LIVENESS_S)
    assert found[0] == "False"
    assert "collector.invalid" in found[2]
    deployment.wait_condition(clean.cluster, "iwl", "odd", "Ready", "False", SOON_S)
    clean.cluster.kubectl("delete", "icol", "odd")


def test_a_cluster_ip_as_address_is_refused_with_advice(clean):
    address = clean.cluster.get("service", "web", "-n", "demo")["spec"]["clusterIP"]
    deployment.apply(clean.cluster, deployment.collector("vip", address=address))
    found = deployment.wait_condition(clean.cluster, "icol", "vip", "Accepted", "False", SOON_S)
    assert found[1] == "ClusterIPAddress"
    assert "service" in found[2]
    clean.cluster.kubectl("delete", "icol", "vip")


def test_a_collector_service_without_endpoints(clean):
    service = {"namespace": "demo", "name": "nobody", "port": 32766}
    body = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "nobody", "namespace": "demo"},
        "spec": {"selector": {"app": "nobody"}, "ports": [{"port": 32766, "protocol": "UDP"}]},
    }
    deployment.apply(clean.cluster, body, deployment.collector("empty", service=service))
    found = deployment.wait_condition(
        clean.cluster, "icol", "empty", "CollectorReachable", "False", SOON_S
    )
    assert found[1] == "NoEndpoints"
    clean.cluster.kubectl("delete", "icol", "empty")


def test_a_node_config_edited_by_hand_is_put_right(clean):
    clean.watch("web", ALL)
    wanted = clean.cluster.get("inc", "node-1")["spec"]
    patch = json.dumps({"spec": {"rules": [], "nodeID": 1}})
    clean.cluster.kubectl("patch", "inc", "node-1", "--type=merge", "-p", patch)
    deployment.wait_for(
        lambda: clean.cluster.get("inc", "node-1")["spec"] == wanted,
        SOON_S,
        lambda: str(clean.cluster.get("inc", "node-1")["spec"]),
    )


def test_an_agent_that_is_gone_is_named(clean):
    clean.watch("web", ALL)
    kubectl = clean.cluster.kubectl
    only_first = {
        "spec": {"template": {"spec": {"nodeSelector": {"kubernetes.io/hostname": "node-1"}}}}
    }
    everywhere = {"spec": {"template": {"spec": {"nodeSelector": None}}}}
    where = ["patch", "ds", "hostint-agent", "-n", deployment.NAMESPACE, "--type=merge", "-p"]
    kubectl(*where, json.dumps(only_first))
    try:
        found = deployment.wait_condition(clean.cluster, "iwl", "web", "Ready", "False", LIVENESS_S)
        assert "node-2" in found[2], found
        status = clean.cluster.get("iwl", "web")["status"]
        assert status["failures"][0]["node"] == "node-2"
        assert status["failures"][0]["reason"] == "AgentMissing"
        assert status["nodes"]["summary"] == "1/2"
    finally:
        kubectl(*where, json.dumps(everywhere))
    kubectl("wait", "--for=condition=Ready", "iwl/web", "--timeout=60s", timeout=70)


def test_reports_are_never_reported_and_the_rate_stays_flat(clean):
    """Everything is watched on every node, and the collector is a pod among them."""
    cluster = clean.cluster
    deployment.install_collector(cluster)
    log = deployment.CollectorLog(cluster)
    try:
        deployment.apply(
            cluster,
            deployment.watchlist(
                "everything",
                {"source": {"cidrs": ["0.0.0.0/0"]}},
                {"source": {"cidrs": ["::/0"]}},
                report={"interval": "1s", "latencyChange": "0s"},
            ),
        )
        cluster.kubectl("wait", "--for=condition=Ready", "iwl/everything", "--timeout=30s")
        log.wait(lambda r: r["kind"] == "flow", 20)
        rates = []
        for _ in range(3):
            log.clear()
            time.sleep(4)
            rates.append(len(log.records()) / 4)
        seen = log.records(lambda r: r["inner"]["destinationPort"] == 32766)
        assert seen == []
        assert rates[-1] <= 1.5 * rates[0] + 20, rates
        print(f"reports a second, everything watched: {rates}")
    finally:
        log.stop()
        cluster.kubectl("delete", "iwl", "--all")


def test_a_collector_pod_that_moves_is_followed(clean):
    """What is sent once the operator has followed arrives at the new pod."""
    cluster = clean.cluster
    deployment.install_collector(cluster)
    log = deployment.CollectorLog(cluster)
    where = [
        "patch",
        "deployment",
        "hostint-collector",
        "-n",
        deployment.NAMESPACE,
        "--type=merge",
        "-p",
    ]
    try:
        deployment.apply(
            cluster,
            deployment.watchlist("web", {"protocol": "TCP", **ALL}, report={"interval": "10ms"}),
        )
        cluster.kubectl("wait", "--for=condition=Ready", "iwl/web", "--timeout=30s")
        log.wait(lambda r: r["kind"] == "flow", 20)
        old = cluster.get("inc", "node-1")["spec"]["collectors"][0]["address"]
        here = deployment.pod_of(
            cluster, deployment.NAMESPACE, "app.kubernetes.io/name=hostint-collector"
        )
        other = "node-2" if here.node == "node-1" else "node-1"
        cluster.kubectl(*where, json.dumps({"spec": {"template": {"spec": {"nodeName": other}}}}))
        followed = deployment.wait_for(
            lambda: (
                (a := cluster.get("inc", "node-1")["spec"]["collectors"])
                and a[0]["address"] != old
                and a[0]["address"]
            ),
            60,
        )
        log.clear()
        record = log.wait(lambda r: r["kind"] == "flow", 20)
        assert record
        there = deployment.pod_of(
            cluster, deployment.NAMESPACE, "app.kubernetes.io/name=hostint-collector"
        )
        assert (there.address, there.node) == (followed, other)
        assert clean.cluster.get("icol", "default")["status"]["conditions"]
    finally:
        log.stop()
        cluster.kubectl(*where, json.dumps({"spec": {"template": {"spec": {"nodeName": None}}}}))
        cluster.kubectl("delete", "iwl", "--all")
