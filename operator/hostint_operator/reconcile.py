# SPDX-License-Identifier: Apache-2.0
"""Makes the cluster agree with what is known now: one queue, one plan, one server-side apply per difference.

Level-triggered: events only name what may have to be done. What is to be done is derived from State when its turn comes.
"""

import asyncio
import datetime
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import structlog

from hostint_api import names
from hostint_operator import compile as compiler
from hostint_operator import desired_state, endpoints, http, intake, observe, resolver, status
from hostint_operator.kube import client, work_queue

log = structlog.get_logger()

# Collects what comes in one burst, such as `kubectl apply` of several objects.
DEBOUNCE_S = 0.02
# Collects the answers of many agents; and at most two writes a second of one object's status.
STATUS_DEBOUNCE_S = 0.05
STATUS_INTERVAL_S = 0.5
# How long a collector may keep its endpoints while those of its changed spec are being looked up.
LOOKUP_GRACE_S = 5.0
WORKERS = 8

PATH = f"/apis/{names.API_VERSION}"

CONFLICT = 409
NOT_FOUND = 404


@dataclass(frozen=True, slots=True)
class Key:
    """Something that may have to be done."""

    kind: Literal["plan", "node", "watchlist", "collector"]
    name: str = ""


PLAN = Key("plan")


class Reconciler:
    """Works off what may have changed. Reads and compiles on every replica; `run` is for the leader only.

    `may_write` is asked before every write: leadership can end between two of them.
    """

    def __init__(
        self,
        api: client.Api,
        state: desired_state.State,
        metrics: http.Metrics,
        *,
        may_write: Callable[[], bool] = lambda: True,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self.queue: work_queue.WorkQueue[Key] = work_queue.WorkQueue()
        self.busy_since: dict[Key, float] = {}
        self._api = api
        self._state = state
        self._metrics = metrics
        self._may_write = may_write
        self._now = now
        self._observers: observe.Observers | None = None
        self._resolver: resolver.Resolver | None = None
        self._plan: compiler.Plan | None = None
        self._digests: dict[desired_state.NodeName, str] = {}  # wanted ones, of this plan
        self._outdated: dict[desired_state.NodeName, float] = {}  # since when an agent lags behind
        self._looked_up: dict[str, float] = {}  # since when a collector is being looked up
        self._status_not_before: dict[Key, float] = {}

    def attach(self, observers: observe.Observers, names_of: resolver.Resolver) -> None:
        """Name those who look up what collectors refer to."""
        self._observers = observers
        self._resolver = names_of

    # What the world tells; called from reflectors, intake and resolver.

    def inputs_changed(self) -> None:
        """Take note that a plan may come out differently."""
        self.queue.add(PLAN, DEBOUNCE_S)

    def node_changed(self, name: desired_state.NodeName) -> None:
        """Take note that a node's config was changed, or its agent has something to say."""
        if name in self._state.nodes:
            self.queue.add(Key("node", name), DEBOUNCE_S)
        self._all_statuses()

    def object_changed(self, kind: intake.Kind, name: str, changed: bool) -> None:
        """Take note that a user's object was changed, or only its status."""
        self._status(Key(kind, name))
        if changed:
            self.inputs_changed()

    # What is done about it.

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            key = await self.queue.get()
            self.busy_since[key] = time.monotonic()
            try:
                await self._handle(key)
            except client.ApiError as error:
                delay_s = self.queue.retry(key, error.retry_after_s)
                log.warning(
                    "write failed, retrying",
                    kind=key.kind,
                    name=key.name,
                    error=str(error),
                    delay_s=round(delay_s, 1),
                )
            else:
                self.queue.done(key)
            finally:
                del self.busy_since[key]

    async def _handle(self, key: Key) -> None:
        if key == PLAN:
            self.plan()
        elif key.kind == "node":
            await self._reconcile_node(desired_state.NodeName(key.name))
        elif key.kind == "watchlist":
            await self._report_watchlist(key)
        else:
            await self._report_collector(key)

    def plan(self) -> None:
        """Decide anew for the whole cluster and queue everything that may have to be written."""
        started = time.perf_counter()
        state = self._state
        self._follow()
        self._plan = compiler.plan(
            dict(state.watchlists), dict(state.collectors), dict(state.nodes), self._resolve()
        )
        self._digests.clear()
        self._forget()
        self._metrics.plan_seconds.observe(time.perf_counter() - started)
        for name in state.nodes:
            self.queue.add(Key("node", name))
        self._all_statuses()

    def _forget(self) -> None:
        """Keep nothing of what is gone."""
        for node in set(self._outdated) - set(self._state.nodes):
            del self._outdated[node]
        for key in list(self._status_not_before):
            known: Iterable[str] = (
                self._state.watchlists if key.kind == "watchlist" else self._state.collectors
            )
            if key.name not in known:
                del self._status_not_before[key]

    def _follow(self) -> None:
        """Tell those who look things up what the collectors refer to now."""
        specs = [c.spec for c in self._state.collectors.values() if c.spec is not None]
        if self._observers is not None:
            self._observers.follow_services(
                endpoints.service_key(spec.service) for spec in specs if spec.service is not None
            )
        if self._resolver is not None:
            hosts = (endpoints.host_name(spec) for spec in specs)
            self._resolver.follow(host for host in hosts if host is not None)

    def _resolve(self) -> dict[str, endpoints.Resolution]:
        """Resolve every collector; one whose new target is still being looked up keeps its old endpoints for a moment."""
        now = time.monotonic()
        old = self._plan.resolutions if self._plan else {}
        resolutions = {}
        for name, collector in self._state.collectors.items():
            if not self._being_looked_up(collector):
                self._looked_up.pop(name, None)
            elif now - self._looked_up.setdefault(name, now) < LOOKUP_GRACE_S:
                self.queue.add(PLAN, 0.05)
                if name in old:
                    resolutions[name] = old[name]
                    continue
            resolutions[name] = endpoints.resolve(collector, self._state)
        return resolutions

    def _being_looked_up(self, collector: desired_state.Collector) -> bool:
        spec = collector.spec
        if spec is None:
            return False
        if spec.service is not None:
            key = endpoints.service_key(spec.service)
            return self._observers is not None and not self._observers.services_synced(key)
        host = endpoints.host_name(spec)
        return host is not None and host not in self._state.dns

    def _wanted_digest(self, node: desired_state.Node) -> str:
        assert self._plan is not None  # noqa: S101  nothing but the plan itself is queued before the first plan
        if node.name not in self._digests:
            self._digests[node.name] = compiler.node_spec(self._plan, node).digest
        return self._digests[node.name]

    async def _reconcile_node(self, name: desired_state.NodeName) -> None:
        node = self._state.nodes.get(name)
        if node is None or self._plan is None:  # its object goes with it, by its ownerReference
            return
        observed = self._state.node_configs.get(name)
        if (
            observed is not None
            and observed.owner_uid == node.uid
            and observed.digest == self._wanted_digest(node)
        ):
            return
        spec = compiler.node_spec(self._plan, node)
        intent = {
            "apiVersion": names.API_VERSION,
            "kind": names.NODE_CONFIG_KIND,
            "metadata": {
                "name": name,
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": "Node", "name": name, "uid": node.uid}
                ],
            },
            "spec": spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        }
        applied = await self._apply(
            "node_config", f"{PATH}/{names.NODE_CONFIGS}/{name}", intent, names.OPERATOR_MANAGER
        )
        _, written = observe.read_node_config(observe.WireNodeConfig.model_validate(applied))
        known = self._state.node_configs.get(name)
        if known is None or known.uid != written.uid or known.version <= written.version:
            self._state.node_configs[name] = written
        log.info("node config applied", node=name, rules=len(spec.rules), digest=spec.digest)
        self._all_statuses()

    # Status of the users' objects.

    def _all_statuses(self) -> None:
        for name in self._state.watchlists:
            self._status(Key("watchlist", name))
        for name in self._state.collectors:
            self._status(Key("collector", name))

    def _status(self, key: Key, delay_s: float = STATUS_DEBOUNCE_S) -> None:
        wait_s = self._status_not_before.get(key, 0.0) - time.monotonic()
        self.queue.add(key, max(delay_s, wait_s))

    async def _report_watchlist(self, key: Key) -> None:
        watchlist = self._state.watchlists.get(key.name)
        if watchlist is None or self._plan is None or key.name not in self._plan.verdicts:
            return  # gone, or so new that the plan which comes next asks again
        told = status.watchlist_status(
            watchlist, self._plan.verdicts[key.name], self._views(watchlist), self._now()
        )
        await self._write_status(key, names.WATCHLISTS, names.WATCHLIST_KIND, watchlist, told)

    async def _report_collector(self, key: Key) -> None:
        collector = self._state.collectors.get(key.name)
        if collector is None or self._plan is None or key.name not in self._plan.resolutions:
            return
        said: dict[str, desired_state.CollectorOnNode] = {
            name: config.collectors[key.name]
            for name, config in self._state.node_configs.items()
            if key.name in config.collectors and name in self._state.nodes
        }
        told = status.collector_status(
            collector, self._plan.resolutions[key.name], said, self._now()
        )
        await self._write_status(key, names.COLLECTORS, names.COLLECTOR_KIND, collector, told)

    def _views(self, watchlist: desired_state.Watchlist) -> list[status.NodeView]:
        """Look at every node that the watchlist selects."""
        if watchlist.spec is None:
            return []
        with_agent = self._state.nodes_with_agent()
        return [
            status.node_view(
                node.name,
                watchlist,
                wanted_digest=self._wanted_digest(node),
                config=self._state.node_configs.get(node.name),
                has_agent=node.name in with_agent,
                outdated_s=self._outdated_s(node),
            )
            for node in self._state.nodes.values()
            if compiler.selects(watchlist.spec, node)
        ]

    def _outdated_s(self, node: desired_state.Node) -> float:
        """Return for how long the node's agent has not run what it should."""
        config = self._state.node_configs.get(node.name)
        if config is not None and config.observed_digest == self._wanted_digest(node):
            self._outdated.pop(node.name, None)
            return 0.0
        now = time.monotonic()
        return now - self._outdated.setdefault(node.name, now)

    async def _write_status(
        self,
        key: Key,
        plural: str,
        kind: str,
        known: desired_state.UserObject[Any],
        told: status.Told,
    ) -> None:
        if told.look_again_s is not None:
            self._status(key, told.look_again_s)
        if told.status == known.status:
            return
        intent = {
            "apiVersion": names.API_VERSION,
            "kind": kind,
            # The uid makes the API server refuse it for an object that was deleted and made again.
            "metadata": {"name": key.name, "uid": known.uid},
            "status": told.status,
        }
        path = f"{PATH}/{plural}/{key.name}/status"
        self._status_not_before[key] = time.monotonic() + STATUS_INTERVAL_S
        try:
            applied = await self._apply(key.kind, path, intent, names.OPERATOR_STATUS_MANAGER)
        except client.ApiError as error:
            if error.status in (CONFLICT, NOT_FOUND):
                log.info("status not written, the object is gone", kind=kind, name=key.name)
                return
            raise
        self._remember_status(key, applied)

    def _remember_status(self, key: Key, applied: dict[str, Any]) -> None:
        """Take what the API server now holds, as far as it is not already newer here."""
        store: dict[str, Any]
        store = self._state.watchlists if key.kind == "watchlist" else self._state.collectors
        current: desired_state.UserObject[Any] | None = store.get(key.name)
        metadata = applied["metadata"]
        version = int(metadata["resourceVersion"])
        if (
            current is not None
            and (current.uid, current.generation) == (metadata["uid"], metadata["generation"])
            and current.version < version
        ):
            store[key.name] = replace(current, version=version, status=applied["status"])

    async def _apply(
        self, kind: str, path: str, intent: dict[str, Any], manager: str
    ) -> dict[str, Any]:
        if not self._may_write():
            raise client.ApiError(0, "not written: this replica does not hold the lease")
        try:
            applied = await self._api.apply(path, intent, manager)
        except client.ApiError as error:
            self._metrics.applies.labels(kind, str(error.status or "no answer")).inc()
            raise
        self._metrics.applies.labels(kind, "ok").inc()
        return applied
