# SPDX-License-Identifier: Apache-2.0
"""Looks up the DNS names of collectors, again and again, and keeps the last good answer."""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable

from hostint_operator import desired_state

Lookup = Callable[[str], Awaitable[tuple[desired_state.Address, ...]]]

REFRESH_S = 30.0
# A name that does not resolve yet is asked for more often: somebody is waiting for it.
RETRY_S = 5.0
LOOKUP_TIMEOUT_S = 10.0


async def look_up(name: str) -> tuple[desired_state.Address, ...]:
    """Ask the system's resolver; raise OSError if the name has no address."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    addresses = {ipaddress.ip_address(entry[4][0]) for entry in found}
    return tuple(sorted(addresses, key=str))


class Resolver:
    """Keeps `answers` (name -> last good answer) fresh for the names that are followed, one task per name."""

    def __init__(
        self,
        answers: dict[str, desired_state.DnsAnswer],
        on_change: Callable[[], None],
        *,
        lookup: Lookup = look_up,
        refresh_s: float = REFRESH_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self._answers = answers
        self._on_change = on_change
        self._lookup = lookup
        self._refresh_s = refresh_s
        self._retry_s = retry_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._answered: dict[str, asyncio.Event] = {}

    def follow(self, names: Iterable[str]) -> None:
        """Follow exactly these names."""
        wanted = set(names)
        for name in set(self._tasks) - wanted:
            self._tasks.pop(name).cancel()
            self._answers.pop(name, None)
            self._answered.pop(name).set()
        for name in wanted - set(self._tasks):
            self._answered[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._keep_fresh(name), name=f"dns {name}")

    async def first_answers(self) -> None:
        """Wait until every followed name has been looked up once, with whatever result."""
        while waiting := [name for name in self._tasks if name not in self._answers]:
            await self._answered[waiting[0]].wait()

    async def _keep_fresh(self, name: str) -> None:
        while True:
            old = self._answers.get(name, desired_state.DnsAnswer((), 0, ""))
            new = await self._ask(name, old)
            if new != self._answers.get(name):
                self._answers[name] = new
                self._on_change()
            self._answered[name].set()
            await asyncio.sleep(self._refresh_s if new.addresses else self._retry_s)

    async def _ask(self, name: str, old: desired_state.DnsAnswer) -> desired_state.DnsAnswer:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                addresses = await self._lookup(name)
        except TimeoutError:
            error = f"no answer within {LOOKUP_TIMEOUT_S:.0f} s"
        except (OSError, UnicodeError) as reason:
            error = str(getattr(reason, "strerror", None) or reason)
        else:
            return desired_state.DnsAnswer(addresses, 0, "")
        return desired_state.DnsAnswer(old.addresses, old.failures + 1, error)
