# SPDX-License-Identifier: Apache-2.0
"""Sequence accounting of one sender: what is lost, what came twice, what came late. Pure."""

from collections import deque

_MODULUS = 1 << 32
# A number this far behind or ahead is a sender that began anew, not a very late report.
WINDOW = 1024
_RESTART = 1 << 20


class SequenceTracker:
    """Numbers of one (source, node id, hw id). A gap counts as lost; a number that fills it later is taken back."""

    def __init__(self) -> None:
        self.lost = 0
        self.duplicates = 0
        self.reordered = 0
        self.restarts = 0
        self._next: int | None = None
        self._missing: set[int] = set()
        self._order: deque[int] = deque()

    def see(self, number: int) -> int:
        """Account for one sequence number; returns by how much `lost` changed."""
        if self._next is None:
            self._next = (number + 1) % _MODULUS
            return 0
        ahead = (number - self._next) % _MODULUS
        if ahead == 0:
            self._next = (number + 1) % _MODULUS
            return 0
        if ahead < _RESTART:
            return self._jump(number, ahead)
        return self._behind(number)

    def _jump(self, number: int, ahead: int) -> int:
        first = self._next or 0
        for missing in range(max(0, ahead - WINDOW), ahead):
            self._remember((first + missing) % _MODULUS)
        self._next = (number + 1) % _MODULUS
        self.lost += ahead
        return ahead

    def _behind(self, number: int) -> int:
        if number in self._missing:
            self._missing.discard(number)
            self.reordered += 1
            self.lost -= 1
            return -1
        back = ((self._next or 0) - number) % _MODULUS
        if back > WINDOW:
            self.restarts += 1
            self._next = (number + 1) % _MODULUS
            self._missing.clear()
            self._order.clear()
        else:
            self.duplicates += 1
        return 0

    def _remember(self, number: int) -> None:
        self._missing.add(number)
        self._order.append(number)
        while len(self._order) > WINDOW:
            self._missing.discard(self._order.popleft())
