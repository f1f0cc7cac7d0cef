# SPDX-License-Identifier: Apache-2.0
"""The CRDs and the models are the same shape: names, required fields, enums and bounds."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hostint_agent import yaml_objects
from hostint_api import CollectorSpec, NodeConfigSpec, NodeConfigStatus, WatchlistSpec

CRDS = Path(__file__).parents[2] / "crds"
SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"
# what OpenAPI and JSON Schema say in other words, or only one of them can say
_SAME = {"minLength", "maxLength", "pattern", "minimum", "maximum", "minItems", "maxItems", "enum"}
_DURATION = {"type": "string"}


def crd(kind: str) -> dict[str, Any]:
    document = yaml.safe_load((CRDS / f"{kind}.yaml").read_text())
    return document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]


def flatten(schema: dict[str, Any], definitions: dict[str, Any], path: str, out: dict) -> None:
    if "$ref" in schema:
        flatten(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions, path, out)
        return
    branches = [b for b in schema.get("anyOf", ()) if b.get("type") != "null"]
    if branches:
        # a union of texts (networks, addresses) is a text
        rest = branches[0] if len(branches) == 1 else {"type": "string"}
        merged = {k: v for k, v in schema.items() if k != "anyOf"} | rest
        flatten(merged, definitions, path, out)
        return
    if "const" in schema:
        schema = {k: v for k, v in schema.items() if k != "const"} | {"enum": [schema["const"]]}
    if schema.get("type") == "array":
        out[path] = {k: schema[k] for k in ("minItems", "maxItems") if k in schema}
        flatten(schema.get("items", {}), definitions, f"{path}[]", out)
        return
    if "properties" in schema:
        out[path] = {"required": sorted(schema.get("required", ()))}
        for name, inside in schema["properties"].items():
            flatten(inside, definitions, f"{path}.{name}", out)
        return
    facts = {k: v for k, v in schema.items() if k in _SAME}
    if "enum" in facts:
        facts["enum"] = sorted(facts["enum"])
    out[path] = facts


def of_model(kind: type) -> dict[str, Any]:
    schema = kind.model_json_schema(by_alias=True, mode="validation")
    out: dict[str, Any] = {}
    flatten(schema, schema.get("$defs", {}), "", out)
    return out


def of_crd(schema: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    flatten(schema, {}, "", out)
    return out


def is_text_of_its_own(path: str) -> bool:
    """Durations, networks and addresses are numbers or objects in the models: compared by behaviour, not by shape."""
    last = path.rsplit(".", 1)[-1]
    return last in {"interval", "latencyChange", "congestionLatency", "address"} or path.endswith(
        "cidrs[]"
    )


@pytest.mark.parametrize(
    ("crd_name", "part", "kind"),
    [
        ("intwatchlist", "spec", WatchlistSpec),
        ("intcollector", "spec", CollectorSpec),
        ("intnodeconfig", "spec", NodeConfigSpec),
    ],
)
def test_fields_required_fields_and_bounds_agree(crd_name, part, kind):
    from_crd, from_model = of_crd(crd(crd_name)[part]), of_model(kind)
    assert set(from_crd) == set(from_model)
    compared = [path for path in from_crd if not is_text_of_its_own(path)]
    assert {p: from_crd[p] for p in compared} == {p: from_model[p] for p in compared}


def test_the_agents_status_fits_the_crd():
    """Fields and bounds; that the agent always writes observedGeneration is more than the CRD asks for."""
    from_crd, from_model = of_crd(crd("intnodeconfig")["status"]), of_model(NodeConfigStatus)
    assert from_crd.pop("") == {"required": []}
    assert from_model.pop("") == {"required": ["observedGeneration"]}
    assert from_model == from_crd


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_samples_are_valid(path):
    if path.name == "kustomization.yaml":
        assert sorted(yaml.safe_load(path.read_text())["resources"]) == sorted(
            other.name for other in SAMPLES.glob("*.yaml") if other != path
        )
        return
    objects, problems = yaml_objects.load_objects([path])
    assert objects
    assert problems == []


@pytest.mark.parametrize("name", ["intwatchlist", "intcollector", "intnodeconfig"])
def test_an_object_that_nobody_has_looked_at_says_so(name):
    assert crd(name)["status"]["default"] == {"observedGeneration": -1}
