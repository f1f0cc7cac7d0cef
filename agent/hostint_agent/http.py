# SPDX-License-Identifier: Apache-2.0
"""The agent's HTTP server: /metrics, /healthz, /readyz and /api/v1/topology."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import prometheus_client
from aiohttp import web
from prometheus_client import core


class HttpError(Exception):
    """The server could not listen; says where and why."""


class Collector:
    """Asks for the metrics at every scrape."""

    def __init__(self, collect: Callable[[], Iterable[core.Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[core.Metric]:
        """All metric families now."""
        return self._collect()


def _health(trouble: str | None) -> web.Response:
    return web.Response(text=f"{trouble or 'ok'}\n", status=503 if trouble else 200)


@contextlib.asynccontextmanager
async def serve(
    listen: tuple[str, int] | None,
    *,
    metrics: Callable[[], Iterable[core.Metric]],
    not_alive: Callable[[], str | None],
    not_ready: Callable[[], str | None],
    topology: Callable[[], dict[str, Any]],
) -> AsyncIterator[None]:
    """Serve until left; `not_alive` and `not_ready` say why not, or None. Raises HttpError."""
    if listen is None:
        yield
        return
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(metrics))

    async def get_metrics(_: web.Request) -> web.Response:
        body = prometheus_client.generate_latest(registry)
        return web.Response(
            body=body, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        )

    async def get_healthz(_: web.Request) -> web.Response:
        return _health(not_alive())

    async def get_readyz(_: web.Request) -> web.Response:
        return _health(not_ready())

    async def get_topology(_: web.Request) -> web.Response:
        return web.json_response(topology())

    app = web.Application()
    app.router.add_get("/metrics", get_metrics)
    app.router.add_get("/healthz", get_healthz)
    app.router.add_get("/readyz", get_readyz)
    app.router.add_get("/api/v1/topology", get_topology)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, *listen).start()
        except OSError as error:
            raise HttpError(f"http {listen[0]}:{listen[1]}: {error.strerror}") from error
        yield
    finally:
        await runner.cleanup()
