# SPDX-License-Identifier: Apache-2.0
"""Look up collectors that are given by name, again and again; keep what is known without DNS."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import structlog

# The resolver of the C library does not return how long an answer is valid.
REFRESH_S = 30.0
LOOKUP_TIMEOUT_S = 5.0
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0

log = structlog.get_logger()

LookUp = Callable[[str], Sequence[str]]


def look_up(name: str) -> list[str]:
    """Return the addresses of a name, best first (RFC 6724). Raises OSError or UnicodeError."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    return [str(entry[4][0]) for entry in found]


class Resolver:
    """Knows the address of each name that it is asked to follow."""

    def __init__(
        self, look_up: LookUp = look_up, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Know nothing yet."""
        self._look_up = look_up
        self._clock = clock
        # the last known address, by name
        self.addresses: dict[str, str] = {}
        # when to ask next, and, while it fails, how long to wait after the next failure
        self._due: dict[str, float] = {}
        self._delay_s: dict[str, float] = {}

    async def refresh(self, names: Iterable[str]) -> bool:
        """Look up those names that are due; return whether an address is a different one now."""
        now = self._clock()
        due = [name for name in names if self._due.get(name, now) <= now]
        return any(await asyncio.gather(*map(self._refresh_one, due)))

    def forget_others(self, names: Collection[str]) -> None:
        """Forget all names but these."""
        for known in (self.addresses, self._due, self._delay_s):
            for name in [name for name in known if name not in names]:
                del known[name]

    async def _refresh_one(self, name: str) -> bool:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                found = await _in_thread(self._look_up, name)
            if not found:
                raise OSError(0, "no address")
        except TimeoutError:
            self._failed(name, f"no answer within {LOOKUP_TIMEOUT_S:.0f} s")
            return False
        except (OSError, UnicodeError) as error:
            self._failed(name, str(getattr(error, "strerror", None) or error))
            return False
        failed = self._delay_s.pop(name, None) is not None
        self._due[name] = self._clock() + REFRESH_S
        known = self.addresses.get(name)
        # Servers rotate their answers: an address that is still among them stays.
        if known in found:
            if failed:
                log.info("collector name resolved again", name=name, address=known)
            return False
        self.addresses[name] = found[0]
        if failed or known:
            log.info("collector name resolved", name=name, address=found[0], before=known)
        return True

    def _failed(self, name: str, error: str) -> None:
        known = self.addresses.get(name)
        delay_s = self._delay_s.get(name)
        if delay_s is None:
            if known:
                log.warning(
                    "collector name not resolved, its last address stays",
                    name=name,
                    address=known,
                    error=error,
                )
            else:
                log.error(
                    "collector name not resolved, nothing is reported to it; retrying",
                    name=name,
                    error=error,
                )
        delay_s = delay_s or _FIRST_RETRY_S
        self._due[name] = self._clock() + delay_s
        self._delay_s[name] = min(2 * delay_s, _LAST_RETRY_S)


async def _in_thread(look_up: LookUp, name: str) -> Sequence[str]:
    """Look up without holding up the event loop, or the end of the process if there is no answer.

    The loop's own threads would be waited for, and while they wait, do nothing else.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[str]] = loop.create_future()

    def settle(found: Sequence[str], error: Exception | None) -> None:
        if answer.done():
            return
        if error:
            answer.set_exception(error)
        else:
            answer.set_result(found)

    def work() -> None:
        found: Sequence[str] = ()
        failure: Exception | None = None
        try:
            found = look_up(name)
        except (OSError, UnicodeError) as error:
            failure = error
        # the loop may have ended meanwhile
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, found, failure)

    threading.Thread(target=work, name="dns", daemon=True).start()
    return await answer
