# SPDX-License-Identifier: Apache-2.0
"""Nothing is compiled, let alone written, before everything that it is compiled from is known."""

import asyncio
import json
import uuid
from collections.abc import Mapping
from typing import Any

import pytest

from hostint_api import names
from hostint_operator import __main__ as program
from hostint_operator.kube import client
from tests.operator import cluster

pytestmark = pytest.mark.cluster

OWN = f"/apis/{names.API_VERSION}"
INPUTS = [
    "/api/v1/nodes",
    "/api/v1/services",
    "/pods",
    f"{OWN}/{names.WATCHLISTS}",
    f"{OWN}/{names.COLLECTORS}",
    f"{OWN}/{names.NODE_CONFIGS}",
    "/endpointslices",
]


class HeldApi:
    """An API whose lists of one collection are not answered until it is released; counts the applies."""

    def __init__(self, api: client.Api, held: str) -> None:
        self._api = api
        self._held = held
        self.released = asyncio.Event()
        self.waiting = asyncio.Event()
        self.applies: list[str] = []
        self.stream = api.stream

    async def request(self, method: str, path: str, **more: Any) -> bytes:
        if path.endswith(self._held):
            self.waiting.set()
            await self.released.wait()
        return await self._api.request(method, path, **more)

    async def apply(self, path: str, intent: Mapping[str, Any], manager: str) -> dict[str, Any]:
        self.applies.append(path)
        return await self._api.apply(path, intent, manager)


@pytest.mark.parametrize("held", INPUTS)
def test_nothing_is_written_while_one_input_is_unknown(api_server: Any, held: str) -> None:
    name = f"held-{uuid.uuid4().hex[:6]}"
    cluster.install_crds(api_server)
    reference = {"namespace": "default", "name": "nothing"}
    objects: list[tuple[str, str, dict[str, Any]]] = [
        ("v1", "Node", {}),
        (names.API_VERSION, names.COLLECTOR_KIND, {"spec": {"service": reference}}),
    ]
    for version, kind, more in objects:
        made = {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **more}
        api_server.kubectl("apply", "-f", "-", input=json.dumps(made))
    settings = program.parse(
        [
            "--kubeconfig",
            str(api_server.kubeconfig),
            "--http",
            "127.0.0.1:0",
            "--no-leader-election",
        ],
        {},
    )

    async def work() -> None:
        async with asyncio.timeout(40), client.connect(settings.kubeconfig) as real:
            api, stop = HeldApi(real, held), asyncio.Event()
            # No patience but with what a collector refers to: all else is waited for however long it takes.
            patience_s = 20.0 if held == "/endpointslices" else 0.1
            operator = program.Operator(api, settings, patience_s=patience_s)  # type: ignore[arg-type]
            running = asyncio.create_task(operator.run(stop))
            await api.waiting.wait()
            await asyncio.sleep(1.0)
            assert api.applies == []
            api.released.set()
            while not any(path.endswith(f"{names.NODE_CONFIGS}/{name}") for path in api.applies):
                assert not running.done()
                await asyncio.sleep(0.02)
            stop.set()
            await running

    try:
        asyncio.run(work())
    finally:
        api_server.kubectl("delete", "node", name)
        api_server.kubectl("delete", "icol", name)
