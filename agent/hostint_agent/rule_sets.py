# SPDX-License-Identifier: Apache-2.0
"""Pure: sets of rules, interned. Equal sets are one class; equal parts of sets (segments of 1024 rules) are stored once.

A rule is its position, the number of its bit. A class is held by whoever uses it, as often as it is used; one that nobody
holds is given away again.
"""

import struct
from array import array
from collections.abc import Mapping

from hostint_agent import classifier_sizes

# struct class_row: which words are not zero, 16 bits a segment, and where each segment begins in class_words
_ROW = struct.Struct(f"={classifier_sizes.ROW_SEGMENTS}H{classifier_sizes.ROW_SEGMENTS}I32x")
_SEGMENT = struct.Struct(f"={classifier_sizes.SEGMENT_WORDS}Q")

# rules that enter a set they are not in, or leave one they are in: bits by number of the segment
Toggles = Mapping[int, int]
EMPTY = 0


class Toggled:
    """Toggles that are collected; what is toggled twice is as it was."""

    __slots__ = ("bits",)

    def __init__(self, *parts: Toggles) -> None:
        self.bits: dict[int, int] = {}
        for part in parts:
            self.merge(part)

    def add(self, position: int) -> None:
        """Toggle one rule."""
        self._flip(
            position // classifier_sizes.SEGMENT_RULES,
            1 << position % classifier_sizes.SEGMENT_RULES,
        )

    def merge(self, other: Toggles) -> None:
        """Toggle the rules of another one as well."""
        for number, bits in other.items():
            self._flip(number, bits)

    def _flip(self, number: int, bits: int) -> None:
        left = self.bits.get(number, 0) ^ bits
        if left:
            self.bits[number] = left
        else:
            del self.bits[number]


class RuleSets:
    """All classes, and their contents as class_rows and class_words have them. Class 0 is the empty set."""

    def __init__(self) -> None:
        self._rows = [bytes(_ROW.size)]
        self._classes = {self._rows[0]: EMPTY}
        self._holders = array("I", [1])
        self._free: list[int] = []
        self._segments = [bytes(_SEGMENT.size)]
        self._segment_numbers = {self._segments[0]: 0}
        self._segment_users = array("I", [1])
        self._segment_words = array("H", [0])
        self._free_segments: list[int] = []

    def __len__(self) -> int:
        return len(self._classes)

    def toggled(self, held: int, toggles: Toggles) -> int:
        """The class that differs from `held` by these rules; the caller holds it too, from now on.

        Raises LimitExceeded.
        """
        if not toggles:
            return self.hold(held)
        row = list(_ROW.unpack(self._rows[held]))
        for number, bits in toggles.items():
            at = classifier_sizes.ROW_SEGMENTS + number
            before = self._segments[row[at] // classifier_sizes.SEGMENT_WORDS]
            segment = self._segment(int.from_bytes(before, "little") ^ bits)
            row[number] = self._segment_words[segment]
            row[at] = segment * classifier_sizes.SEGMENT_WORDS
        return self._class(_ROW.pack(*row))

    def hold(self, held: int) -> int:
        """Hold a class once more."""
        self._holders[held] += held != EMPTY
        return held

    def release(self, held: int) -> None:
        """Hold a class once less; the empty one is always there."""
        self._holders[held] -= held != EMPTY
        if self._holders[held]:
            return
        row = self._rows[held]
        del self._classes[row]
        self._free.append(held)
        for segment in self._segments_of(row):
            self._segment_users[segment] -= 1
            if not self._segment_users[segment]:
                del self._segment_numbers[self._segments[segment]]
                self._free_segments.append(segment)

    def rows(self) -> tuple[bytes, ...]:
        """class_rows, an element a block."""
        return tuple(self._rows)

    def words(self) -> tuple[bytes, ...]:
        """class_words, a segment a block."""
        return tuple(self._segments)

    @staticmethod
    def _segments_of(row: bytes) -> list[int]:
        starts = _ROW.unpack(row)[classifier_sizes.ROW_SEGMENTS :]
        return [start // classifier_sizes.SEGMENT_WORDS for start in starts if start]

    def _class(self, row: bytes) -> int:
        found = self._classes.get(row)
        if found is not None:
            return self.hold(found)
        if self._free:
            found = self._free.pop()
            self._rows[found] = row
        else:
            found = len(self._rows)
            _check("classes of addresses and ports", found + 1, classifier_sizes.NR_CLASSES)
            self._rows.append(row)
            self._holders.append(0)
        self._classes[row] = found
        for segment in self._segments_of(row):
            self._segment_users[segment] += 1
        return self.hold(found)

    def _segment(self, bits: int) -> int:
        content = bits.to_bytes(_SEGMENT.size, "little")
        found = self._segment_numbers.get(content)
        if found is not None:
            return found
        if self._free_segments:
            found = self._free_segments.pop()
            self._segments[found] = content
        else:
            found = len(self._segments)
            words = (found + 1) * classifier_sizes.SEGMENT_WORDS
            _check("words of rule sets", words, classifier_sizes.NR_CLASS_WORDS)
            self._segments.append(content)
            self._segment_users.append(0)
            self._segment_words.append(0)
        self._segment_numbers[content] = found
        words_set = (bool(word) << place for place, word in enumerate(_SEGMENT.unpack(content)))
        self._segment_words[found] = sum(words_set)
        return found


class Held:
    """One class that follows the rules that enter and leave it."""

    def __init__(self, sets: RuleSets) -> None:
        self._sets = sets
        self._toggled = Toggled()
        self.held = sets.hold(EMPTY)

    def toggle(self, position: int) -> None:
        """A rule enters or leaves; takes effect when settled."""
        self._toggled.add(position)

    def settle(self) -> None:
        """Be the class of what the rules are now. Raises LimitExceeded."""
        before, toggles, self._toggled = self.held, self._toggled.bits, Toggled()
        self.held = self._sets.toggled(before, toggles)
        self._sets.release(before)


def _check(what: str, needed: int, limit: int) -> None:
    if needed > limit:
        raise classifier_sizes.LimitExceeded(what, needed, limit)
