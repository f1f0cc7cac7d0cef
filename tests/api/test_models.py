# SPDX-License-Identifier: Apache-2.0
"""What the models accept and refuse, and in which words."""

import copy
import datetime
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostint_agent import yaml_objects
from hostint_api import NodeConfigSpec, conditions, model, node_config
from tests.api import cases


def value_at(place: str, spec: Any) -> Any:
    """What an object has at `spec.rules[0].source`."""
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", place):
        spec = spec[int(index)] if index else spec[name]
    return spec


@pytest.mark.parametrize("case", cases.REFUSED.values(), ids=cases.REFUSED)
def test_a_bad_object_is_refused_by_field_and_value(case):
    with pytest.raises(pydantic.ValidationError) as caught:
        yaml_objects.SPECS[case.kind].model_validate(case.spec)
    told = model.problems(caught.value, "spec")
    assert len(told) == 1, told
    if case.words == "unknown field":
        assert told == [f'unknown field "{case.place}"']
        return
    value = value_at(case.place, case.spec)
    shown = str(len(value)) if "at most 256 items" in case.words else json.dumps(value)
    begin = rf"{re.escape(case.place)}: (Invalid value|Unsupported value|Too many): "
    assert re.match(begin + re.escape(shown) + ": ", told[0]), told
    assert case.words in told[0]


@pytest.mark.parametrize("name", cases.ACCEPTED)
def test_a_good_object_survives_a_round_trip(name):
    kind, spec = cases.ACCEPTED[name]
    read = yaml_objects.SPECS[kind].model_validate(spec)
    written = read.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert yaml_objects.SPECS[kind].model_validate(written) == read


UNITS_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


@given(st.integers(0, 999_999), st.sampled_from(sorted(UNITS_NS)))
def test_durations_are_read_as_they_are_written(number, unit):
    duration_ns = model.parse_duration(f"{number}{unit}")
    assert duration_ns == number * UNITS_NS[unit]
    assert model.parse_duration(model.format_duration(duration_ns)) == duration_ns


@pytest.mark.parametrize(
    "text", ["", "1", "s", "1.5s", "-1s", "1 s", "1S", "1000000s", "1s\n", "１s"]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="a number and a unit"):
        model.parse_duration(text)


WHOLE = {
    "nodeID": 7,
    "collectors": [
        {
            "name": "default",
            "address": "192.0.2.9",
            "port": 4000,
            "format": "TelemetryReportV05",
            "snapLength": 128,
            "dscp": 8,
            "reportsPerSecond": 10,
        }
    ],
    "ignored": [{"address": "192.0.2.9", "port": 4000}],
    "watchlists": [
        {
            "name": "shop",
            "generation": 3,
            "collector": "default",
            "events": ["Flow", "Drop"],
            "intervalNs": 5,
            "latencyChangeNs": 6,
            "congestionLatencyNs": 7,
            "sample": 8,
        }
    ],
    "rules": [
        {
            "id": 9,
            "watchlist": "shop",
            "name": "web",
            "action": "Ignore",
            "protocol": "TCP",
            "source": {"cidrs": ["10.0.0.0/8"], "ports": [{"port": 2, "endPort": 9}]},
            "destination": {"cidrs": ["10.0.0.0/8"], "ports": [{"port": 2, "endPort": 9}]},
            "bidirectional": True,
        }
    ],
}
# Another good value for a text; numbers are counted down.
OTHER = {
    "192.0.2.9": "192.0.2.8",
    "10.0.0.0/8": "10.0.0.0/9",
    "Ignore": "Report",
    "TCP": "UDP",
    "Flow": "Queue",
    "Drop": "Queue",
}


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something that is neither a list nor an object."""
    if not isinstance(value, dict | list):
        yield path
        return
    for key, inside in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inside, (*path, key))


def with_another(path: tuple[Any, ...]) -> dict[str, Any]:
    """WHOLE with one value changed."""
    changed = copy.deepcopy(WHOLE)
    inside: Any = changed
    for key in path[:-1]:
        inside = inside[key]
    value = inside[path[-1]]
    if isinstance(value, bool):
        inside[path[-1]] = not value
    else:
        inside[path[-1]] = value - 1 if isinstance(value, int) else OTHER.get(value, f"{value}-2")
    return changed


ALL = [path for path in leaves(WHOLE) if path[-1] != "format"]  # which has one value only


def test_digest_is_tested_with_every_field():
    whole = NodeConfigSpec.model_validate(WHOLE)
    assert whole.model_dump(mode="json", by_alias=True, exclude={"digest"}) == WHOLE


@pytest.mark.parametrize("path", ALL, ids=lambda path: ".".join(map(str, path)))
def test_the_digest_changes_with_every_value(path):
    changed = NodeConfigSpec.model_validate(with_another(path))
    whole = NodeConfigSpec.model_validate(WHOLE)
    assert changed != whole
    assert node_config.digest(changed) != node_config.digest(whole)


def test_the_digest_is_of_the_canonical_json():
    text = json.dumps(WHOLE, sort_keys=True, separators=(",", ":"))
    expected = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    assert node_config.digest(NodeConfigSpec.model_validate(WHOLE)) == expected


def test_the_digest_is_not_of_itself():
    spec = NodeConfigSpec.model_validate(WHOLE)
    named = spec.model_copy(update={"digest": node_config.digest(spec)})
    assert node_config.digest(named) == node_config.digest(spec)


def test_a_transition_time_moves_only_with_the_status():
    first = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    later = first + datetime.timedelta(hours=1)
    ready = conditions.set_condition(None, "Ready", True, "Programmed", "", 1, first)
    same = conditions.set_condition(ready, "Ready", True, "Other", "words", 2, later)
    moved = conditions.set_condition(same, "Ready", False, "Other", "words", 2, later)
    assert same["lastTransitionTime"] == ready["lastTransitionTime"] == "2026-01-01T00:00:00Z"
    assert moved["lastTransitionTime"] == "2026-01-01T01:00:00Z"
