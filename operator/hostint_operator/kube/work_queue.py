# SPDX-License-Identifier: Apache-2.0
"""A keyed work queue: a key is queued once, is never worked on twice at a time, and may be delayed or retried."""

import asyncio
import heapq
import itertools
import random
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Keys that need work. Every key that was got must be given back with done() or retry()."""

    def __init__(self, retry_s: float = 0.5, retry_cap_s: float = 60.0) -> None:
        self._ready: dict[K, None] = {}  # in the order of arrival
        self._running: set[K] = set()
        self._again: dict[K, float] = {}  # touched while running; when it is due
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._tick = itertools.count()
        self._failures: dict[K, int] = {}
        self._wake = asyncio.Event()
        self._retry_s = retry_s
        self._retry_cap_s = retry_cap_s

    def __len__(self) -> int:
        return len(self._ready) + len(self._due) + len(self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued, delayed or being worked on."""
        return len(self) == 0

    def add(self, key: K, delay_s: float = 0.0) -> None:
        """Queue a key; of several delays the earliest counts, so that a busy key does not starve."""
        when = asyncio.get_running_loop().time() + max(delay_s, 0.0)
        if key in self._running:
            self._again[key] = min(when, self._again.get(key, when))
        elif key not in self._ready and when < self._due.get(key, float("inf")):
            self._due[key] = when
            heapq.heappush(self._heap, (when, next(self._tick), key))
            self._wake.set()

    async def get(self) -> K:
        """Wait for a key that is due and take it."""
        loop = asyncio.get_running_loop()
        while True:
            self._collect(loop.time())
            if self._ready:
                key = next(iter(self._ready))
                del self._ready[key]
                self._running.add(key)
                return key
            self._wake.clear()
            try:
                async with asyncio.timeout_at(self._heap[0][0] if self._heap else None):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def done(self, key: K) -> None:
        """Give a key back whose work succeeded."""
        self._failures.pop(key, None)
        self._give_back(key)

    def retry(self, key: K, at_least_s: float = 0.0) -> float:
        """Give a key back whose work failed; return the seconds until it comes again."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay_s = min(self._retry_s * 2.0 ** min(failures, 30), self._retry_cap_s)
        # Jitter keeps keys that failed together from coming back together.
        delay_s = max(delay_s * random.uniform(0.5, 1.0), at_least_s)  # noqa: S311
        self._give_back(key)
        self.add(key, delay_s)
        return delay_s

    def _give_back(self, key: K) -> None:
        self._running.discard(key)
        again = self._again.pop(key, None)
        if again is not None:
            self.add(key, again - asyncio.get_running_loop().time())

    def _collect(self, now: float) -> None:
        while self._heap and self._heap[0][0] <= now:
            when, _, key = heapq.heappop(self._heap)
            if self._due.get(key) == when:  # else an earlier entry has replaced this one
                del self._due[key]
                self._ready[key] = None
