# SPDX-License-Identifier: Apache-2.0
"""Pure: which position (bit) each rule of a list has: in the list's order, with gaps, so that a list that changes a little
moves few rules.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hostint_agent import classifier_sizes

# of 16 positions one stays free
SPACING = 16 / 15
# so many rules on either side of what changed may move to make room
_REACH = 64
# a list that shrank is placed anew before its few rules lie in many words
_MAX_STRETCH = 2
_STRETCH_FREE = 1024

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Following:
    """How a new list follows an old one. Both begin with the same `head` items and end with the same `tail` ones, at the
    same positions; of those between, `matched` has for each new one the index of the old one that it continues, and
    `placed` its position.
    """

    head: int
    tail: int
    matched: Sequence[int | None]
    placed: Sequence[int]


def spread(count: int, low: int, high: int, spacing: float = SPACING) -> list[int]:
    """Positions from low on, below high: with gaps, as far as there is room for them."""
    step = min(spacing, (high - low) / max(count, 1))
    return [low + int(place * step) for place in range(count)]


def follow(
    old: Sequence[Item],
    positions: Sequence[int],
    new: Sequence[Item],
    name: Callable[[Item], Hashable],
) -> Following | None:
    """Let a list follow another: items continue those of the same name; None where too many would have to move."""
    shorter = min(len(old), len(new))
    head = _same(old, new)
    tail = min(_same(old[::-1], new[::-1]), shorter - head)
    head, tail = max(0, head - _REACH), max(0, tail - _REACH)
    end = len(old) - tail
    matched = _match(old, range(head, end), new[head : len(new) - tail], name)
    low = positions[head - 1] + 1 if head else 0
    high = positions[end] if tail else classifier_sizes.NR_RULES
    placed = _place([None if i is None else positions[i] for i in matched], low, high)
    if placed is None:
        return None
    last = positions[-1] if tail else max(placed, default=0)
    if last > _MAX_STRETCH * len(new) + _STRETCH_FREE:
        return None
    return Following(head, tail, matched, placed)


def _same(old: Sequence[Item], new: Sequence[Item]) -> int:
    """How many items are the same from the begin on."""
    count = 0
    for one, other in zip(old, new, strict=False):
        if one is not other and one != other:
            break
        count += 1
    return count


def _match(
    old: Sequence[Item], within: range, new: Sequence[Item], name: Callable[[Item], Hashable]
) -> list[int | None]:
    """For each new item the index of an old one of its name, in the same order."""
    named: dict[Hashable, list[int]] = {}
    for index in reversed(within):
        named.setdefault(name(old[index]), []).append(index)
    matched: list[int | None] = []
    last = within.start - 1
    for item in new:
        candidates = named.get(name(item), [])
        while candidates and candidates[-1] <= last:
            candidates.pop()
        matched.append(candidates.pop() if candidates else None)
        last = last if matched[-1] is None else matched[-1]
    return matched


def _place(wanted: Sequence[int | None], low: int, high: int) -> list[int] | None:
    """Positions from low on, below high: those wanted, but where there is one missing and no room beside it."""
    found = [*wanted]
    end = 0
    while None in found[end:]:
        first = found.index(None, end)
        end = next((i for i in range(first, len(found)) if found[i] is not None), len(found))
        room = _room(found, range(first, end), low, high)
        if room is None:
            return None
        items, free = room
        found[items.start : items.stop] = spread(len(items), free.start, free.stop)
        end = items.stop
    return [position for position in found if position is not None]


def _room(
    found: Sequence[int | None], items: range, low: int, high: int
) -> tuple[range, range] | None:
    """The least range of items around these that fits between its neighbours, and the positions it may have."""
    while True:
        before = found[items.start - 1] if items.start else low - 1
        after = found[items.stop] if items.stop < len(found) else high
        if before is not None and after is not None and after - before - 1 >= len(items):
            return items, range(before + 1, after)
        if len(items) == len(found):
            return None
        items = range(max(0, items.start - 1), min(len(found), items.stop + 1))
