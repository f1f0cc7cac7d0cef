# SPDX-License-Identifier: Apache-2.0
"""A small API server for what the real one does not do on demand: gone versions, dropped, failing and silent watches."""

import asyncio
import contextlib
import json
import pathlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import yaml
from aiohttp import web

PATH = "/apis/example.dev/v1/things"


class FakeApi:
    """One collection of objects with lists in pages, watches and faults."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.lists = 0
        self.watches: list[str] = []  # the resource version each one asked for
        self.silent = False  # watches send nothing, as on a dead connection
        self.down = False
        self.retry_after_s = 0  # what it asks for while it is down
        self.refused: list[float] = []  # when
        self._version = 100
        self._history: list[tuple[int, dict[str, Any]]] = []
        self._oldest = 0
        self._changed = asyncio.Event()
        self._generation = 0  # a new one ends all watches
        self._failure = 0  # how they end: 0 without a word, else with this ERROR

    def put(self, name: str, **content: Any) -> None:
        """Create or change an object."""
        self._version += 1
        kind = "MODIFIED" if name in self.objects else "ADDED"
        metadata = {"name": name, "resourceVersion": str(self._version)}
        self.objects[name] = {"metadata": metadata, **content}
        self.tell({"type": kind, "object": self.objects[name]})

    def delete(self, name: str, *, silently: bool = False) -> None:
        """Delete an object; silently: no watch will ever tell."""
        self._version += 1
        gone = self.objects.pop(name)
        gone["metadata"]["resourceVersion"] = str(self._version)
        if not silently:
            self.tell({"type": "DELETED", "object": gone})

    def tell(self, event: dict[str, Any]) -> None:
        """Send an event of any kind to all watches."""
        self._history.append((self._version, event))
        self._wake()

    def fail(self, code: int) -> None:
        """End the open watch with an ERROR event."""
        self._failure = code
        self.drop()

    def expire(self) -> None:
        """Compact: every watch ends, and an old version cannot be resumed."""
        self._version += 1
        self._oldest = self._version
        self.drop()

    def drop(self) -> None:
        """End all watches without a word."""
        self._generation += 1
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve a list or a watch."""
        if self.down:
            self.refused.append(asyncio.get_running_loop().time())
            headers = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}
            raise web.HTTPServiceUnavailable(text='{"message": "down"}', headers=headers)
        if request.query.get("watch") == "true":
            return await self._watch(request)
        self.lists += 1
        names = sorted(self.objects)
        start = int(request.query.get("continue", "0"))
        end = start + int(request.query.get("limit", "500"))
        metadata = {"resourceVersion": str(self._version)}
        if end < len(names):
            metadata["continue"] = str(end)
        items = [self.objects[name] for name in names[start:end]]
        return web.json_response({"metadata": metadata, "items": items})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        self.watches.append(str(version))
        if version < self._oldest:
            return web.json_response({"code": 410, "message": "too old"}, status=410)
        generation = self._generation
        response = web.StreamResponse()
        await response.prepare(request)
        while generation == self._generation:
            changed = self._changed
            for at, event in list(self._history):
                if at > version and not self.silent:
                    await response.write(json.dumps(event).encode() + b"\n")
                    version = at
            await changed.wait()
        if self._failure:
            status = {"kind": "Status", "code": self._failure, "message": "injected"}
            await response.write(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")
            self._failure = 0
        return response


@contextlib.asynccontextmanager
async def serve(api: FakeApi, directory: pathlib.Path) -> AsyncIterator[pathlib.Path]:
    """Serve `api` on a free port and yield the kubeconfig that leads to it."""
    app = web.Application()
    app.router.add_get(PATH, api.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    kubeconfig = directory / "fake.conf"
    kubeconfig.write_text(kubeconfig_for(f"http://127.0.0.1:{port}"))
    try:
        yield kubeconfig
    finally:
        await runner.cleanup()


def kubeconfig_for(server: str) -> str:
    """Render a kubeconfig without credentials."""
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
        }
    )


class Proxy:
    """A TCP proxy that can lose the connection to the server behind it."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.port = 0

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def hang(self) -> None:
        """Keep every connection and take new ones, but pass nothing on any more."""
        self._flowing.clear()

    async def stop(self) -> None:
        """Close every connection and refuse new ones."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            there, back = await asyncio.open_connection(*self._target)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._copy(reader, back))
                    group.create_task(self._copy(there, writer))
            finally:
                back.close()
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                await self._flowing.wait()
                target.write(data)
                await target.drain()
        target.close()


class ProxyThread:
    """A Proxy in a thread of its own, for tests without an event loop."""

    def __init__(self, host: str, port: int) -> None:
        self._proxy = Proxy(host, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._proxy.port

    def start(self) -> None:
        """Let connections through."""
        asyncio.run_coroutine_threadsafe(self._proxy.start(), self._loop).result(10)

    def stop(self) -> None:
        """Close every connection and refuse new ones."""
        asyncio.run_coroutine_threadsafe(self._proxy.stop(), self._loop).result(10)

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
