# SPDX-License-Identifier: Apache-2.0
"""The users' objects come in here: kopf tells of changes, and a sweep now and then finds what no event told.

Only State is written. Nothing is ever written to the objects: no finalizers, no annotations, and no return values, which kopf would store.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import kopf
import pydantic
import structlog

from hostint_api import CollectorSpec, WatchlistSpec, model, names
from hostint_operator import desired_state
from hostint_operator.kube import client

log = structlog.get_logger()

Kind = Literal["watchlist", "collector"]

PLURALS: dict[Kind, str] = {"watchlist": names.WATCHLISTS, "collector": names.COLLECTORS}
KINDS: dict[Kind, str] = {"watchlist": names.WATCHLIST_KIND, "collector": names.COLLECTOR_KIND}


class Intake:
    """Puts IntWatchlists and IntCollectors into State and calls on_change(kind, name, whether more than its status changed).

    Events of one object can arrive late and out of order, and a sweep races with them: the resource version decides which is newer,
    for deletions too.
    """

    def __init__(
        self, state: desired_state.State, on_change: Callable[[Kind, str, bool], None]
    ) -> None:
        self._state = state
        self._on_change = on_change
        self._deleted: dict[tuple[Kind, str], int] = {}

    def put(self, kind: Kind, body: Mapping[str, Any]) -> None:
        """Take an object that exists."""
        metadata = body["metadata"]
        name, version = str(metadata["name"]), _version(metadata)
        known = self._store(kind).get(name)
        newest = max(known.version if known else -1, self._deleted.get((kind, name), -1))
        if version <= newest:
            return
        self._deleted.pop((kind, name), None)
        new = _read(kind, body)
        self._store(kind)[name] = new
        changed = known is None or known.uid != new.uid or known.generation != new.generation
        if changed:
            log.info("object seen", kind=KINDS[kind], name=name, generation=new.generation)
            if new.spec is None:
                log.warning("object not valid", kind=KINDS[kind], name=name, error=new.problem)
        self._on_change(kind, name, changed)

    def drop(self, kind: Kind, name: str, version: int) -> None:
        """Take a deletion that happened at `version`."""
        known = self._store(kind).get(name)
        if known is not None and known.version > version:
            return
        self._deleted[kind, name] = max(version, self._deleted.get((kind, name), -1))
        if known is not None:
            del self._store(kind)[name]
            log.info("object gone", kind=KINDS[kind], name=name)
            self._on_change(kind, name, True)

    async def sweep(self, api: client.Api, kind: Kind) -> None:
        """List the objects of a kind and make State agree; raise ApiError."""
        path = f"/apis/{names.GROUP}/{names.VERSION}/{PLURALS[kind]}"
        found = json.loads(await api.request("GET", path, timeout_s=30.0))
        version = _version(found["metadata"])
        for body in found["items"]:
            self.put(kind, body)
        present = {body["metadata"]["name"] for body in found["items"]}
        for name in set(self._store(kind)) - present:
            self.drop(kind, name, version)
        # A deletion older than this list needs no remembering: a late event of that object is undone by the next sweep.
        for key in [k for k, at in self._deleted.items() if k[0] == kind and at < version]:
            del self._deleted[key]

    def _store(self, kind: Kind) -> dict[str, Any]:
        return self._state.watchlists if kind == "watchlist" else self._state.collectors


def register(intake: Intake, login: Callable[[], Any]) -> kopf.OperatorRegistry:
    """Make a registry with the two event handlers and the login, and nothing else."""
    registry = kopf.OperatorRegistry()

    def handler(kind: Kind) -> Callable[..., Any]:
        async def see(event: Mapping[str, Any], **_: Any) -> None:
            body = event["object"]
            if event["type"] == "DELETED":
                intake.drop(kind, str(body["metadata"]["name"]), _version(body["metadata"]))
            else:
                intake.put(kind, body)

        return see

    for kind, plural in PLURALS.items():
        kopf.on.event(names.GROUP, names.VERSION, plural, id=f"see-{kind}", registry=registry)(
            handler(kind)
        )

    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        found: client.Credentials = await login()
        return kopf.ConnectionInfo(
            server=found.server,
            ca_path=found.ca_file,
            certificate_path=found.certificate_file,
            private_key_path=found.key_file,
            token=found.token,
            insecure=not found.verify,
        )

    kopf.on.login(id="log-in", registry=registry)(log_in)
    return registry


def settings() -> kopf.OperatorSettings:
    """Make kopf a front door that leaves no footprint and does not give up."""
    chosen = kopf.OperatorSettings()
    chosen.persistence.diffbase_storage = _NoDiffBase()
    chosen.persistence.progress_storage = _NoProgress()
    chosen.persistence.finalizer = f"{names.GROUP}/operator"
    chosen.posting.enabled = False
    chosen.peering.standalone = True
    chosen.scanning.disabled = True  # or it would watch all CRDs, which are large
    chosen.watching.chunk_size = 500
    chosen.watching.connect_timeout = 10
    chosen.watching.reconnect_backoff = 1.0
    chosen.queueing.idle_timeout = 1.0
    chosen.networking.request_timeout = 30
    chosen.networking.connect_timeout = 10
    chosen.networking.error_backoffs = _EndlessBackoff()
    chosen.process.ultimate_exiting_timeout = 25
    return chosen


class _EndlessBackoff:
    """Back-off without end: after the last one of a finite list kopf would stop the operator."""

    def __iter__(self) -> Iterator[float]:
        delay_s = 1.0
        while True:
            yield delay_s
            delay_s = min(delay_s * 2, 30.0)


class _NoDiffBase(kopf.DiffBaseStorage):
    """Keeps no copy of the spec: we derive everything from the world."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class _NoProgress(kopf.ProgressStorage):
    """Keeps no progress: event handlers have none."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: Any) -> Any:
        return essence


def _version(metadata: Mapping[str, Any]) -> int:
    try:
        return int(metadata.get("resourceVersion", ""))
    except ValueError:
        return 0


def _read(kind: Kind, body: Mapping[str, Any]) -> Any:
    metadata = body["metadata"]
    spec: Any = None
    problem = ""
    promise = WatchlistSpec if kind == "watchlist" else CollectorSpec
    try:
        spec = promise.model_validate(body.get("spec"))
    except pydantic.ValidationError as error:
        problem = "; ".join(model.problems(error, "spec"))
    return desired_state.UserObject(
        name=str(metadata["name"]),
        uid=str(metadata.get("uid", "")),
        generation=int(metadata.get("generation", 0)),
        version=_version(metadata),
        spec=spec,
        problem=problem,
        status=body.get("status") or {},
    )
