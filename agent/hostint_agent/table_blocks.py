# SPDX-License-Identifier: Apache-2.0
"""A table as a sequence of blocks that never change: what was changed is a new block, so that two versions share the rest."""

from array import array


class Blocks:
    """A table of equal blocks of unsigned integers, edited in place between two snapshots."""

    def __init__(self, typecode: str, entries: int, count: int = 0) -> None:
        """`count` blocks of `entries` zeros; `typecode` as in array."""
        self._typecode = typecode
        self._zeros = bytes(array(typecode).itemsize * entries)
        self._blocks = [self._zeros] * count
        self._edited: dict[int, array[int]] = {}
        self._snapshot: tuple[bytes, ...] | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def append(self) -> int:
        """Add a block of zeros; its number."""
        self._blocks.append(self._zeros)
        self._snapshot = None
        return len(self._blocks) - 1

    def edit(self, number: int) -> "array[int]":
        """A block to change; it is this block until the next snapshot."""
        found = self._edited.get(number)
        if found is None:
            found = self._edited[number] = array(self._typecode, self._blocks[number])
        return found

    def snapshot(self) -> tuple[bytes, ...]:
        """All blocks as they are now; those that did not change are the same objects as before."""
        for number, block in self._edited.items():
            content = block.tobytes()
            if content != self._blocks[number]:
                self._blocks[number] = content
                self._snapshot = None
        self._edited.clear()
        if self._snapshot is None:
            self._snapshot = tuple(self._blocks)
        return self._snapshot
