# SPDX-License-Identifier: Apache-2.0
"""Health and metrics over HTTP. In the operator's own event loop on purpose: a blocked loop must fail the liveness probe."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import prometheus_client
from aiohttp import web
from prometheus_client import core, registry


@dataclass(frozen=True, slots=True)
class Health:
    """What the probes ask: words for each thing that is wrong; none means well."""

    dead: Callable[[], list[str]]
    not_ready: Callable[[], list[str]]


class Metrics:
    """The operator's counters, and gauges that are read when somebody asks."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.applies = prometheus_client.Counter(
            "hostint_operator_applies",
            "Server-side applies by kind and result",
            ["kind", "result"],
            registry=self.registry,
        )
        self.plan_seconds = prometheus_client.Histogram(
            "hostint_operator_plan_seconds",
            "Seconds to plan the whole cluster",
            registry=self.registry,
        )

    def read_on_demand(self, read: Callable[[], Iterable[core.Metric]]) -> None:
        """Add metrics that are made at the time of a scrape."""
        self.registry.register(_OnDemand(read))

    def render(self) -> bytes:
        """Render everything in the Prometheus text format."""
        return prometheus_client.generate_latest(self.registry)


class _OnDemand(registry.Collector):
    def __init__(self, read: Callable[[], Iterable[core.Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[core.Metric]:
        return self._read()


@contextlib.asynccontextmanager
async def serve(host: str, port: int, health: Health, metrics: Metrics) -> AsyncIterator[int]:
    """Serve /healthz, /readyz and /metrics; yield the port, which is a free one if 0 was asked for."""

    async def healthz(_: web.Request) -> web.Response:
        return _answer(health.dead())

    async def readyz(_: web.Request) -> web.Response:
        return _answer(health.not_ready())

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(
            body=metrics.render(), headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        )

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", scrape)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def _answer(problems: list[str]) -> web.Response:
    if problems:
        return web.Response(status=503, text="\n".join(problems) + "\n")
    return web.Response(text="ok\n")
