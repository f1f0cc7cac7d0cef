# SPDX-License-Identifier: Apache-2.0
"""The lease: one leader at a time, quick hand-over, take-over after a crash, no leader without the API server."""

import asyncio
import json
import pathlib
import urllib.parse
import uuid
from collections.abc import Awaitable

import pytest
import yaml

from hostint_operator.kube import client, lease
from tests.operator import fakes

pytestmark = pytest.mark.cluster


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(limited())


def candidate(api: client.Api, name: str, identity: str) -> lease.Lease:
    return lease.Lease(api, "kube-system", name, identity, duration_s=3.0, renew_s=1.0)


@pytest.fixture
def name() -> str:
    return f"lease-{uuid.uuid4().hex[:8]}"


def test_one_of_two_leads_and_the_other_takes_over_at_once_when_it_stops(api_server, name) -> None:
    async def work() -> None:
        async with client.connect(api_server.kubeconfig) as api:
            first, second = candidate(api, name, "first"), candidate(api, name, "second")
            holding = asyncio.create_task(first.hold())
            await first.leading.wait()
            waiting = asyncio.create_task(second.hold())
            await asyncio.sleep(4.0)  # longer than the lease lasts: it is renewed
            assert first.leading.is_set()
            assert not second.leading.is_set()
            holding.cancel()
            async with asyncio.timeout(2.0):
                await second.leading.wait()
            assert not first.leading.is_set()
            waiting.cancel()
            await asyncio.gather(holding, waiting, return_exceptions=True)
            path = f"/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/{name}"
            spec = json.loads(await api.request("GET", path))["spec"]
            assert spec.get("holderIdentity", "") == ""
            assert spec["leaseTransitions"] >= 2

    run(work())


def test_a_lease_that_nobody_renews_is_taken_after_its_duration_and_not_before(
    api_server, name
) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        async with client.connect(api_server.kubeconfig) as api:
            async with client.connect(api_server.kubeconfig) as doomed:
                crashed = candidate(doomed, name, "crashed")
                holding = asyncio.create_task(crashed.hold())
                await crashed.leading.wait()
            died = loop.time()  # its client is closed: it can neither renew nor release
            second = candidate(api, name, "second")
            waiting = asyncio.create_task(second.hold())
            await second.leading.wait()
            assert 3.0 <= loop.time() - died < 8.0
            for task in (holding, waiting):
                task.cancel()
            await asyncio.gather(holding, waiting, return_exceptions=True)

    run(work())


@pytest.mark.parametrize("fault", ["stop", "hang"])
def test_leader_without_answers_stops_before_its_lease_expires(
    api_server, name, tmp_path: pathlib.Path, fault: str
) -> None:
    """Connections are refused, or requests are never answered."""

    async def work() -> None:
        config = yaml.safe_load(api_server.kubeconfig.read_text())
        target = urllib.parse.urlparse(config["clusters"][0]["cluster"]["server"])
        proxy = fakes.Proxy(target.hostname, target.port)
        await proxy.start()
        config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{proxy.port}"
        kubeconfig = tmp_path / "proxied.conf"
        kubeconfig.write_text(yaml.safe_dump(config))
        loop = asyncio.get_running_loop()
        async with client.connect(kubeconfig) as api:
            leader = candidate(api, name, "leader")
            holding = asyncio.create_task(leader.hold())
            await leader.leading.wait()
            lost = loop.time()
            await getattr(proxy, fault)()
            while leader.leading.is_set():
                await asyncio.sleep(0.01)
            assert loop.time() - lost < 3.0  # the lease was renewed before `lost`
            assert not leader.may_write()
            async with asyncio.timeout(lease.RELEASE_TIMEOUT_S + 1):
                await holding
        await proxy.stop()

    run(work())
