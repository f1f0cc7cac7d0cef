# SPDX-License-Identifier: Apache-2.0
"""Names are looked up again and again; what is known stays while DNS is away, and nothing waits for it."""

import asyncio
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import structlog

from hostint_agent import resolver
from tests.agent.exports import Clock


class Answers:
    """Addresses by name; a name without any has none."""

    def __init__(self, **addresses: list[str]) -> None:
        self.addresses = addresses
        self.asked: list[str] = []

    def __call__(self, name: str) -> list[str]:
        self.asked.append(name)
        if name not in self.addresses:
            raise OSError(-2, "Name or service not known")
        return self.addresses[name]


def refresh(names: resolver.Resolver, *wanted: str) -> bool:
    return asyncio.run(names.refresh(wanted))


def test_name_is_asked_for_again_after_a_while():
    answers, clock = Answers(a=["192.0.2.1"]), Clock()
    names = resolver.Resolver(answers, clock)
    assert refresh(names, "a")
    assert names.addresses == {"a": "192.0.2.1"}
    assert not refresh(names, "a")
    clock.now += resolver.REFRESH_S - 1
    assert not refresh(names, "a")
    assert answers.asked == ["a"]
    clock.now += 1
    assert not refresh(names, "a")
    assert answers.asked == ["a", "a"]


def test_answers_that_rotate_change_nothing():
    answers, clock = Answers(a=["192.0.2.1", "192.0.2.2"]), Clock()
    names = resolver.Resolver(answers, clock)
    refresh(names, "a")
    answers.addresses["a"].reverse()
    clock.now += resolver.REFRESH_S
    assert not refresh(names, "a")
    answers.addresses["a"] = ["192.0.2.2"]
    clock.now += resolver.REFRESH_S
    assert refresh(names, "a")
    assert names.addresses == {"a": "192.0.2.2"}


def test_failures_are_retried_with_pauses_and_logged_once():
    answers, clock = Answers(), Clock()
    names = resolver.Resolver(answers, clock)
    pauses, last = [], clock.now
    with structlog.testing.capture_logs() as logs:
        while len(pauses) < 8:
            before = len(answers.asked)
            refresh(names, "a")
            if len(answers.asked) > before:
                pauses.append(clock.now - last)
                last = clock.now
            clock.now += 0.5
        answers.addresses["a"] = ["192.0.2.1"]
        clock.now += 30
        assert refresh(names, "a")
        del answers.addresses["a"]
        for _ in range(3):
            clock.now += 30
            assert not refresh(names, "a")
        assert names.addresses == {"a": "192.0.2.1"}
        answers.addresses["a"] = ["192.0.2.1"]
        clock.now += 30
        assert not refresh(names, "a")
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 30]
    assert [entry["event"] for entry in logs] == [
        "collector name not resolved, nothing is reported to it; retrying",
        "collector name resolved",
        "collector name not resolved, its last address stays",
        "collector name resolved again",
    ]


@pytest.mark.parametrize("error", [UnicodeError("label too long"), OSError(-2, "not known")])
def test_name_that_cannot_be_asked_for_is_one_that_fails(error):
    def look_up(_: str) -> list[str]:
        raise error

    with structlog.testing.capture_logs() as logs:
        assert not refresh(resolver.Resolver(look_up), "a" * 70)
    assert logs[0]["error"] in ("label too long", "not known")


def test_answer_without_addresses_is_a_failure():
    with structlog.testing.capture_logs() as logs:
        assert not refresh(resolver.Resolver(Answers(a=[])), "a")
    assert logs[0]["error"] == "no address"


def test_one_name_does_not_wait_for_another(monkeypatch):
    monkeypatch.setattr(resolver, "LOOKUP_TIMEOUT_S", 2.0)
    for_ever = threading.Event()

    def look_up(name: str) -> list[str]:
        if name.startswith("hangs"):
            for_ever.wait(20)
        return ["192.0.2.1"]

    names = resolver.Resolver(look_up)
    begun = time.monotonic()
    with structlog.testing.capture_logs() as logs:
        assert refresh(names, "hangs-1", "works", "hangs-2")
    for_ever.set()
    assert time.monotonic() - begun < 10
    assert names.addresses == {"works": "192.0.2.1"}
    assert {entry["error"] for entry in logs} == {"no answer within 2 s"}


def test_forgotten_name_is_asked_for_at_once_when_it_is_back():
    answers = Answers(a=["192.0.2.1"], b=["192.0.2.2"])
    names = resolver.Resolver(answers, Clock())
    refresh(names, "a", "b")
    names.forget_others({"b"})
    assert names.addresses == {"b": "192.0.2.2"}
    assert refresh(names, "a", "b")
    assert sorted(answers.asked) == ["a", "a", "b"]


HANGING = """
    import asyncio, time
    from hostint_agent import resolver
    resolver.LOOKUP_TIMEOUT_S = 0.2
    asyncio.run(resolver.Resolver(lambda _: time.sleep(60)).refresh(["a"]))
"""


def test_process_ends_though_dns_hangs():
    command = [sys.executable, "-c", textwrap.dedent(HANGING)]
    assert subprocess.run(command, timeout=10, check=False).returncode == 0


def test_real_lookup_has_the_best_address_first():
    assert resolver.look_up("localhost")[0] in ("127.0.0.1", "::1")
    with pytest.raises(OSError, match="not known|Temporary failure|No address"):
        resolver.look_up("nowhere.invalid")
