# SPDX-License-Identifier: Apache-2.0
"""The last configuration that went live, on disk.

An agent starts with it without the API server, and every name keeps its index in the maps. The file
may be damaged, or of a newer version that has larger maps: what cannot be used is logged and left
out. Without the specification the agent waits for one; without the indexes it assigns new ones, as
on a node that has no file.
"""

import contextlib
import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import structlog

from hostint_agent import bpf_types, node_rules
from hostint_agent.node_rules import Indexes
from hostint_api import NodeConfigSpec, model

# many times the largest specification that etcd takes
_MAX_BYTES = 16 << 20
# names of nodes that are part of a file name as they are; a file name has 255 bytes
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class LastGood:
    """What was live. `spec` is None when that was: no configuration."""

    spec: NodeConfigSpec | None
    generation: int
    watchlists: Indexes
    collectors: Indexes


def _integer(value: object, what: str, first: int, limit: int) -> int:
    """Return `value` if it is an integer of first..limit-1. Raises ValueError."""
    if type(value) is int and first <= value < limit:
        return value
    raise ValueError(f"{what}: {value!r:.80} is not an integer of {first}..{limit - 1}")


def _indexes(data: Mapping[str, object], kind: str, first: int, limit: int) -> Indexes:
    """Return the indexes of one kind. Raises ValueError, KeyError or TypeError."""
    names, retired = data["names"], data["retired"]
    if not isinstance(names, dict) or not isinstance(retired, list):
        raise TypeError(f"{kind}: names is not an object, or retired not a list")
    found = Indexes(
        {name: _integer(i, f"{kind}.names.{name}", first, limit) for name, i in names.items()},
        tuple(_integer(i, f"{kind}.retired", first, limit) for i in retired),
    )
    used = [*found.names.values(), *found.retired]
    if len(set(used)) < len(used):
        raise ValueError(f"{kind}: an index is there twice")
    return found


def _path(directory: Path, node: str) -> Path:
    """Return the node's own file: another node's configuration is a wrong one."""
    known = node if _PLAIN_NAME.fullmatch(node) else hashlib.sha256(node.encode()).hexdigest()
    return directory / f"last-good-{known}.json"


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a file. Raises OSError, ValueError, TypeError or RecursionError."""
    status = path.stat()
    # the read of a FIFO would wait for ever
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a file")
    if status.st_size > _MAX_BYTES:
        raise ValueError(f"{status.st_size} bytes, {_MAX_BYTES} are allowed")
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise TypeError("not a JSON object")
    return data


def _words(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(model.problems(error, "spec"))
    if isinstance(error, OSError):
        return str(error.strerror)
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


def load(directory: Path, node: str) -> LastGood | None:
    """Return what the file holds; None if there is no file, or no specification in it."""
    path = _path(directory, node)
    try:
        data = _read(path)
        spec = None if data["spec"] is None else NodeConfigSpec.model_validate(data["spec"])
        generation = _integer(data["generation"], "generation", 0, 1 << 63)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("last good configuration not usable", path=str(path), error=_words(error))
        return None
    watchlists = collectors = Indexes()
    try:
        watchlists = _indexes(
            data["watchlists"],
            "watchlists",
            node_rules.FIRST_WATCHLIST,
            bpf_types.MAX_WATCHLISTS,
        )
        collectors = _indexes(data["collectors"], "collectors", 0, bpf_types.MAX_COLLECTORS)
    except (ValueError, KeyError, TypeError) as error:
        log.warning(
            "indexes of the last good configuration not usable, assigning new ones",
            path=str(path),
            error=_words(error),
        )
        watchlists = collectors = Indexes()
    return LastGood(spec, generation, watchlists, collectors)


class Keeper:
    """Keeps the last good configuration of one node."""

    def __init__(self, directory: Path, node: str) -> None:
        """Nothing is read or written yet."""
        self._directory, self._path = directory, _path(directory, node)
        self._failing = False

    def save(self, good: LastGood) -> None:
        """Write the file, whole or not at all. A disk that refuses is logged once."""
        try:
            self._write(good)
        except OSError as error:
            if not self._failing:
                log.warning(
                    "last good configuration not kept",
                    path=str(self._path),
                    error=_words(error),
                )
            self._failing = True
        else:
            if self._failing:
                log.info("last good configuration kept again", path=str(self._path))
            self._failing = False

    def _write(self, good: LastGood) -> None:
        """Raises OSError."""
        data = {
            "spec": good.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
            if good.spec
            else None,
            "generation": good.generation,
            "watchlists": {"names": good.watchlists.names, "retired": good.watchlists.retired},
            "collectors": {"names": good.collectors.names, "retired": good.collectors.retired},
        }
        fresh = self._path.with_suffix(".new")
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            fresh.write_text(json.dumps(data))
            fresh.replace(self._path)
        except OSError:
            # half a file would take room from a disk that is full
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise
