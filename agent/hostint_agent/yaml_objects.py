# SPDX-License-Identifier: Apache-2.0
"""Read API objects from YAML files; what is wrong is a value, not an exception."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml

from hostint_api import CollectorSpec, WatchlistSpec, model, names

SPECS: dict[str, type[WatchlistSpec] | type[CollectorSpec]] = {
    names.WATCHLIST_KIND: WatchlistSpec,
    names.COLLECTOR_KIND: CollectorSpec,
}
_TOP_FIELDS = frozenset({"apiVersion", "kind", "metadata", "spec", "status"})


@dataclass(frozen=True, slots=True)
class YamlObject:
    """A valid object and the file it came from."""

    path: Path
    kind: str
    name: str
    spec: WatchlistSpec | CollectorSpec


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and where. `unreadable`: the file itself could not be read."""

    path: Path
    where: str
    message: str
    unreadable: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.where}{': ' if self.where else ''}{self.message}"


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice: one of the two would be silently lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _documents(path: Path) -> Iterable[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from enumerate(yaml.load_all(file, _Loader), start=1)


def _yaml_problem(path: Path, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return Problem(path, where, f"not YAML: {getattr(error, 'problem', None) or error}")


def _read_object(path: Path, number: int, data: Any) -> tuple[YamlObject | None, list[Problem]]:
    if not isinstance(data, dict):
        return None, [Problem(path, f"document {number}", "not an object with kind and spec")]
    kind = data.get("kind")
    metadata = data.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    where = f"{kind or 'object'} {name or f'(document {number})'}"
    problems = []
    if data.get("apiVersion") != names.API_VERSION:
        problems.append(
            f"apiVersion: Invalid value: {data.get('apiVersion')!r}: must be {names.API_VERSION}"
        )
    if kind not in SPECS:
        problems.append(f"kind: Unsupported value: {kind!r}: supported values: {', '.join(SPECS)}")
    if not isinstance(name, str) or not name:
        problems.append("metadata.name: Required value")
    problems += [f'unknown field "{key}"' for key in data if key not in _TOP_FIELDS]
    if problems or kind not in SPECS or not isinstance(name, str):
        return None, [Problem(path, where, text) for text in problems]
    if "spec" not in data:
        return None, [Problem(path, where, "spec: Required value")]
    try:
        spec = SPECS[kind].model_validate(data["spec"])
    except pydantic.ValidationError as error:
        return None, [Problem(path, where, text) for text in model.problems(error, "spec")]
    return YamlObject(path, kind, name, spec), []


def load_objects(paths: Iterable[Path]) -> tuple[list[YamlObject], list[Problem]]:
    """All objects of these files, and everything that is wrong with them."""
    objects: list[YamlObject] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            for number, data in _documents(path):
                if data is None:
                    continue
                found, wrong = _read_object(path, number, data)
                problems += wrong
                if found:
                    objects.append(found)
        except yaml.YAMLError as error:
            problems.append(_yaml_problem(path, error))
        except (OSError, UnicodeDecodeError) as error:
            words = getattr(error, "strerror", None) or str(error)
            problems.append(Problem(path, "", words, unreadable=True))
    problems += _duplicates(objects)
    return objects, problems


def _duplicates(objects: Iterable[YamlObject]) -> list[Problem]:
    first: dict[tuple[str, str], YamlObject] = {}
    problems = []
    for item in objects:
        other = first.setdefault((item.kind, item.name), item)
        if other is not item:
            problems.append(
                Problem(item.path, f"{item.kind} {item.name}", f"is in {other.path} as well")
            )
    return problems
