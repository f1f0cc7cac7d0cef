# SPDX-License-Identifier: Apache-2.0
"""The node's own object is followed through everything an API server does, and its status is written when it changes."""

import asyncio
import contextlib
import json
import math
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import structlog
import yaml
from aiohttp import web

from hostint_agent import agent, cluster
from hostint_api import NodeConfigStatus
from tests.testcluster.control_plane import Pki

NODE = "node-a"


class FakeServer:
    """One IntNodeConfig with list, watch, status, and faults on demand."""

    def __init__(self) -> None:
        self.version = 100
        self.item: dict | None = None
        self.lists = 0
        self.watches: list[str] = []
        self.selectors: set[str] = set()
        self.statuses: list[dict] = []
        self.refuse_status = 0
        self.end_at_once = False
        self.silent = False
        self.down = False
        self.refused = 0
        self._error = 0
        self._events: list[tuple[int, dict]] = []
        self._end = asyncio.Event()
        self._news = asyncio.Event()

    def put(
        self, generation: int, node_id: int, uid: str = "u", status: dict | None = None
    ) -> None:
        self.version += 1
        metadata = {"name": NODE, "uid": uid, "generation": generation}
        metadata["resourceVersion"] = str(self.version)
        self.item = {"metadata": metadata, "spec": {"nodeID": node_id, "digest": f"d{generation}"}}
        if status is not None:
            self.item["status"] = status
        self.tell("MODIFIED", self.item)

    def delete(self, *, silently: bool = False) -> None:
        self.version += 1
        gone, self.item = self.item, None
        assert gone
        gone["metadata"]["resourceVersion"] = str(self.version)
        if not silently:
            self.tell("DELETED", gone)

    def tell(self, kind: str, item: dict) -> None:
        self._events.append((self.version, {"type": kind, "object": json.loads(json.dumps(item))}))
        self._news.set()
        self._news = asyncio.Event()

    def error(self, code: int) -> None:
        """End the watch with an ERROR event."""
        self._error = code
        self._news.set()
        self._news = asyncio.Event()

    def drop(self) -> None:
        """End the watches without a word."""
        self._end.set()
        self._news.set()
        self._end, self._news = asyncio.Event(), asyncio.Event()

    async def get(self, request: web.Request) -> web.StreamResponse:
        if self.down:
            self.refused += 1
            raise web.HTTPServiceUnavailable
        self.selectors.add(request.query["fieldSelector"])
        if "watch" in request.query:
            return await self._watch(request)
        self.lists += 1
        items = [self.item] if self.item else []
        return web.json_response(
            {"metadata": {"resourceVersion": str(self.version)}, "items": items}
        )

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        seen = int(request.query["resourceVersion"])
        self.watches.append(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        end = self._end
        while not end.is_set() and not self.end_at_once:
            news = self._news
            for version, event in list(self._events):
                if version > seen and not self.silent:
                    await response.write(json.dumps(event).encode() + b"\n")
                    seen = version
            if self._error:
                status = {"code": self._error, "message": "injected"}
                event = {"type": "ERROR", "object": status}
                await response.write(json.dumps(event).encode() + b"\n")
                self._error = 0
                break
            await news.wait()
        return response

    async def patch(self, request: web.Request) -> web.Response:
        assert request.content_type == "application/apply-patch+yaml"
        assert request.query["fieldManager"] == "hostint-agent"
        if self.refuse_status:
            self.refuse_status -= 1
            return web.json_response({"message": "no"}, status=500)
        self.statuses.append(json.loads(await request.read()))
        return web.json_response({})


@contextlib.asynccontextmanager
async def following(
    server: FakeServer, directory: Path, port: int = 0
) -> AsyncIterator[tuple[list[agent.Wanted], cluster.NodeConfig]]:
    """A server, and a NodeConfig that watches it; what it hands over, in order."""
    async with serving(server, port) as address:
        kubeconfig = write_kubeconfig(directory, address)
        async with cluster.connect(kubeconfig) as api:
            seen: list[agent.Wanted] = []
            config = cluster.NodeConfig(api, NODE, seen.append)
            task = asyncio.create_task(config.watch())
            try:
                yield seen, config
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


@contextlib.asynccontextmanager
async def serving(
    server: FakeServer, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get(cluster.PATH, server.get)
    app.router.add_patch(f"{cluster.PATH}/{NODE}/status", server.patch)
    runner = web.AppRunner(app, shutdown_timeout=0.05, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def write_kubeconfig(directory: Path, address: str, authority: Path | None = None) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [
            {
                "name": "c",
                "cluster": {"server": address}
                | ({"certificate-authority": str(authority)} if authority else {}),
            }
        ],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    return path


async def until(check: Callable[[], object], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not check():
            await asyncio.sleep(0.01)


def ids(seen: list[agent.Wanted]) -> list[int | None]:
    return [wanted.spec.node_id if wanted.spec else None for wanted in seen]


def test_the_object_is_handed_over_and_so_is_every_new_generation(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        async with following(server, tmp_path) as (seen, _):
            await until(lambda: len(seen) == 1)
            await until(lambda: server.watches)
            server.put(2, 12)
            await until(lambda: len(seen) == 2)
            assert ids(seen) == [11, 12]
            assert [wanted.generation for wanted in seen] == [1, 2]
            assert server.selectors == {f"metadata.name={NODE}"}

    asyncio.run(scenario())


def test_a_change_that_keeps_the_generation_is_no_news(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        async with following(server, tmp_path) as (seen, _):
            await until(lambda: server.watches)
            server.put(1, 11)
            server.put(2, 12)
            await until(lambda: len(seen) == 2)
            assert ids(seen) == [11, 12]

    asyncio.run(scenario())


def test_an_object_that_is_not_there_yet_means_no_configuration(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        async with following(server, tmp_path) as (seen, _):
            await until(lambda: server.watches)
            server.put(1, 11)
            await until(lambda: len(seen) == 2)
            assert ids(seen) == [None, 11]

    asyncio.run(scenario())


def test_a_deleted_object_means_no_configuration(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        async with following(server, tmp_path) as (seen, _):
            await until(lambda: server.watches)
            server.delete()
            await until(lambda: len(seen) == 2)
            assert ids(seen) == [11, None]

    asyncio.run(scenario())


def test_an_object_made_anew_is_another_one_though_its_generation_is_the_same(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11, uid="first")
        async with following(server, tmp_path) as (seen, _):
            await until(lambda: server.watches)
            server.put(1, 12, uid="second")
            await until(lambda: len(seen) == 2)
            assert ids(seen) == [11, 12]

    asyncio.run(scenario())


def test_a_dropped_watch_goes_on_where_it_was_without_a_list(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        async with following(server, tmp_path) as (seen, _):
            await until(lambda: len(server.watches) == 1)
            server.put(2, 12)
            await until(lambda: len(seen) == 2)
            server.drop()
            await until(lambda: len(server.watches) == 2)
            assert server.watches[1] == str(server.version)
            assert server.lists == 1

    asyncio.run(scenario())


def test_a_version_that_is_gone_leads_to_a_list_that_shows_a_missed_deletion(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        async with following(server, tmp_path) as (seen, _):
            await until(lambda: server.watches)
            server.delete(silently=True)
            server.error(410)
            await until(lambda: len(seen) == 2)
            assert ids(seen) == [11, None]
            assert server.lists == 2

    asyncio.run(scenario())


def test_a_watch_that_says_nothing_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "SILENCE_S", 0.1)

    async def scenario() -> None:
        server = FakeServer()
        server.silent = True
        async with following(server, tmp_path):
            await until(lambda: len(server.watches) >= 2)

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def restored_etcd(tmp_path: Path) -> AsyncIterator[tuple[FakeServer, list[agent.Wanted]]]:
    """A server that has gone back behind generation 7 while an agent watches: nothing is said."""
    server = FakeServer()
    server.version = 1000
    server.put(7, 17)
    async with following(server, tmp_path) as (seen, _):
        await until(lambda: server.watches)
        server.version = 500
        server._events.clear()
        yield server, seen


@pytest.mark.parametrize("end", ["silent", "away"])
def test_server_whose_versions_went_back_is_listed(tmp_path, monkeypatch, end):
    monkeypatch.setattr(cluster, "SILENCE_S", 0.3)

    async def scenario() -> None:
        async with restored_etcd(tmp_path) as (server, seen):
            server.put(2, 12)
            if end == "away":
                server.down = True
                server.drop()
                await until(lambda: server.refused)
                server.down = False
            await until(lambda: len(seen) == 2)
            assert ids(seen) == [17, 12]
            assert [wanted.generation for wanted in seen] == [7, 2]
            server.put(3, 13)
            await until(lambda: len(seen) == 3)

    asyncio.run(scenario())


def test_generation_that_comes_again_with_another_spec_is_taken(tmp_path, monkeypatch):
    """The operator wrote one before the agent noticed that etcd was restored."""
    monkeypatch.setattr(cluster, "SILENCE_S", 0.3)

    async def scenario() -> None:
        async with restored_etcd(tmp_path) as (server, seen):
            server.put(7, 99)
            server.item["spec"]["digest"] = "another"
            await until(lambda: len(seen) == 2)
            assert ids(seen) == [17, 99]

    asyncio.run(scenario())


def test_a_server_that_is_away_changes_nothing_and_is_told_once(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        seen: list[agent.Wanted] = []
        async with contextlib.AsyncExitStack() as stack:
            address = await stack.enter_async_context(serving(server))
            api = await stack.enter_async_context(
                cluster.connect(write_kubeconfig(tmp_path, address))
            )
            task = asyncio.create_task(cluster.NodeConfig(api, NODE, seen.append).watch())
            await until(lambda: server.watches)
            with structlog.testing.capture_logs() as logs:
                server.down = True
                server.drop()
                await until(lambda: server.refused >= 3)
                assert ids(seen) == [11]
                server.down = False
                server.put(2, 12)
                await until(lambda: len(seen) == 2)
                await until(lambda: "api server reachable again" in [e["event"] for e in logs])
            task.cancel()
            told = [entry["event"] for entry in logs]
            assert told == ["api server not reachable, retrying", "api server reachable again"]

    asyncio.run(scenario())


def test_a_server_that_ends_every_watch_at_once_is_not_asked_without_pause(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        server.end_at_once = True
        async with following(server, tmp_path):
            await asyncio.sleep(1.5)
            assert 1 <= len(server.watches) <= 5

    asyncio.run(scenario())


def test_the_status_is_written_once_and_again_when_it_changes(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        async with following(server, tmp_path) as (_, config):
            now = NodeConfigStatus(observed_generation=1, observed_digest="d1")
            writer = cluster.StatusWriter(config, lambda: now)
            task = asyncio.create_task(writer.run())
            writer.poke()
            await until(lambda: len(server.statuses) == 1)
            writer.poke()
            await asyncio.sleep(0.1)
            now = NodeConfigStatus(observed_generation=2, observed_digest="d2")
            writer.poke()
            await until(lambda: len(server.statuses) == 2)
            task.cancel()
            told = [body["status"]["observedGeneration"] for body in server.statuses]
            assert told == [1, 2]
            assert server.statuses[0]["metadata"] == {"name": NODE}

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def writing(config: cluster.NodeConfig, status: NodeConfigStatus) -> AsyncIterator[None]:
    """The writer of a status that stays the same."""
    writer = cluster.StatusWriter(config, lambda: status)
    config.on_seen = writer.poke
    task = asyncio.create_task(writer.run())
    try:
        yield
    finally:
        task.cancel()


def test_object_that_is_made_anew_gets_the_same_status_again(tmp_path):
    """With the generation and digest that it had: deleted and made again, or restored."""
    status = NodeConfigStatus(observed_generation=1, observed_digest="d1")

    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11, uid="first")
        async with following(server, tmp_path) as (_, config), writing(config, status):
            await until(lambda: len(server.statuses) == 1)
            await until(lambda: server.watches)
            server.put(1, 11, uid="second")
            await until(lambda: len(server.statuses) == 2)
            await asyncio.sleep(0.1)
            assert len(server.statuses) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("left", [None, {"observedGeneration": 9, "observedDigest": "d9"}])
def test_status_that_was_lost_or_overwritten_is_written_again(tmp_path, left, monkeypatch):
    monkeypatch.setattr(cluster, "_FIRST_BACKOFF_S", 0.02)
    status = NodeConfigStatus(observed_generation=1, observed_digest="d1")

    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        async with following(server, tmp_path) as (_, config), writing(config, status):
            await until(lambda: len(server.statuses) == 1)
            await until(lambda: server.watches)
            for body, written in ((server.statuses[0]["status"], 1), (left, 2)):
                server.put(1, 11, status=body)
                await until(lambda wanted=written: len(server.statuses) == wanted)
            server.put(1, 11, status=server.statuses[0]["status"])
            await asyncio.sleep(0.1)
            assert len(server.statuses) == 2

    asyncio.run(scenario())


def test_late_event_of_an_older_status_is_no_reason_to_write(tmp_path):
    status = NodeConfigStatus(observed_generation=1, observed_digest="d1")

    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        async with following(server, tmp_path) as (_, config), writing(config, status):
            await until(lambda: len(server.statuses) == 1)
            await until(lambda: server.watches)
            server.put(1, 11, status={"observedGeneration": 0})
            server.put(1, 11, status=server.statuses[0]["status"])
            await asyncio.sleep(1.5)
            assert len(server.statuses) == 1

    asyncio.run(scenario())


def test_contest_that_is_over_is_forgotten_and_keeps_no_news_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_FIRST_BACKOFF_S", 0.1)
    now = NodeConfigStatus(observed_generation=1, observed_digest="d1")

    async def scenario() -> None:
        nonlocal now
        server = FakeServer()
        server.put(1, 11)
        async with following(server, tmp_path) as (_, config):
            writer = cluster.StatusWriter(config, lambda: now)
            config.on_seen = writer.poke
            task = asyncio.create_task(writer.run())
            await until(lambda: server.watches)
            while writer._contest._delay_s < 30:
                writer._contest.next_s()
            await until(lambda: len(server.statuses) == 1)
            # another process has written, and is to be left alone for half a minute
            writer._restored_at = asyncio.get_running_loop().time()
            server.put(1, 11, status={"observedGeneration": 9})
            await until(lambda: writer._restore_at is not None)
            assert writer._restore_at > asyncio.get_running_loop().time() + 5
            # news is written all the same
            now = NodeConfigStatus(observed_generation=2, observed_digest="d2")
            writer.poke()
            await until(lambda: len(server.statuses) == 2)
            # and after a while without another writer the next one is answered as soon as the first
            writer._restored_at = -math.inf
            server.put(2, 12, status={"observedGeneration": 9})
            await until(lambda: len(server.statuses) == 3)
            assert writer._contest._delay_s == 0.2
            task.cancel()

    asyncio.run(scenario())


def test_contest_with_another_writer_is_slow(tmp_path):
    status = NodeConfigStatus(observed_generation=1, observed_digest="d1")

    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        async with following(server, tmp_path) as (_, config), writing(config, status):
            await until(lambda: server.watches)
            until_s = asyncio.get_running_loop().time() + 4
            while asyncio.get_running_loop().time() < until_s:
                server.put(1, 11, status={"observedGeneration": 9})
                await asyncio.sleep(0.05)
            assert 2 <= len(server.statuses) <= 6

    asyncio.run(scenario())


def test_a_status_that_could_not_be_written_is_told_once_and_tried_again(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        server.refuse_status = 2
        async with following(server, tmp_path) as (_, config):
            status = NodeConfigStatus(observed_generation=1, observed_digest="d1")
            writer = cluster.StatusWriter(config, lambda: status)
            task = asyncio.create_task(writer.run())
            with structlog.testing.capture_logs() as logs:
                writer.poke()
                await until(lambda: server.statuses)
            task.cancel()
            warned = [e for e in logs if e["event"] == "status not written, retrying"]
            assert len(warned) == 1

    asyncio.run(scenario())


def test_an_object_that_makes_no_sense_is_told_and_changes_nothing(tmp_path):
    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        async with following(server, tmp_path) as (seen, _):
            await until(lambda: server.watches)
            with structlog.testing.capture_logs() as logs:
                server.put(2, -1)
                server.put(3, 13)
                await until(lambda: len(seen) == 2)
            assert ids(seen) == [11, 13]
            assert [e["error"] for e in logs] == [
                ["spec.nodeID: Invalid value: -1: must be at least 0"]
            ]

    asyncio.run(scenario())


def of_authority(directory: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A certificate authority, and what a server with a certificate of it needs."""
    pki = Pki(directory / name)
    pki.create()
    pki.certificate("server", "/CN=server", "subjectAltName=IP:127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pki.path("server.crt"), pki.path("server.key"))
    return pki.path("ca.crt"), context


def test_authority_that_is_replaced_is_followed(tmp_path):
    """The kubelet replaces the file; an agent runs for longer than a certificate authority."""
    first, first_tls = of_authority(tmp_path, "first")
    second, second_tls = of_authority(tmp_path, "second")
    authority = tmp_path / "ca.crt"
    authority.write_bytes(first.read_bytes())

    async def scenario() -> None:
        server = FakeServer()
        server.put(1, 11)
        seen: list[agent.Wanted] = []
        async with serving(server, tls=first_tls) as address:
            kubeconfig = write_kubeconfig(tmp_path, address, authority)
            api = await stack.enter_async_context(cluster.connect(kubeconfig))
            task = asyncio.create_task(cluster.NodeConfig(api, NODE, seen.append).watch())
            await until(lambda: seen)
        server.put(2, 12)
        async with serving(server, int(address.rpartition(":")[2]), second_tls):
            await asyncio.sleep(1)
            assert len(seen) == 1, "it is not known yet"
            authority.write_bytes(second.read_bytes())
            await until(lambda: len(seen) == 2)
            task.cancel()

    async def whole() -> None:
        async with stack:
            await scenario()

    stack = contextlib.AsyncExitStack()
    asyncio.run(whole())


def test_authority_without_key_usage_is_taken(tmp_path, monkeypatch):
    """By the default of Python 3.13 it is not."""
    default = ssl.create_default_context

    def strict(*arguments, **more) -> ssl.SSLContext:
        context = default(*arguments, **more)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    async def scenario() -> None:
        async with cluster.connect(write_kubeconfig(tmp_path, "https://127.0.0.1:1")) as api:
            flags = api._client.rest_client.ssl_context.verify_flags
            assert not flags & ssl.VERIFY_X509_STRICT

    monkeypatch.setattr(ssl, "create_default_context", strict)
    asyncio.run(scenario())


def test_without_credentials_the_message_says_which(tmp_path):
    async def scenario() -> None:
        async with cluster.connect(tmp_path / "none"):
            pass

    with pytest.raises(cluster.SetupError, match=r"kubeconfig '.*none'"):
        asyncio.run(scenario())
