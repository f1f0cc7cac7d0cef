# SPDX-License-Identifier: Apache-2.0
"""What the models accept and refuse, and in which words."""

import datetime

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostint_agent import yaml_objects
from hostint_api import NodeConfigSpec, conditions, model, node_config
from tests.api import cases


@pytest.mark.parametrize("case", cases.REFUSED.values(), ids=cases.REFUSED)
def test_a_bad_object_is_refused_by_field_and_value(case):
    with pytest.raises(pydantic.ValidationError) as caught:
        yaml_objects.SPECS[case.kind].model_validate(case.spec)
    told = model.problems(caught.value, "spec")
    assert len(told) == 1, told
    assert case.place in told[0]
    assert case.words in told[0]


@pytest.mark.parametrize("name", cases.ACCEPTED)
def test_a_good_object_survives_a_round_trip(name):
    kind, spec = cases.ACCEPTED[name]
    read = yaml_objects.SPECS[kind].model_validate(spec)
    written = read.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert yaml_objects.SPECS[kind].model_validate(written) == read


@given(st.integers(0, 3_600_000_000_000))
def test_durations_are_read_as_they_are_written(duration_ns):
    text = model.format_duration(duration_ns)
    if len(text.rstrip("nsumh")) <= 6:
        assert model.parse_duration(text) == duration_ns


def test_the_digest_is_of_the_content_and_not_of_itself():
    spec = NodeConfigSpec(node_id=7)
    named = spec.model_copy(update={"digest": node_config.digest(spec)})
    assert node_config.digest(named) == node_config.digest(spec)
    assert node_config.digest(NodeConfigSpec(node_id=8)) != node_config.digest(spec)


def test_a_transition_time_moves_only_with_the_status():
    first = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    later = first + datetime.timedelta(hours=1)
    ready = conditions.set_condition(None, "Ready", True, "Programmed", "", 1, first)
    same = conditions.set_condition(ready, "Ready", True, "Other", "words", 2, later)
    moved = conditions.set_condition(same, "Ready", False, "Other", "words", 2, later)
    assert same["lastTransitionTime"] == ready["lastTransitionTime"] == "2026-01-01T00:00:00Z"
    assert moved["lastTransitionTime"] == "2026-01-01T01:00:00Z"
