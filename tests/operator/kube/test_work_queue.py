# SPDX-License-Identifier: Apache-2.0
"""The work queue: once, never twice at a time, earliest delay, growing retries."""

import asyncio
import random
from collections.abc import Awaitable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostint_operator.kube import work_queue


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(limited())


def test_a_key_added_twice_is_got_once() -> None:
    async def work() -> None:
        queue: work_queue.WorkQueue[str] = work_queue.WorkQueue()
        queue.add("a")
        queue.add("b")
        queue.add("a")
        assert [await queue.get(), await queue.get()] == ["a", "b"]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await queue.get()

    run(work())


def test_a_key_touched_while_running_comes_again_after_done_and_not_before() -> None:
    async def work() -> None:
        queue: work_queue.WorkQueue[str] = work_queue.WorkQueue()
        queue.add("a")
        await queue.get()
        queue.add("a")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await queue.get()
        queue.done("a")
        assert await queue.get() == "a"
        queue.done("a")
        assert queue.idle

    run(work())


def test_the_earliest_of_several_delays_counts() -> None:
    async def work() -> None:
        queue: work_queue.WorkQueue[str] = work_queue.WorkQueue()
        loop = asyncio.get_running_loop()
        started = loop.time()
        queue.add("a", 5.0)
        queue.add("a", 0.1)
        queue.add("a", 3.0)
        await queue.get()
        assert 0.09 <= loop.time() - started < 2.0
        queue.done("a")
        assert queue.idle

    run(work())


def test_earliest_delay_counts_for_a_running_key_too() -> None:
    async def work() -> None:
        queue: work_queue.WorkQueue[str] = work_queue.WorkQueue()
        loop = asyncio.get_running_loop()
        queue.add("a")
        await queue.get()
        started = loop.time()
        for delay_s in (5.0, 0.1, 3.0):
            queue.add("a", delay_s)
        queue.done("a")
        await queue.get()
        assert 0.09 <= loop.time() - started < 2.0

    run(work())


def test_a_waiting_getter_is_woken_by_an_earlier_key() -> None:
    async def work() -> None:
        queue: work_queue.WorkQueue[str] = work_queue.WorkQueue()
        queue.add("late", 10.0)
        getter = asyncio.create_task(queue.get())
        await asyncio.sleep(0.02)
        queue.add("early")
        assert await getter == "early"

    run(work())


def test_retries_wait_longer_each_time_and_success_forgets_them() -> None:
    async def work() -> None:
        queue: work_queue.WorkQueue[str] = work_queue.WorkQueue(retry_s=0.01, retry_cap_s=0.04)
        queue.add("a")
        delays = []
        for _ in range(4):
            await queue.get()
            delays.append(queue.retry("a"))
        limits = [(0.005, 0.01), (0.01, 0.02), (0.02, 0.04), (0.02, 0.04)]
        assert all(low <= d <= high for d, (low, high) in zip(delays, limits, strict=True))
        await queue.get()
        queue.done("a")
        queue.add("a")
        await queue.get()
        assert queue.retry("a") <= 0.01
        await queue.get()
        assert queue.retry("a", at_least_s=0.5) >= 0.5

    run(work())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.0, 0.001, 0.004]))))
def test_every_added_key_is_worked_on_after_its_last_addition(
    adds: list[tuple[str, float]],
) -> None:
    async def work() -> None:
        queue: work_queue.WorkQueue[str] = work_queue.WorkQueue(retry_s=0.001, retry_cap_s=0.002)
        wanted: dict[str, int] = dict.fromkeys("abcd", 0)
        seen: dict[str, int] = dict.fromkeys("abcd", 0)
        running: set[str] = set()

        async def worker() -> None:
            while True:
                key = await queue.get()
                assert key not in running
                running.add(key)
                seen[key] = wanted[key]
                await asyncio.sleep(0.0005)
                running.discard(key)
                if random.random() < 0.2:
                    seen[key] = -1
                    queue.retry(key)
                else:
                    queue.done(key)

        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(worker()) for _ in range(2)]
            for key, delay in adds:
                wanted[key] += 1
                queue.add(key, delay)
                await asyncio.sleep(delay / 2)
            while True:
                if queue.idle:
                    break
                await asyncio.sleep(0.001)
            for task in workers:
                task.cancel()
        assert seen == wanted

    run(work())
