# SPDX-License-Identifier: Apache-2.0
"""A real API server takes the CRDs, and refuses what the models refuse, at the same field."""

import json
import re
from pathlib import Path

import pytest

from hostint_api import names
from tests.api import cases

pytestmark = pytest.mark.cluster
CRDS = Path(__file__).parents[2] / "crds"


@pytest.fixture(scope="module")
def kubectl(api_server):
    api_server.kubectl("apply", "-k", str(CRDS))
    api_server.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    return api_server.kubectl


def submit(kubectl, kind: str, spec: dict, check: bool):
    body = {
        "apiVersion": names.API_VERSION,
        "kind": kind,
        "metadata": {"name": "case"},
        "spec": spec,
    }
    arguments = ["create", "--dry-run=server", "--validate=strict", "-f", "-"]
    return kubectl(*arguments, input=json.dumps(body), check=check)


@pytest.mark.parametrize("name", cases.ACCEPTED)
def test_a_good_object_is_accepted(kubectl, name):
    kind, spec = cases.ACCEPTED[name]
    assert "created" in submit(kubectl, kind, spec, check=True).stdout


@pytest.mark.parametrize("name", cases.REFUSED)
def test_a_bad_object_is_refused_at_the_same_field(kubectl, name):
    case = cases.REFUSED[name]
    refused = submit(kubectl, case.kind, case.spec, check=False)
    assert refused.returncode != 0, refused.stdout
    assert case.place in refused.stderr.replace("spec.spec", "spec")


CONDITIONS = [
    {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": "words",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
        "observedGeneration": 1,
    }
    for kind, status, reason in (
        ("Accepted", "True", "Valid"),
        ("Ready", "False", "NodesFailed"),
        ("CollectorReachable", "True", "Resolved"),
    )
]
# The longest text that an address can be.
ADDRESS = "2001:db8:1111:2222:3333:4444:5555:6666"
NODE_CONFIG = {
    "nodeID": 4294967295,
    "collectors": [
        {
            "name": "default",
            "address": ADDRESS,
            "port": 65535,
            "format": "TelemetryReportV05",
            "snapLength": 128,
            "dscp": 63,
            "reportsPerSecond": 10000000,
        }
    ],
    "ignored": [{"address": ADDRESS, "port": 65535}],
}
SHOWN = {
    "IntWatchlist": (
        "iwl",
        {"rules": [{"name": "web"}]},
        {
            "observedGeneration": 1,
            "rules": 5,
            "nodes": {"desired": 3, "ready": 1, "failed": 2, "summary": "1/3"},
            "conditions": CONDITIONS,
        },
        {
            "READY": "False",
            "REASON": "NodesFailed",
            "RULES": "5",
            "NODES": "1/3",
            "FAILED": "2",
        },
    ),
    "IntCollector": (
        "icol",
        {"address": "192.0.2.1"},
        {"observedGeneration": 1, "conditions": CONDITIONS},
        {
            "READY": "False",
            "REACHABLE": "True",
            "REASON": "Resolved",
            "ADDRESS": "192.0.2.1",
            "SERVICE": "",
        },
    ),
    "IntNodeConfig": (
        "inc",
        NODE_CONFIG,
        {"observedGeneration": 7, "watchlistsReady": "1/2", "agentVersion": "0.1.0"},
        {"GENERATION": "1", "OBSERVED": "7", "WATCHLISTS": "1/2", "AGENT": "0.1.0"},
    ),
}


def columns(table: str) -> dict[str, str]:
    """The only row of a table of kubectl's, by heading."""
    header, row = table.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", header)]
    ends = [*starts[1:], max(len(header), len(row))]
    return {
        header[begin:end].strip(): row[begin:end].strip()
        for begin, end in zip(starts, ends, strict=True)
    }


@pytest.mark.parametrize("kind", SHOWN)
def test_columns_show_the_status_which_is_written_apart(kubectl, kind):
    """And an object that nobody has looked at shows none of it, whatever status it was applied with."""
    short, spec, status, expected = SHOWN[kind]
    body = {
        "apiVersion": names.API_VERSION,
        "kind": kind,
        "metadata": {"name": "shown"},
        "spec": spec,
        "status": status,
    }
    kubectl("apply", "-f", "-", input=json.dumps(body))
    try:
        applied = json.loads(kubectl("get", short, "shown", "-o", "json").stdout)
        assert (applied["spec"], applied["status"]) == (spec, {"observedGeneration": -1})
        patch = json.dumps({"status": status})
        kubectl("patch", short, "shown", "--subresource=status", "--type=merge", "-p", patch)
        shown = columns(kubectl("get", short, "shown").stdout)
        shown.pop("AGE")
        assert shown == {"NAME": "shown", **expected}
        assert "shown" in kubectl("get", "int", "-o", "name").stdout
    finally:
        kubectl("delete", short, "shown")


def test_short_names_of_the_samples(kubectl):
    kubectl("apply", "-k", str(CRDS.parent / "manifests" / "samples"))
    try:
        shown = kubectl("get", "iwl,icol").stdout
        header = shown.splitlines()[0].split()
        assert header == ["NAME", "READY", "REASON", "RULES", "NODES", "FAILED", "AGE"]
        assert "intwatchlist.hostint.dev/web" in shown
        assert "intcollector.hostint.dev/network" in kubectl("get", "int", "-o", "name").stdout
    finally:
        kubectl("delete", "-k", str(CRDS.parent / "manifests" / "samples"))
