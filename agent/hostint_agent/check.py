# SPDX-License-Identifier: Apache-2.0
"""`hostint-agent check`: validate objects in files with the messages that the API server would give."""

import sys
from collections.abc import Iterable
from pathlib import Path

from hostint_agent import yaml_objects
from hostint_api import WatchlistSpec, names


def warnings(objects: Iterable[yaml_objects.YamlObject]) -> list[str]:
    """What is valid in itself and will not work all the same, as far as these files tell."""
    listed = list(objects)
    collectors = {item.name for item in listed if item.kind == names.COLLECTOR_KIND}
    return [
        f"{item.path}: {item.kind} {item.name}: warning: collector '{item.spec.collector_name}' is in none of these files"
        for item in listed
        if isinstance(item.spec, WatchlistSpec) and item.spec.collector_name not in collectors
    ]


def run(paths: Iterable[Path]) -> int:
    """Print one line an object or problem; 0: all valid, 1: something is not, 2: a file could not be read."""
    objects, problems = yaml_objects.load_objects(paths)
    bad = {(problem.path, problem.where) for problem in problems}
    for item in objects:
        if (item.path, f"{item.kind} {item.name}") not in bad:
            print(f"{item.path}: {item.kind} {item.name}: ok")  # noqa: T201
    for line in warnings(objects):
        print(line, file=sys.stderr)  # noqa: T201
    for problem in problems:
        print(problem, file=sys.stderr)  # noqa: T201
    if any(problem.unreadable for problem in problems):
        return 2
    return 1 if problems else 0
