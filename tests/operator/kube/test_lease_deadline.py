# SPDX-License-Identifier: Apache-2.0
"""No two replicas may write at a time, whenever requests stop being answered; in virtual time, at the real durations."""

import asyncio
import json
import random
import selectors
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from hostint_operator.kube import client, lease

DURATION_S = 15.0
PHASES = 60
T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Skips the time that the loop would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found and timeout:
            self.now += timeout
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


class Leases:
    """One lease, with versions and conflicts; candidates in `cut_off` wait for ever for their answers."""

    def __init__(self, first_s: float = 0.05) -> None:
        """`first_s`: how long an answer to "first" takes; its request has had its effect by then."""
        self.cut_off: set[str] = set()
        self.first_s = first_s
        self._lease: dict[str, Any] | None = None
        self._version = 0

    def of(self, identity: str) -> "_Connection":
        return _Connection(self, identity)

    async def request(self, identity: str, method: str, body: Any) -> bytes:
        await asyncio.sleep(0.01)
        while identity in self.cut_off:
            await asyncio.sleep(3600)
        answer = self._answer(method, body)
        await asyncio.sleep(self.first_s if identity == "first" else 0.05)
        return answer

    def take(self, identity: str) -> None:
        """Give the lease to somebody who has not asked whether it is free."""
        assert self._lease
        self._version += 1
        self._lease["metadata"]["resourceVersion"] = str(self._version)
        self._lease["spec"]["holderIdentity"] = identity

    def _answer(self, method: str, body: Any) -> bytes:
        if method == "GET":
            if self._lease is None:
                raise client.ApiError(lease.NOT_FOUND, "no lease")
            return json.dumps(self._lease).encode()
        known = (self._lease or {"metadata": {}})["metadata"].get("resourceVersion")
        if body["metadata"].get("resourceVersion") != known:
            raise client.ApiError(409, "conflict")
        self._version += 1
        metadata = body["metadata"] | {"resourceVersion": str(self._version)}
        self._lease = body | {"metadata": metadata}
        return b"{}"


class _Connection:
    """What a candidate uses as its Api."""

    def __init__(self, leases: Leases, identity: str) -> None:
        self._leases = leases
        self._identity = identity

    async def request(self, method: str, path: str, *, body: Any = None) -> bytes:
        return await self._leases.request(self._identity, method, body)


def run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work())


def candidate(leases: Leases, identity: str, **durations: float) -> lease.Lease:
    return lease.Lease(leases.of(identity), "ns", "name", identity, **durations)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Change:
    """When the first of two leaders could write for the last time, when it stopped to lead, and when the second led."""

    last_write: float
    stopped: float
    led: float


async def cut_off_at(phase: int) -> Change:
    """Cut a leader off, and look at both a hundred times a second."""
    random.seed(phase)
    loop, leases = asyncio.get_running_loop(), Leases(first_s=(0.05, 1.8)[phase % 2])
    first, second = candidate(leases, "first"), candidate(leases, "second")
    holding = asyncio.create_task(first.hold())
    await first.leading.wait()
    waiting = asyncio.create_task(second.hold())
    await asyncio.sleep(20 + 5 * phase / PHASES)
    assert first.may_write()
    leases.cut_off.add("first")
    last_write = stopped = loop.time()
    while not second.leading.is_set():
        if first.may_write():
            last_write = loop.time()
        if first.leading.is_set():
            stopped = loop.time()
        await asyncio.sleep(0.01)
    await holding
    waiting.cancel()
    return Change(last_write, stopped, loop.time())


def test_leader_stops_in_time_whenever_answers_stop() -> None:
    """A write that began as late as it may has ended, by its own timeout, before another replica leads."""
    for phase in range(PHASES):
        change = run(lambda: cut_off_at(phase))
        assert change.last_write + client.REQUEST_TIMEOUT_S < change.led, phase
        assert change.stopped - change.last_write < 0.05, phase


def test_leader_stays_while_answers_are_slow() -> None:
    """Each of the two requests of a renewal takes 1.5 s: late, and never too late."""

    async def work() -> None:
        leases = Leases(first_s=1.5)
        first = candidate(leases, "first")
        holding = asyncio.create_task(first.hold())
        await first.leading.wait()
        for _ in range(6000):
            assert first.may_write()
            await asyncio.sleep(0.1)
        holding.cancel()

    run(work)


def test_leader_whose_lease_was_taken_stops_at_its_next_renewal() -> None:
    async def work() -> None:
        leases = Leases()
        first = candidate(leases, "first")
        holding = asyncio.create_task(first.hold())
        await first.leading.wait()
        leases.take("thief")
        async with asyncio.timeout(3):
            await holding
        assert not first.may_write()

    run(work)


def test_candidate_waits_as_long_as_the_holder_asked_for() -> None:
    """Two versions of the operator may differ in how long a lease lasts."""

    async def work() -> None:
        loop, leases = asyncio.get_running_loop(), Leases()
        first = candidate(leases, "first", duration_s=60.0)
        holding = asyncio.create_task(first.hold())
        await first.leading.wait()
        leases.cut_off.add("first")
        begun = loop.time()
        second = candidate(leases, "second")
        waiting = asyncio.create_task(second.hold())
        await second.leading.wait()
        assert 60 < loop.time() - begun < 65
        holding.cancel()
        waiting.cancel()

    run(work)


def test_suspended_leader_may_not_write() -> None:
    """As after SIGSTOP, or a stop of the machine: the clock has moved and no other line has run."""

    async def work() -> None:
        loop, leases = asyncio.get_running_loop(), Leases()
        first = candidate(leases, "first")
        holding = asyncio.create_task(first.hold())
        await first.leading.wait()
        await asyncio.sleep(20)
        assert first.may_write()
        assert isinstance(loop, VirtualLoop)
        loop._virtual.now += DURATION_S
        assert first.leading.is_set()
        assert not first.may_write()
        holding.cancel()

    run(work)
