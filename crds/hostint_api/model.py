# SPDX-License-Identifier: Apache-2.0
"""The base of all models, the field types they share, and how an invalid object is told in the API server's words."""

import ipaddress
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

import pydantic
from pydantic import alias_generators

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_DURATION = re.compile(r"([0-9]{1,6})(ns|us|ms|s|m|h)")
DURATION_PATTERN = r"^[0-9]{1,6}(ns|us|ms|s|m|h)$"
_UNIT_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


class Model(pydantic.BaseModel):
    """Frozen; camelCase outside, snake_case inside; an unknown field is an error."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        alias_generator=alias_generators.to_camel,
    )


def parse_duration(text: str) -> int:
    """Turn `100us`, `1s` or `5m` into nanoseconds. Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if not match:
        raise ValueError(
            "must be a number and a unit of ns, us, ms, s, m or h, such as 100us or 1s"
        )
    return int(match[1]) * _UNIT_NS[match[2]]


def format_duration(duration_ns: int) -> str:
    """Write nanoseconds in the largest unit that holds them as a whole number."""
    for unit in ("h", "m", "s", "ms", "us"):
        if duration_ns and duration_ns % _UNIT_NS[unit] == 0:
            return f"{duration_ns // _UNIT_NS[unit]}{unit}"
    return f"{duration_ns}ns" if duration_ns else "0s"


def _read_duration(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


# nanoseconds inside, `100us` outside
Duration = Annotated[
    int, pydantic.BeforeValidator(_read_duration), pydantic.PlainSerializer(format_duration)
]


def parse_cidr(text: str) -> Network:
    """Read a CIDR whose host bits are zero. Raises ValueError."""
    if "/" not in text:
        raise ValueError("must be an IPv4 or IPv6 CIDR such as 10.0.0.0/8 or fd00::/8")
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("must be an IPv4 or IPv6 CIDR such as 10.0.0.0/8 or fd00::/8") from None
    if ipaddress.ip_address(text.split("/")[0]) != network.network_address:
        raise ValueError(f"host bits must be zero ({network}, not {text})")
    return network


def _read_cidr(value: object) -> object:
    return parse_cidr(value) if isinstance(value, str) else value


Cidr = Annotated[Network, pydantic.BeforeValidator(_read_cidr), pydantic.PlainSerializer(str)]
Port = Annotated[int, pydantic.Field(ge=1, le=65535)]
Name = Annotated[str, pydantic.Field(min_length=1, max_length=253)]


def _field_path(location: Sequence[int | str], root: str) -> str:
    """Write a place inside an object as the API server does: `spec.rules[0].source`."""
    path = root
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else part)
    return path


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError:
        return json.dumps(str(value))


def _problem(error: Any, root: str) -> str:
    path, value = _field_path(error["loc"], root), _shown(error["input"])
    limits = error.get("ctx", {})
    match error["type"]:
        case "missing":
            return f"{path}: Required value"
        case "extra_forbidden":
            return f"unknown field {_shown(path)}"
        case "literal_error":
            allowed = limits["expected"].replace(" or ", ", ").replace("'", '"')
            return f"{path}: Unsupported value: {value}: supported values: {allowed}"
        case "too_long":
            most = limits["max_length"]
            return f"{path}: Too many: {limits['actual_length']}: must have at most {most} items"
        case "too_short":
            return (
                f"{path}: Invalid value: {value}: must have at least {limits['min_length']} items"
            )
        case "greater_than_equal":
            return f"{path}: Invalid value: {value}: must be at least {_limit(error, limits['ge'])}"
        case "less_than_equal":
            return f"{path}: Invalid value: {value}: must be at most {_limit(error, limits['le'])}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{path}: Invalid value: {value}: {message}"


def _limit(error: Any, limit: int) -> str:
    """A limit in the unit of the value: durations are text outside."""
    return format_duration(limit) if isinstance(error["input"], str) else str(limit)


def problems(error: pydantic.ValidationError, root: str = "") -> list[str]:
    """Say what is wrong with an object as the API server would: field path, value, what is allowed; one line each.

    `root` is the place of the validated part within the object, such as `spec`.
    """
    errors = error.errors(include_url=False)
    places = [details["loc"] for details in errors]

    def follows_from_another(details: Any) -> bool:
        here = details["loc"]
        inside = (p for p in places if len(p) > len(here) and p[: len(here)] == here)
        # a list that lost its invalid items is not too short by itself
        return details["type"] == "too_short" and any(inside)

    return [_problem(details, root) for details in errors if not follows_from_another(details)]
