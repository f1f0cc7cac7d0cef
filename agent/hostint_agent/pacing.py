# SPDX-License-Identifier: Apache-2.0
"""How soon to look at the interfaces again, and how soon to try again what failed."""

import time
from collections.abc import Callable


class TokenBucket:
    """How soon to try again what did not last: at once at first, rarely what fails each time.

    A program that insists on the first place would otherwise have links made without end, each of
    which takes the RTNL lock.
    """

    _FREE = 20
    _REFILL_S = 5.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left, self._at = float(self._FREE), clock()

    def spend(self) -> bool:
        """Take one try; False if there is none left now."""
        now = self._clock()
        self._left = min(self._FREE, self._left + (now - self._at) / self._REFILL_S)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Pace:
    """How long changes are gathered before a look: a moment at first, longer if they do not end.

    A new pod is a burst of messages. Where a look takes long, bursts are longer too. kube-proxy may
    add 10,000 addresses, and some networks change for ever: looks may take half a second of CPU
    time at once, and 5 % of a core after that, if a look takes up to 25 ms. One that takes longer
    is made every half second.
    """

    _LEAST_S, _USUAL_S, _MOST_S = 0.02, 0.2, 0.5
    _LOOKS = 4
    _SHARE = 0.05
    _BURST_S = 0.5

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left_s, self._at, self._look_s = self._BURST_S, clock(), 0.0

    def spend(self, look_s: float) -> None:
        """Account for a look."""
        now = self._clock()
        refilled = min(self._BURST_S, self._left_s + (now - self._at) * self._SHARE)
        self._left_s = max(refilled - look_s, -self._MOST_S * self._SHARE)
        self._at, self._look_s = now, look_s

    def gather_s(self) -> float:
        """Return how long to wait from the first change on."""
        usual = min(max(self._LOOKS * self._look_s, self._LEAST_S), self._USUAL_S)
        refilled = self._left_s + (self._clock() - self._at) * self._SHARE
        return max(usual, min(-refilled / self._SHARE, self._MOST_S))
