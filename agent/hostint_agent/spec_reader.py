# SPDX-License-Identifier: Apache-2.0
"""Pure: read an IntNodeConfig's spec, given those before it: rules that did not change are not validated again."""

import marshal
from collections.abc import Mapping
from typing import Any

from hostint_api import NodeConfigSpec, NodeRule


class SpecReader:
    """Reads one version of a spec after the other; what is the same in both is the same object in both."""

    def __init__(self) -> None:
        # by their content; marshal is the fastest way from nested dicts to something that can be a key
        self._rules: dict[bytes, NodeRule] = {}

    def read(self, spec: Mapping[str, Any]) -> NodeConfigSpec:
        """Validate a spec as it comes from the API server. Raises pydantic.ValidationError."""
        given = spec.get("rules")
        if not isinstance(given, list):
            return NodeConfigSpec.model_validate(spec)
        keys = [marshal.dumps(rule, 2) for rule in given]
        known = [self._rules.get(key, rule) for key, rule in zip(keys, given, strict=True)]
        read = NodeConfigSpec.model_validate({**spec, "rules": known})
        self._rules = dict(zip(keys, read.rules, strict=True))
        return read
