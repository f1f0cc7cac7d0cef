# SPDX-License-Identifier: Apache-2.0
"""A real API server takes the CRDs, and refuses what the models refuse, at the same field."""

import json
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


def test_short_names_and_columns(kubectl):
    kubectl("apply", "-k", str(CRDS.parent / "manifests" / "samples"))
    try:
        shown = kubectl("get", "iwl,icol").stdout
        header = shown.splitlines()[0].split()
        assert header == ["NAME", "READY", "REASON", "RULES", "NODES", "FAILED", "AGE"]
        assert "intwatchlist.hostint.dev/web" in shown
        assert "intcollector.hostint.dev/network" in kubectl("get", "int", "-o", "name").stdout
    finally:
        kubectl("delete", "-k", str(CRDS.parent / "manifests" / "samples"))
