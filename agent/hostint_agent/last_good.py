# SPDX-License-Identifier: Apache-2.0
"""The last configuration that went live, on disk: for a start without the API server, and to keep every name its place."""

import json
from dataclasses import dataclass
from pathlib import Path

import pydantic
import structlog

from hostint_agent.node_rules import Indexes
from hostint_api import NodeConfigSpec

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LastGood:
    """What was live. `spec` is None when that was: no configuration."""

    spec: NodeConfigSpec | None
    generation: int
    watchlists: Indexes
    collectors: Indexes


def _indexes(data: dict[str, object]) -> Indexes:
    names, retired = data["names"], data["retired"]
    if not isinstance(names, dict) or not isinstance(retired, list):
        raise TypeError("names is not an object, or retired not a list")
    return Indexes({str(k): int(v) for k, v in names.items()}, tuple(int(i) for i in retired))


def _path(directory: Path, node: str) -> Path:
    """One file a node: directories have been shared by several, and another node's configuration is a wrong one."""
    return directory / f"last-good-{node}.json"


def load(directory: Path, node: str) -> LastGood | None:
    """Read it; None if there is none, or none that can be understood (which is told)."""
    path = _path(directory, node)
    try:
        data = json.loads(path.read_text())
        spec = NodeConfigSpec.model_validate(data["spec"]) if data["spec"] else None
        return LastGood(
            spec,
            int(data["generation"]),
            _indexes(data["watchlists"]),
            _indexes(data["collectors"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, pydantic.ValidationError) as error:
        log.warning("last good configuration not usable", path=str(path), error=str(error))
        return None


def save(directory: Path, node: str, good: LastGood) -> None:
    """Write it, whole or not at all; a disk that refuses is told and does not stop anything."""
    data = {
        "spec": good.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
        if good.spec
        else None,
        "generation": good.generation,
        "watchlists": {"names": good.watchlists.names, "retired": good.watchlists.retired},
        "collectors": {"names": good.collectors.names, "retired": good.collectors.retired},
    }
    path = _path(directory, node)
    fresh = path.with_suffix(".new")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(data))
        fresh.replace(path)
    except OSError as error:
        log.warning("last good configuration not kept", path=str(path), error=str(error))
