# SPDX-License-Identifier: Apache-2.0
"""A spec that is read with what was read before is the spec that it would be without."""

import copy

import pydantic
import pytest

from hostint_agent import spec_reader
from hostint_api import NodeConfigSpec


def rule(number: int, **changes) -> dict:
    source = {"cidrs": [f"10.0.{number}.0/24"], "ports": [{"port": 1}]}
    whole = {"id": number, "watchlist": "shop", "name": f"r{number}", "action": "Report"}
    return whole | {"protocol": "TCP", "source": source} | changes


def spec(*rules: dict) -> dict:
    # what comes from the API server is new from the ground up every time
    return copy.deepcopy({"nodeID": 1, "rules": list(rules)})


def test_only_what_changed_is_another_object():
    reader = spec_reader.SpecReader()
    first = reader.read(spec(rule(1), rule(2), rule(3)))
    second = reader.read(spec(rule(3), rule(2, action="Ignore"), rule(1)))
    assert second == NodeConfigSpec.model_validate(spec(rule(3), rule(2, action="Ignore"), rule(1)))
    assert second.rules[0] is first.rules[2]
    assert second.rules[2] is first.rules[0]


def test_what_is_wrong_is_refused_with_its_place_and_forgotten():
    reader = spec_reader.SpecReader()
    first = reader.read(spec(rule(1), rule(2)))
    with pytest.raises(pydantic.ValidationError, match=r"rules.1.protocol"):
        reader.read(spec(rule(1), rule(2, protocol="TPC")))
    assert reader.read(spec(rule(1), rule(2))).rules[1] is first.rules[1]


@pytest.mark.parametrize("rules", [None, "none", {"a": 1}])
def test_rules_that_are_no_list_are_refused(rules):
    with pytest.raises(pydantic.ValidationError, match="rules"):
        spec_reader.SpecReader().read({"nodeID": 1, "rules": rules})


def test_a_spec_without_rules_has_none():
    assert spec_reader.SpecReader().read({"nodeID": 1}).rules == ()


def test_rules_that_went_are_forgotten():
    reader = spec_reader.SpecReader()
    first = reader.read(spec(rule(1)))
    reader.read(spec())
    assert reader.read(spec(rule(1))).rules[0] is not first.rules[0]
