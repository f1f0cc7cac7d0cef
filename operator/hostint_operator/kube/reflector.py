# SPDX-License-Identifier: Apache-2.0
"""Mirrors one collection of the API server in memory and tells of changes; heals whatever a watch can miss."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Generic, Literal, TypeVar

import aiohttp
import pydantic
import structlog

from hostint_operator.kube import client

log = structlog.get_logger()


GONE = 410
LIST_TIMEOUT_S = 60.0
WATCH_TIMEOUT_S = 3600.0


class Metadata(pydantic.BaseModel):
    """What we read of any object's metadata."""

    name: str
    namespace: str = ""
    uid: str = ""
    generation: int = 0
    labels: dict[str, str] = {}
    version: str = pydantic.Field(alias="resourceVersion")


class Resource(pydantic.BaseModel):
    """The base of every wire model: a pruned object, of which only the declared fields are kept."""

    metadata: Metadata


T = TypeVar("T", bound=Resource)
R = TypeVar("R")  # slim immutable record kept in memory


class _ListMeta(pydantic.BaseModel):
    version: str = pydantic.Field("", alias="resourceVersion")
    next: str = pydantic.Field("", alias="continue")


class _Page(pydantic.BaseModel, Generic[T]):
    metadata: _ListMeta
    items: list[T]


class _BookmarkMeta(pydantic.BaseModel):
    version: str = pydantic.Field(alias="resourceVersion")


class _BookmarkObject(pydantic.BaseModel):
    metadata: _BookmarkMeta


class _Change(pydantic.BaseModel, Generic[T]):
    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: T


class _Bookmark(pydantic.BaseModel):
    type: Literal["BOOKMARK"]
    object: _BookmarkObject


class _Failure(pydantic.BaseModel):
    code: int = 0
    message: str = ""


class _Error(pydantic.BaseModel):
    type: Literal["ERROR"]
    object: _Failure


class Reflector(Generic[T, R]):
    """Keep `store` equal to what `path` lists, calling on_change(key, old, new) for each difference.

    `read` returns the key and the record of an object, or None for one that does not count. `silence_s` is how long a watch may
    stay without a word (bookmarks come about once a minute) before it is taken for dead.
    """

    def __init__(
        self,
        api: client.Api,
        path: str,
        model: type[T],
        read: Callable[[T], tuple[str, R] | None],
        on_change: Callable[[str, R | None, R | None], None],
        *,
        selector: Mapping[str, str] | None = None,
        page: int = 500,
        silence_s: float = 90.0,
        backoff_s: float = 0.5,
    ) -> None:
        self.path = path
        self.store: dict[str, R] = {}
        self.synced = asyncio.Event()
        self.relists = 0
        self.heard_at: float | None = None
        self._api = api
        self._read = read
        self._on_change = on_change
        self._selector = dict(selector or {})
        self._page_size = page
        self._silence_s = silence_s
        self._backoff_s = backoff_s
        self._broken = False
        self._page = pydantic.TypeAdapter(_Page[model])  # type: ignore[valid-type]
        event = Annotated[
            _Change[model] | _Bookmark | _Error,  # type: ignore[valid-type]
            pydantic.Field(discriminator="type"),
        ]
        self._event: pydantic.TypeAdapter[_Change[T] | _Bookmark | _Error]
        self._event = pydantic.TypeAdapter(event)

    async def run(self) -> None:
        """Mirror until cancelled."""
        version: str | None = None
        backoff_s = self._backoff_s
        while True:
            try:
                if version is None:
                    version = await self._relist()
                    self.synced.set()
                    backoff_s = self._backoff_s
                async for seen in self._watch(version):
                    version = seen
                    backoff_s = self._backoff_s
                self._note(None)
                delay_s = 0.0
            except client.ApiError as error:
                if error.status == GONE:
                    version = None
                self._note(error)
                delay_s = max(backoff_s, error.retry_after_s)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                # The version is kept: the next watch continues where this one stopped.
                self._note(error)
                delay_s = backoff_s
            except ValueError as error:
                # Not the protocol we know, or a line that is too long: only a new list can be trusted.
                version = None
                self._note(error)
                delay_s = backoff_s
            # Even a watch that ends well waits a little, so that a server which ends all of them at once is not hammered.
            await asyncio.sleep(max(delay_s, 0.05) * random.uniform(0.5, 1.5))  # noqa: S311
            backoff_s = min(backoff_s * 2, 30.0)

    def _note(self, error: Exception | None) -> None:
        """Log the first failure of a row, and its end."""
        if (error is not None) == self._broken:
            return
        self._broken = error is not None
        if error is not None:
            log.warning("watch broken, retrying", path=self.path, error=str(error) or repr(error))
        else:
            log.info("watch restored", path=self.path)

    async def _relist(self) -> str:
        self.relists += 1
        missing = set(self.store)
        query = self._selector | {"limit": str(self._page_size)}
        while True:
            answer = await self._api.request(
                "GET", self.path, query=query, timeout_s=LIST_TIMEOUT_S
            )
            page = self._page.validate_json(answer)
            for item in page.items:
                entry = self._read(item)
                if entry is not None:
                    missing.discard(entry[0])
                    self._put(*entry)
            if not page.metadata.next:
                break
            query["continue"] = page.metadata.next
        for key in missing:  # deletions that nobody told us about
            self._put(key, None)
        self._heard()
        return page.metadata.version

    async def _watch(self, version: str) -> AsyncIterator[str]:
        query = self._selector | {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(random.randint(240, 480)),  # noqa: S311
        }
        async with self._api.stream(self.path, query, WATCH_TIMEOUT_S) as lines:
            self._heard()
            while True:
                async with asyncio.timeout(self._silence_s):
                    line = await lines.readline()
                if not line:
                    return
                self._heard()
                yield self._take(line)

    def _heard(self) -> None:
        self.heard_at = asyncio.get_running_loop().time()

    def _take(self, line: bytes) -> str:
        """Act on one line of a watch and return the resource version it carries."""
        event = self._event.validate_json(line)
        if isinstance(event, _Error):
            raise client.ApiError(event.object.code, event.object.message)
        self._note(None)
        if isinstance(event, _Bookmark):
            return event.object.metadata.version
        entry = self._read(event.object)
        if entry is not None:
            self._put(entry[0], None if event.type == "DELETED" else entry[1])
        return event.object.metadata.version

    def _put(self, key: str, new: R | None) -> None:
        old = self.store.get(key)
        if new is None:
            self.store.pop(key, None)
        else:
            self.store[key] = new
        if old != new:  # equal records: nothing that we read has changed
            self._on_change(key, old, new)
