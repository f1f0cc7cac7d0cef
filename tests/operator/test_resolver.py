# SPDX-License-Identifier: Apache-2.0
"""DNS names of collectors: asked again and again, the last good answer stays."""

import asyncio
import ipaddress
from collections.abc import Callable

import pytest

from hostint_operator import desired_state, resolver

GOOD = (ipaddress.ip_address("192.0.2.1"),)
OTHER = (ipaddress.ip_address("192.0.2.2"),)


class Names:
    """A resolver whose answers a test sets."""

    def __init__(self) -> None:
        self.answer: tuple[desired_state.Address, ...] | None = GOOD
        self.asked = 0
        self.hangs = False

    async def look_up(self, name: str) -> tuple[desired_state.Address, ...]:
        self.asked += 1
        if self.hangs:
            await asyncio.sleep(3600)
        if self.answer is None:
            raise OSError("no such name")
        return self.answer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0.002)


def make(
    names: Names, changes: list[None]
) -> tuple[resolver.Resolver, dict[str, desired_state.DnsAnswer]]:
    answers: dict[str, desired_state.DnsAnswer] = {}
    made = resolver.Resolver(
        answers,
        lambda: changes.append(None),
        lookup=names.look_up,
        refresh_s=0.02,
        retry_s=0.01,
    )
    return made, answers


def test_the_last_good_answer_stays_while_lookups_fail_and_a_new_one_replaces_it() -> None:
    async def work() -> None:
        names = Names()
        changes: list[None] = []
        follower, answers = make(names, changes)
        follower.follow(["c.example"])
        await follower.first_answers()
        assert answers["c.example"] == desired_state.DnsAnswer(GOOD, 0, "")
        names.answer = None
        await until(lambda: answers["c.example"].failures >= 3)
        assert answers["c.example"].addresses == GOOD
        assert answers["c.example"].error == "no such name"
        names.answer = OTHER
        await until(lambda: answers["c.example"] == desired_state.DnsAnswer(OTHER, 0, ""))
        follower.follow([])
        assert answers == {}

    asyncio.run(work())


def test_lookup_that_hangs_is_a_failure_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "LOOKUP_TIMEOUT_S", 0.05)

    async def work() -> None:
        names = Names()
        follower, answers = make(names, [])
        follower.follow(["c.example"])
        await follower.first_answers()
        names.hangs = True
        await until(lambda: answers["c.example"].failures >= 2)
        assert answers["c.example"].addresses == GOOD
        assert answers["c.example"].error == "no answer within 0 s"
        names.hangs = False
        await until(lambda: answers["c.example"] == desired_state.DnsAnswer(GOOD, 0, ""))
        follower.follow([])

    asyncio.run(work())


def test_a_name_without_an_address_is_asked_for_sooner() -> None:
    async def work() -> None:
        names = Names()
        names.answer = None
        answers: dict[str, desired_state.DnsAnswer] = {}
        follower = resolver.Resolver(
            answers, lambda: None, lookup=names.look_up, refresh_s=3600, retry_s=0.01
        )
        follower.follow(["c.example"])
        await until(lambda: names.asked >= 3)
        names.answer = GOOD
        await until(lambda: answers["c.example"].addresses == GOOD)
        asked = names.asked
        await asyncio.sleep(0.1)
        assert names.asked == asked
        follower.follow([])

    asyncio.run(work())


def test_an_answer_that_stays_the_same_is_no_change() -> None:
    async def work() -> None:
        names = Names()
        changes: list[None] = []
        follower, _ = make(names, changes)
        follower.follow(["c.example"])
        await until(lambda: names.asked >= 5)
        assert len(changes) == 1
        follower.follow([])

    asyncio.run(work())


def test_a_name_that_never_resolved_has_no_address_and_says_why() -> None:
    async def work() -> None:
        names = Names()
        changes: list[None] = []
        names.answer = None
        follower, answers = make(names, changes)
        follower.follow(["c.example"])
        await follower.first_answers()
        assert answers["c.example"].addresses == ()
        assert answers["c.example"].error == "no such name"
        follower.follow([])

    asyncio.run(work())


def test_the_systems_resolver_knows_localhost() -> None:
    found = asyncio.run(resolver.look_up("localhost"))
    assert all(address.is_loopback for address in found)
    assert found
