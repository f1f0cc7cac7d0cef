# SPDX-License-Identifier: Apache-2.0
"""Probes and metrics."""

import asyncio

import aiohttp
import pytest
from prometheus_client import core

from hostint_operator import http


async def fetch(port: int, path: str) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}{path}") as answer,
    ):
        return answer.status, await answer.text()


@pytest.mark.parametrize(("path", "other"), [("/readyz", "/healthz"), ("/healthz", "/readyz")])
def test_probes_fail_with_words_for_everything_that_is_wrong(path: str, other: str) -> None:
    async def work() -> None:
        wrong: dict[str, list[str]] = {"/readyz": [], "/healthz": []}
        health = http.Health(dead=lambda: wrong["/healthz"], not_ready=lambda: wrong["/readyz"])
        async with http.serve("127.0.0.1", 0, health, http.Metrics()) as port:
            assert await fetch(port, path) == (200, "ok\n")
            wrong[path] += ["nodes not listed yet", "pods not listed yet"]
            words = "nodes not listed yet\npods not listed yet\n"
            assert await fetch(port, path) == (503, words)
            assert await fetch(port, other) == (200, "ok\n")

    asyncio.run(work())


def test_metrics_hold_what_was_counted_and_what_is_read_on_demand() -> None:
    async def work() -> None:
        metrics = http.Metrics()
        metrics.applies.labels("node_config", "ok").inc()
        depth = core.GaugeMetricFamily("depth", "Depth", value=7)
        metrics.read_on_demand(lambda: [depth])
        health = http.Health(dead=list, not_ready=list)
        async with http.serve("127.0.0.1", 0, health, metrics) as port:
            status, text = await fetch(port, "/metrics")
        assert status == 200
        assert 'hostint_operator_applies_total{kind="node_config",result="ok"} 1.0' in text
        assert "depth 7.0" in text.splitlines()

    asyncio.run(work())
