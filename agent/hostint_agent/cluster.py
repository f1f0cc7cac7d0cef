# SPDX-License-Identifier: Apache-2.0
"""This node's IntNodeConfig: watch exactly that object, write exactly its status. The only module that knows kubernetes."""

import asyncio
import contextlib
import json
import math
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pydantic
import structlog
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from hostint_agent import spec_reader
from hostint_agent.agent import Wanted
from hostint_api import NodeConfigStatus, model, names

PATH = f"/apis/{names.API_VERSION}/{names.NODE_CONFIGS}"
_APPLY = "application/apply-patch+yaml"
_REQUEST_TIMEOUT_S = 15.0
_WATCH_TIMEOUT_S = 3600.0
# Bookmarks come about once a minute. A watch that says nothing for longer is broken, or begins at a
# version that the server does not have: etcd was restored from a backup.
SILENCE_S = 90.0
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.5, 30.0
# a contest about the status that has been over for so long is forgotten
_CALM_S = 60.0

log = structlog.get_logger()


class ApiError(Exception):
    """A request that did not succeed; status 0 where there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status


class SetupError(Exception):
    """There are no usable credentials; says which were looked for."""


@contextlib.asynccontextmanager
async def connect(kubeconfig: Path | None) -> AsyncIterator["Api"]:
    """Open a client: with the pod's own service account, or with a kubeconfig. Raises SetupError."""
    configuration = kubernetes_client.Configuration()
    # Python 3.13 refuses certificate authorities without keyUsage, which kubectl and all Go clients
    # take, and which clusters have that were made years ago.
    configuration.disable_strict_ssl_verification = True
    try:
        if kubeconfig is None:
            kubernetes_config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        else:
            await kubernetes_config.load_kube_config(  # type: ignore[no-untyped-call]
                str(kubeconfig), client_configuration=configuration, persist_config=False
            )
    except (kubernetes_config.ConfigException, OSError) as error:
        where = f"kubeconfig '{kubeconfig}'" if kubeconfig else "the pod's service account"
        raise SetupError(f"{where}: {error}") from error
    async with kubernetes_client.ApiClient(configuration) as client:
        yield Api(client)


class Api:
    """Requests to the API server."""

    def __init__(self, client: kubernetes_client.ApiClient) -> None:
        self._client = client

    @contextlib.asynccontextmanager
    async def open(
        self, method: str, path: str, query: dict[str, str], body: Any = None, timeout_s: float = 0
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request. Raises ApiError, also for what happens to the answer while it is read."""
        headers = {"Accept": "application/json"} | ({"Content-Type": _APPLY} if body else {})
        try:
            request = await self._client.param_serialize(
                method,
                path,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            answer = await self._client.call_api(
                *request, _request_timeout=timeout_s or _REQUEST_TIMEOUT_S
            )
            async with answer.response as response:
                if response.status >= 300:
                    raise ApiError(response.status, (await response.text())[:300])
                yield response
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if isinstance(error, aiohttp.ClientConnectorCertificateError):
                self._load_authority()
            raise ApiError(0, str(error) or type(error).__name__) from error

    def _load_authority(self) -> None:
        """Trust what the file of the certificate authority holds now: authorities are replaced."""
        client = self._client
        if client.configuration.ssl_ca_cert:
            with contextlib.suppress(OSError):
                client.rest_client.ssl_context.load_verify_locations(
                    client.configuration.ssl_ca_cert
                )


class Backoff:
    """Exponential, with jitter, so that thousands of agents do not come back together."""

    def __init__(self) -> None:
        self._delay_s = _FIRST_BACKOFF_S

    def reset(self) -> None:
        """What went wrong is over."""
        self._delay_s = _FIRST_BACKOFF_S

    def next_s(self) -> float:
        """Return how long to wait; longer the next time."""
        delay_s = self._delay_s * random.uniform(0.5, 1.5)  # noqa: S311
        self._delay_s = min(self._delay_s * 2, _LAST_BACKOFF_S)
        return delay_s

    async def sleep(self) -> None:
        """Wait, and longer the next time."""
        await asyncio.sleep(self.next_s())


class NodeConfig:
    """The object named like this node."""

    def __init__(self, api: Api, node: str, on_config: Callable[[Wanted], None]) -> None:
        self._api = api
        self._node = node
        self._on_config = on_config
        self._broken = False
        self._last: tuple[str | None, int, object] | None = None
        # the object as it was seen last, or written since
        self._uid: str | None = None
        self._status: Any = None
        # called whenever the object was seen
        self.on_seen: Callable[[], None] = lambda: None
        self._reader = spec_reader.SpecReader()

    async def watch(self) -> None:
        """Hand over every configuration, and its absence once that is certain; until cancelled."""
        version: str | None = None
        backoff = Backoff()
        while True:
            try:
                if version is None:
                    version = await self._list()
                before = version
                async for seen in self._events(version):
                    version = seen
                    backoff.reset()
                    self._note(None)
                # a server that ends every watch at once is in trouble, and not to be asked without pause
                if version == before:
                    await backoff.sleep()
            except (ApiError, ValueError) as error:
                # A server that was away may have gone back in time. A list is the truth.
                version = None
                self._note(error)
                await backoff.sleep()

    def _note(self, error: Exception | None) -> None:
        """Tell the first failure of a row, and its end."""
        if (error is not None) != self._broken:
            self._broken = error is not None
            if error:
                log.warning("api server not reachable, retrying", error=str(error))
            else:
                log.info("api server reachable again")

    @property
    def _selector(self) -> dict[str, str]:
        return {"fieldSelector": f"metadata.name={self._node}"}

    async def _list(self) -> str:
        async with self._api.open("GET", PATH, self._selector) as response:
            page = json.loads(await response.read())
        items = page["items"]
        self._take(items[0] if items else None)
        self._note(None)
        return str(page["metadata"]["resourceVersion"])

    async def _events(self, version: str) -> AsyncIterator[str]:
        query = self._selector | {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(240, 480)),  # noqa: S311
        }
        async with self._api.open("GET", PATH, query, timeout_s=_WATCH_TIMEOUT_S) as response:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    line = await response.content.readline()
                if not line:
                    return
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiError(
                        event["object"].get("code", 0), event["object"].get("message", "")
                    )
                if event["type"] != "BOOKMARK":
                    self._take(None if event["type"] == "DELETED" else event["object"])
                yield str(event["object"]["metadata"]["resourceVersion"])

    def _take(self, item: dict[str, Any] | None) -> None:
        """Hand over what is new; an object that does not make sense is told and changes nothing."""
        self._uid = item["metadata"]["uid"] if item else None
        self._status = item.get("status") if item else None
        self._take_spec(item)
        self.on_seen()

    def _take_spec(self, item: dict[str, Any] | None) -> None:
        if item is None:
            seen: tuple[str | None, int, object] = (None, 0, None)
        else:
            # A generation comes again with another spec where etcd was restored from a backup.
            digest = item["spec"].get("digest") if item.get("spec") else None
            seen = (item["metadata"]["uid"], item["metadata"]["generation"], digest)
        if seen == self._last:
            return
        self._last = seen
        if item is None:
            self._on_config(Wanted(None, 0))
            return
        try:
            spec = self._reader.read(item["spec"])
        except (pydantic.ValidationError, KeyError) as error:
            wrong = (
                model.problems(error, "spec")
                if isinstance(error, pydantic.ValidationError)
                else ["spec: Required value"]
            )
            log.error("configuration not usable", node=self._node, generation=seen[1], error=wrong)
            return
        self._on_config(Wanted(spec, seen[1]))

    def has(self, status: NodeConfigStatus) -> bool:
        """Return whether the object has this status, as far as it was seen."""
        return bool(self._status == _body(status))

    @property
    def uid(self) -> str | None:
        """Which object of this name there is; None: there is none."""
        return self._uid

    async def write_status(self, status: NodeConfigStatus) -> None:
        """Server-side apply the whole status. Raises ApiError."""
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.NODE_CONFIG_KIND,
            "metadata": {"name": self._node},
            "status": _body(status),
        }
        query = {"fieldManager": names.AGENT_MANAGER, "force": "true"}
        path = f"{PATH}/{self._node}/status"
        async with self._api.open("PATCH", path, query, body) as response:
            await response.read()
        self._status = _body(status)


def _body(status: NodeConfigStatus) -> dict[str, Any]:
    return status.model_dump(mode="json", by_alias=True)


class StatusWriter:
    """Writes the status when it has changed, and again until it is written.

    What was written is remembered per object: one that was made again may have the generation and
    digest of the one before, and no status. It is also written again if the object shows another.
    """

    def __init__(self, config: NodeConfig, status: Callable[[], NodeConfigStatus | None]) -> None:
        self._config = config
        self._status = status
        self._changed = asyncio.Event()
        self._written: tuple[str | None, NodeConfigStatus] | None = None
        # another process may write this node's status, too: each time it is answered later
        self._contest = Backoff()
        self._restore_at: float | None = None
        self._restored_at = -math.inf

    def poke(self) -> None:
        """The status may say something else now."""
        self._changed.set()

    async def run(self) -> None:
        """Write until cancelled."""
        backoff, failing = Backoff(), False
        while True:
            await self._changed.wait()
            self._changed.clear()
            status = self._status()
            if status is None or not status.observed_digest:
                continue
            uid = self._config.uid
            if (uid, status) == self._written and not self._must_restore(status):
                continue
            try:
                await self._config.write_status(status)
            except ApiError as error:
                if not failing:
                    log.warning("status not written, retrying", error=str(error))
                failing = True
                await backoff.sleep()
                self._changed.set()
            else:
                self._written, self._restore_at, failing = (uid, status), None, False
                backoff.reset()

    def _must_restore(self, status: NodeConfigStatus) -> bool:
        """Return True if the object has shown another status than the one written for long enough.

        Not at once: an event of before may have come late. Asks to be called again when it is time.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._config.has(status):
            self._restore_at = None
            return False
        if self._restore_at is None:
            if now - self._restored_at > _CALM_S:
                self._contest.reset()
            delay_s = self._contest.next_s()
            self._restore_at = now + delay_s
            loop.call_later(delay_s, self.poke)
        if now < self._restore_at:
            return False
        self._restore_at, self._restored_at = None, now
        return True
