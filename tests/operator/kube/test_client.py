# SPDX-License-Identifier: Apache-2.0
"""What is sent to the API server, and what becomes of answers that are none."""

import asyncio
import pathlib
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from hostint_operator.kube import client
from tests.operator import fakes

PATH = "/apis/example.dev/v1/things/a"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def run(
    directory: pathlib.Path, handler: Handler, test: Callable[[client.Api], Awaitable[None]]
) -> None:
    async def work() -> None:
        app = web.Application()
        app.router.add_route("*", PATH, handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        kubeconfig = directory / "fake.conf"
        kubeconfig.write_text(fakes.kubeconfig_for(f"http://127.0.0.1:{runner.addresses[0][1]}"))
        try:
            async with asyncio.timeout(20), client.connect(kubeconfig) as api:
                await test(api)
        finally:
            await runner.cleanup()

    asyncio.run(work())


def test_apply_sends_the_whole_intent_of_its_manager_and_insists(tmp_path: pathlib.Path) -> None:
    seen: list[tuple[str, str, dict[str, str], object]] = []

    async def take(request: web.Request) -> web.Response:
        seen.append(
            (request.method, request.content_type, dict(request.query), await request.json())
        )
        return web.json_response({"now": 1})

    async def test(api: client.Api) -> None:
        assert await api.apply(PATH, {"spec": {"a": 1}}, "me") == {"now": 1}
        query = {"fieldManager": "me", "force": "true"}
        assert seen == [("PATCH", "application/apply-patch+yaml", query, {"spec": {"a": 1}})]

    run(tmp_path, take, test)


@pytest.mark.parametrize(
    ("text", "headers", "words", "retry_after_s"),
    [
        ('{"kind": "Status", "message": "no", "reason": "Forbidden"}', {}, "409: no", 0.0),
        ("<html>from a proxy", {"Retry-After": "7"}, "409: <html>from a proxy", 7.0),
        ("", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "409: Conflict", 0.0),
    ],
    ids=["status", "text", "nothing"],
)
def test_refusal_carries_status_words_and_pause(
    tmp_path: pathlib.Path, text: str, headers: dict[str, str], words: str, retry_after_s: float
) -> None:
    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=409, text=text, headers=headers)

    async def test(api: client.Api) -> None:
        with pytest.raises(client.ApiError) as caught:
            await api.apply(PATH, {}, "me")
        assert caught.value.status == 409
        assert str(caught.value) == words
        assert caught.value.retry_after_s == retry_after_s

    run(tmp_path, refuse, test)


@pytest.mark.parametrize("begun", [False, True], ids=["no answer", "half an answer"])
def test_request_without_an_answer_ends_in_time(tmp_path: pathlib.Path, begun: bool) -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if begun:
            await response.prepare(request)
            await response.write(b"{")
        await asyncio.sleep(3600)
        return response

    async def test(api: client.Api) -> None:
        started = asyncio.get_running_loop().time()
        with pytest.raises(client.ApiError, match="no answer from the API server") as caught:
            await api.request("GET", PATH, timeout_s=0.3)
        assert caught.value.status == 0
        assert 0.25 < asyncio.get_running_loop().time() - started < 5

    run(tmp_path, hang, test)
