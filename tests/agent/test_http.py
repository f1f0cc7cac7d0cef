# SPDX-License-Identifier: Apache-2.0
"""The HTTP server says what the agent says, and why it cannot listen."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from hostint_agent import bpf_types, counters, http, metrics

SNAPSHOT = metrics.Snapshot(
    version="9.9",
    watchlists={"shop": dict.fromkeys(counters.WATCHLIST_FIELDS, 3)},
    datapath={counter.name.lower(): 1 for counter in bpf_types.DatapathCounter},
    drops={"NETFILTER_DROP": 5},
    exported={"default": (10, 2)},
    rings=[0, 4],
    attached=2,
    not_attached=1,
    rules=6,
    generation=3,
    config_errors=0,
)


def asked(
    questions: Callable[[str], Awaitable[None]], *, dead: str | None = None, late: str | None = None
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def scenario() -> None:
        async with http.serve(
            ("127.0.0.1", port),
            metrics=lambda: metrics.families(SNAPSHOT),
            not_alive=lambda: dead,
            not_ready=lambda: late,
            topology=lambda: {"links": []},
        ):
            await questions(f"http://127.0.0.1:{port}")

    asyncio.run(scenario())


async def get(url: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.text()


def test_metrics_have_a_value_and_help_for_every_counter():
    async def questions(address: str) -> None:
        status, text = await get(f"{address}/metrics")
        assert status == 200
        for field in counters.WATCHLIST_FIELDS:
            assert f'hostint_{field}_total{{watchlist="shop"}} 3.0' in text
            assert f"# HELP hostint_{field}_total " in text
        for counter in bpf_types.DatapathCounter:
            assert f"hostint_{counter.name.lower()}_total 1.0" in text
        for line in (
            'hostint_drops_by_reason_total{reason="NETFILTER_DROP"} 5.0',
            'hostint_reports_sent_total{collector="default"} 10.0',
            'hostint_reports_failed_total{collector="default"} 2.0',
            'hostint_ring_records{ring="1"} 4.0',
            "hostint_interfaces_attached 2.0",
            "hostint_interfaces_failed 1.0",
            'hostint_build_info{version="9.9"} 1.0',
        ):
            assert line in text

    asked(questions)


def test_health_is_ok_while_nothing_is_wrong():
    async def questions(address: str) -> None:
        assert await get(f"{address}/healthz") == (200, "ok\n")
        assert await get(f"{address}/readyz") == (200, "ok\n")
        assert await get(f"{address}/api/v1/topology") == (200, '{"links": []}')

    asked(questions)


def test_health_says_what_is_wrong():
    async def questions(address: str) -> None:
        assert await get(f"{address}/healthz") == (503, "dead\n")
        assert await get(f"{address}/readyz") == (503, "late\n")

    asked(questions, dead="dead", late="late")


def test_a_port_in_use_is_told_with_the_address():
    async def scenario(port: int) -> None:
        async with http.serve(
            ("127.0.0.1", port),
            metrics=list,
            not_alive=lambda: None,
            not_ready=lambda: None,
            topology=dict,
        ):
            pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(http.HttpError, match=rf"http 127\.0\.0\.1:{port}: .*"):
            asyncio.run(scenario(port))
