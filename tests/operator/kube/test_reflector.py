# SPDX-License-Identifier: Apache-2.0
"""The reflector equals the collection, whatever happens to its watch."""

import asyncio
import itertools
import pathlib
from collections.abc import Awaitable, Callable

import pydantic
import pytest

from hostint_operator.kube import client, reflector
from tests.operator import fakes


class Thing(reflector.Resource):
    colour: str = ""


Things = reflector.Reflector[Thing, str]
Test = Callable[[fakes.FakeApi, Things, list[tuple[str, str | None, str | None]]], Awaitable[None]]


def read(thing: Thing) -> tuple[str, str] | None:
    return None if thing.colour == "ignored" else (thing.metadata.name, thing.colour)


def run(test: Test, directory: pathlib.Path, *, silence_s: float = 60.0, page: int = 500) -> None:
    async def work() -> None:
        fake = fakes.FakeApi()
        changes: list[tuple[str, str | None, str | None]] = []
        async with (
            asyncio.timeout(30),
            fakes.serve(fake, directory) as kubeconfig,
            client.connect(kubeconfig) as api,
        ):
            things = reflector.Reflector(
                api,
                fakes.PATH,
                Thing,
                read,
                lambda *change: changes.append(change),
                silence_s=silence_s,
                page=page,
                backoff_s=0.05,
            )
            task = asyncio.create_task(things.run())
            try:
                await test(fake, things, changes)
                assert not task.done()
            finally:
                task.cancel()
                fake.drop()

    asyncio.run(work())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def watching(fake: fakes.FakeApi, things: Things, more_than: int = 0) -> None:
    await things.synced.wait()
    await until(lambda: len(fake.watches) > more_than)


def test_it_lists_in_pages_and_follows_changes(tmp_path: pathlib.Path) -> None:
    async def test(fake: fakes.FakeApi, things: Things, changes: list) -> None:
        await watching(fake, things)
        for i in range(7):
            fake.put(f"t{i}", colour="red")
        await until(lambda: len(things.store) == 7)
        fake.put("t3", colour="blue")
        fake.delete("t4")
        await until(lambda: things.store.get("t3") == "blue" and "t4" not in things.store)
        assert changes[-2:] == [("t3", "red", "blue"), ("t4", "red", None)]

    run(test, tmp_path, page=3)


def test_all_pages_of_the_first_list_are_kept(tmp_path: pathlib.Path) -> None:
    async def test(fake: fakes.FakeApi, things: Things, changes: list) -> None:
        for i in range(7):
            fake.put(f"t{i}", colour="red")
        fake.put("t9", colour="ignored")
        await watching(fake, things)
        assert sorted(things.store) == [f"t{i}" for i in range(7)]
        assert fake.lists == 3

    run(test, tmp_path, page=3)


def test_an_update_of_what_is_not_read_is_no_change(tmp_path: pathlib.Path) -> None:
    async def test(fake: fakes.FakeApi, things: Things, changes: list) -> None:
        await watching(fake, things)
        fake.put("a", colour="red")
        fake.put("a", colour="red", heartbeat=1)
        fake.put("b", colour="red")
        await until(lambda: "b" in things.store)
        assert changes == [("a", None, "red"), ("b", None, "red")]

    run(test, tmp_path)


def test_a_dropped_watch_continues_without_a_new_list(tmp_path: pathlib.Path) -> None:
    async def test(fake: fakes.FakeApi, things: Things, changes: list) -> None:
        await watching(fake, things)
        fake.put("a", colour="red")
        await until(lambda: "a" in things.store)
        fake.drop()
        fake.put("a", colour="blue")
        await until(lambda: things.store["a"] == "blue")
        assert fake.lists == 1

    run(test, tmp_path)


def test_a_deletion_that_the_watch_missed_is_found_after_410(tmp_path: pathlib.Path) -> None:
    async def test(fake: fakes.FakeApi, things: Things, changes: list) -> None:
        await watching(fake, things)
        fake.put("a", colour="red")
        fake.put("b", colour="red")
        await until(lambda: len(things.store) == 2)
        fake.delete("a", silently=True)
        fake.expire()
        await until(lambda: "a" not in things.store)
        assert things.store == {"b": "red"}
        assert changes[-1] == ("a", "red", None)
        fake.put("c", colour="red")
        await until(lambda: "c" in things.store)

    run(test, tmp_path)


@pytest.mark.parametrize(("code", "lists"), [(410, 2), (500, 1)])
def test_an_error_event_is_survived(tmp_path: pathlib.Path, code: int, lists: int) -> None:
    async def test(fake: fakes.FakeApi, things: Things, changes: list) -> None:
        await watching(fake, things)
        fake.fail(code)
        await watching(fake, things, more_than=1)
        fake.put("a", colour="red")
        await until(lambda: "a" in things.store)
        assert fake.lists == lists

    run(test, tmp_path)


def test_a_silent_watch_is_taken_for_dead(tmp_path: pathlib.Path) -> None:
    async def test(fake: fakes.FakeApi, things: Things, changes: list) -> None:
        await watching(fake, things)
        fake.silent = True
        fake.put("a", colour="red")
        await until(lambda: len(fake.watches) > 1)
        assert things.store == {}
        fake.silent = False
        await until(lambda: "a" in things.store)

    run(test, tmp_path, silence_s=0.3)


def test_a_line_that_is_no_event_leads_to_a_new_list(tmp_path: pathlib.Path) -> None:
    async def test(fake: fakes.FakeApi, things: Things, changes: list) -> None:
        await watching(fake, things)
        fake.put("a", colour="red")
        await until(lambda: "a" in things.store)
        fake.delete("a", silently=True)
        fake.tell({"type": "NONSENSE"})
        await until(lambda: "a" not in things.store)
        assert things.relists == 2

    run(test, tmp_path)


def test_a_server_that_is_down_is_retried_with_growing_pauses(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And begins with the short ones again where it was up between."""
    monkeypatch.setattr(reflector.random, "uniform", lambda low, high: 1.0)

    async def test(fake: fakes.FakeApi, things: Things, changes: list) -> None:
        async def pauses() -> list[float]:
            fake.refused.clear()
            fake.down = True
            fake.drop()
            await until(lambda: len(fake.refused) == 5)
            fake.down = False
            return [after - before for before, after in itertools.pairwise(fake.refused)]

        before = 1.0
        for _ in range(3):  # the first time the list is refused, then a watch that goes on
            first, *_, last = taken = await pauses()
            assert first < before / 2, taken
            assert last > 3 * first, taken
            before = last
            fake.put("a", colour=f"red{len(changes)}")
            await until(lambda: things.store.get("a") == fake.objects["a"]["colour"])
        assert not changes[0][1]

    run(test, tmp_path)


def test_a_server_that_asks_for_time_is_given_it(tmp_path: pathlib.Path) -> None:
    async def test(fake: fakes.FakeApi, things: Things, changes: list) -> None:
        fake.retry_after_s = 1
        fake.down = True
        await until(lambda: len(fake.refused) == 2)
        assert fake.refused[1] - fake.refused[0] > 0.5  # half of it, by chance

    run(test, tmp_path)


@pytest.mark.cluster
def test_it_mirrors_a_collection_of_a_real_api_server(api_server, tmp_path: pathlib.Path) -> None:
    class ConfigMap(reflector.Resource):
        data: dict[str, str] = pydantic.Field(default_factory=dict)

    def contents(item: ConfigMap) -> tuple[str, tuple[tuple[str, str], ...]]:
        return item.metadata.name, tuple(item.data.items())

    async def kubectl(*words: str) -> None:
        await asyncio.to_thread(api_server.kubectl, *words)

    async def work() -> None:
        changes: list[str] = []
        async with asyncio.timeout(60), client.connect(api_server.kubeconfig) as api:
            mirror = reflector.Reflector(
                api,
                "/api/v1/namespaces/kube-public/configmaps",
                ConfigMap,
                contents,
                lambda key, old, new: changes.append(key),
                selector={"labelSelector": "test=reflector"},
            )
            task = asyncio.create_task(mirror.run())
            await mirror.synced.wait()
            await kubectl("create", "configmap", "one", "-n", "kube-public", "--from-literal=a=b")
            await kubectl("label", "configmap", "one", "-n", "kube-public", "test=reflector")
            await until(lambda: mirror.store == {"one": (("a", "b"),)})
            await kubectl("delete", "configmap", "one", "-n", "kube-public")
            await until(lambda: mirror.store == {})
            assert changes == ["one", "one"]
            task.cancel()

    asyncio.run(work())
