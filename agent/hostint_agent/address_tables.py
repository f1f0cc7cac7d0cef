# SPDX-License-Identifier: Apache-2.0
"""Pure: the classes of addresses. Which prefixes there are and what class each has; from that the IPv4 trie and the IPv6
hash of bpf/classify.h.

A prefix is a number, its address with its length in the low byte: sorted, parents come before children, and what lies
within a prefix stands together.
"""

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hostint_agent import classifier_sizes, rule_sets, table_blocks

SOURCE, DESTINATION = 0, 1
_MASK64 = (1 << 64) - 1
_NR_BUCKETS6 = classifier_sizes.NR_BUCKETS6
_EMPTY_BUCKET = bytes(64)
_Pending = Mapping[int, rule_sets.Toggled]


def hash_prefix6(high: int, low: int, length: int) -> int:
    """The hash of bpf/classify.h."""
    value = ((high + length) * 0x9E3779B97F4A7C15) & _MASK64
    value ^= value >> 31
    value = ((value ^ low) * 0xBF58476D1CE4E5B9) & _MASK64
    value ^= value >> 29
    value = (value * 0x94D049BB133111EB) & _MASK64
    return value >> 40


def end_of(key: int, address_bits: int) -> int:
    """The first number that is no prefix within this one."""
    return (key & ~255) + (1 << (address_bits - (key & 255) + 8))


@dataclass(frozen=True, slots=True)
class Settled:
    """Prefixes that are new, that are gone, and those within which classes may have changed (none within another)."""

    added: Sequence[int]
    removed: Sequence[int]
    changed: Sequence[int]


@dataclass(frozen=True, slots=True)
class _Ancestor:
    """A prefix on the way down: where it ends, its class before and now, and what entered or left it."""

    end: int
    before: int
    now: int
    toggles: rule_sets.Toggles


class Prefixes:
    """All prefixes of one family; the class of a prefix is of its own rules and those of all its ancestors."""

    def __init__(self, address_bits: int, sets: rule_sets.RuleSets) -> None:
        self._bits = address_bits
        self._sets = sets
        self.keys: list[int] = []
        # by side, beside keys: class; beside keys: how many rules name the prefix
        self._classes = (array("H"), array("H"))
        self._users = array("I")
        # how many prefixes have which length
        self.lengths = [0] * (address_bits + 1)
        self._pending: tuple[dict[int, rule_sets.Toggled], ...] = ({}, {})
        self._pending_users: dict[int, int] = {}

    def toggle(self, key: int, side: int, position: int, users: int) -> None:
        """A rule enters (users 1) or leaves (users -1) a prefix; takes effect when settled."""
        pending = self._pending[side].get(key)
        if pending is None:
            pending = self._pending[side][key] = rule_sets.Toggled()
        pending.add(position)
        self._pending_users[key] = self._pending_users.get(key, 0) + users

    def settle(self) -> Settled:
        """Give every prefix the class of what its rules are now. Raises LimitExceeded."""
        pending, self._pending = self._pending, ({}, {})
        users, self._pending_users = self._pending_users, {}
        added = self._add(sorted(users))
        changed = self.outermost(users)
        for key in changed:
            for side in (SOURCE, DESTINATION):
                self._sweep(side, key, pending[side])
        return Settled(added, self._count(users), changed)

    def leaf(self, index: int) -> int:
        """Both classes of a prefix as the tables hold them."""
        return self._classes[SOURCE][index] | self._classes[DESTINATION][index] << 16

    def default_leaf(self) -> int:
        """Leaf of the addresses that are in no prefix longer than 0."""
        index = self._find(0)
        return 0 if index is None else self.leaf(index)

    def covering_leaf(self, key: int) -> int:
        """Leaf of the longest prefix that has all of this one."""
        index = self._covering(key, key & 255)
        return self.leaf(index) if index is not None else 0

    def within(self, key: int) -> range:
        """Indexes of all prefixes that are this one or within it."""
        return range(bisect_left(self.keys, key), bisect_left(self.keys, self._end(key)))

    def outermost(self, keys: Iterable[int]) -> list[int]:
        """These prefixes without those that lie within another of them."""
        found, end = [], 0
        for key in sorted(keys):
            if key >= end:
                found.append(key)
                end = self._end(key)
        return found

    def _end(self, key: int) -> int:
        return end_of(key, self._bits)

    def _add(self, keys: Sequence[int]) -> list[int]:
        """Have all of these prefixes; the new ones begin with the class of what they lie in."""
        if not self.keys:
            self.keys = list(keys)
            for column in (*self._classes, self._users):
                column.extend([0] * len(keys))
            added = self.keys[:]
        else:
            added = [key for key in keys if self._find(key) is None]
            for key in added:
                self._insert(key)
        for key in added:
            self.lengths[key & 255] += 1
        return added

    def _insert(self, key: int) -> None:
        above = self._covering(key, (key & 255) - 1)
        index = bisect_left(self.keys, key)
        for classes in self._classes:
            held = rule_sets.EMPTY if above is None else classes[above]
            classes.insert(index, self._sets.hold(held))
        self.keys.insert(index, key)
        self._users.insert(index, 0)

    def _find(self, key: int) -> int | None:
        index = bisect_left(self.keys, key)
        return index if index < len(self.keys) and self.keys[index] == key else None

    def _covering(self, key: int, longest: int) -> int | None:
        """Index of the longest prefix, of at most this length, that has the address."""
        for length in range(longest, -1, -1):
            if self.lengths[length]:
                low = self._bits - length + 8
                index = self._find((key >> low << low) | length)
                if index is not None:
                    return index
        return None

    def _sweep(self, side: int, top: int, pending: _Pending) -> None:
        """Walk down a prefix. Below it, who had the class of its ancestor has it still, but for its own changes."""
        classes, sets = self._classes[side], self._sets
        ancestors: list[_Ancestor] = []
        for index in self.within(top):
            key, before = self.keys[index], classes[index]
            while ancestors and key >= ancestors[-1].end:
                ancestors.pop()
            own = pending[key].bits if key in pending else {}
            if not ancestors and not own:
                continue
            toggles = own
            if ancestors:
                toggles = rule_sets.Toggled(ancestors[-1].toggles, own).bits
            if ancestors and before == ancestors[-1].before:
                now = sets.toggled(ancestors[-1].now, own)
            else:
                now = sets.toggled(before, toggles)
            classes[index] = now
            ancestors.append(_Ancestor(self._end(key), before, now, toggles))
            sets.release(before)

    def _count(self, users: Mapping[int, int]) -> list[int]:
        """Count who uses the prefixes, and let go of those that nobody uses; which these were."""
        removed = []
        for key, more in users.items():
            index = bisect_left(self.keys, key)
            self._users[index] += more
            if not self._users[index]:
                removed.append(key)
                self.lengths[key & 255] -= 1
                for classes in self._classes:
                    self._sets.release(classes.pop(index))
                del self.keys[index], self._users[index]
        return removed


class Trie4:
    """The IPv4 trie: 16, 8 and 8 bits. A block of the lower levels exists while there is a prefix that needs it."""

    def __init__(self, prefixes: Prefixes) -> None:
        self._prefixes = prefixes
        self.roots = table_blocks.Blocks("I", 256, 256)
        self.chunks = table_blocks.Blocks("I", 256)
        self._free: list[int] = []
        # by address >> 16 (second level) and 1 << 24 | address >> 8 (third): [number of the chunk, prefixes that need it]
        self._needed: dict[int, list[int]] = {}

    def follow(self, settled: Settled) -> None:
        """Do what the prefixes did. Raises LimitExceeded."""
        changed = [*settled.changed]
        for key in settled.removed:
            changed += self._leave(key >> 8, key & 255)
        for key in settled.added:
            self._need(key >> 8, key & 255)
        for key in self._prefixes.outermost(changed):
            self._paint(key, self._prefixes.covering_leaf(key))
            for index in self._prefixes.within(key):
                self._paint(self._prefixes.keys[index], self._prefixes.leaf(index))

    def _blocks_of(self, address: int, length: int) -> list[tuple[int, int]]:
        """The lower blocks that a prefix needs: (key in _needed, bits of the address above the block)."""
        if length <= 16:
            return []
        second = (address >> 16, 16)
        return [second] if length <= 24 else [second, (1 << 24 | address >> 8, 24)]

    def _entry(self, address: int, above: int) -> "tuple[array[int], int]":
        """Where a block is referred to: the block above, and the place in it."""
        if above == 16:
            return self.roots.edit(address >> 24), (address >> 16) & 255
        return self.chunks.edit(self._needed[address >> 16][0]), (address >> 8) & 255

    def _need(self, address: int, length: int) -> None:
        for known, above in self._blocks_of(address, length):
            if known not in self._needed:
                block, place = self._entry(address, above)
                number = self._new_chunk()
                self.chunks.edit(number)[:] = array("I", [block[place]]) * 256
                block[place] = classifier_sizes.LEAF_CHUNK | number
                self._needed[known] = [number, 0]
            self._needed[known][1] += 1

    def _new_chunk(self) -> int:
        if self._free:
            return self._free.pop()
        limit = classifier_sizes.NR_TRIE_CHUNKS
        if len(self.chunks) >= limit:
            raise classifier_sizes.LimitExceeded(
                "blocks of the IPv4 address trie", limit + 1, limit
            )
        return self.chunks.append()

    def _leave(self, address: int, length: int) -> list[int]:
        """A prefix is gone; the prefixes whose blocks went with it have to be painted."""
        gone = []
        for known, above in reversed(self._blocks_of(address, length)):
            needed = self._needed[known]
            needed[1] -= 1
            if not needed[1]:
                block, place = self._entry(address, above)
                block[place] = 0
                self._free.append(needed[0])
                del self._needed[known]
                gone.append(address >> (32 - above) << (40 - above) | above)
        return gone

    def _paint(self, key: int, leaf: int) -> None:
        """Give all addresses of a prefix a leaf; what lies within it is painted after."""
        address, length = key >> 8, key & 255
        if length <= 8:
            for number in range(address >> 24, (address >> 24) + (1 << (8 - length))):
                self._fill(self.roots.edit(number), 0, 256, leaf)
            return
        if length <= 16:
            block, depth = self.roots.edit(address >> 24), 16
        elif length <= 24:
            block, depth = self.chunks.edit(self._needed[address >> 16][0]), 24
        else:
            block, depth = self.chunks.edit(self._needed[1 << 24 | address >> 8][0]), 32
        first = (address >> (32 - depth)) & 255
        self._fill(block, first, first + (1 << (depth - length)), leaf)

    def _fill(self, block: "array[int]", first: int, end: int, leaf: int) -> None:
        part = block[first:end]
        if max(part) < classifier_sizes.LEAF_CHUNK:
            block[first:end] = array("I", [leaf]) * (end - first)
            return
        for place, entry in enumerate(part, start=first):
            if entry & classifier_sizes.LEAF_CHUNK:
                below = self.chunks.edit(entry & ~classifier_sizes.LEAF_CHUNK)
                self._fill(below, 0, 256, leaf)
            else:
                block[place] = leaf


class Hash6:
    """The IPv6 hash. A prefix lies where it would lie had all been put in by their order: history leaves no traces."""

    def __init__(self, prefixes: Prefixes) -> None:
        self._prefixes = prefixes
        self._buckets = [_EMPTY_BUCKET] * _NR_BUCKETS6
        self._snapshot = tuple(self._buckets)
        self.gates = bytes(8192)
        # prefixes of a bucket, bucket of a prefix, buckets from which a prefix went on to the next
        self._held: dict[int, list[int]] = {}
        self._bucket_of: dict[int, int] = {}
        self._overflowed: set[int] = set()
        self._stale: set[int] = set()

    @property
    def lengths(self) -> list[int]:
        """All prefix lengths but 0, longest first."""
        count = len(self._prefixes.lengths)
        return [length for length in range(count - 1, 0, -1) if self._prefixes.lengths[length]]

    def follow(self, settled: Settled) -> None:
        """Do what the prefixes did. Raises LimitExceeded."""
        if len(self.lengths) > classifier_sizes.MAX_LENGTHS6:
            raise classifier_sizes.LimitExceeded(
                "different IPv6 prefix lengths", len(self.lengths), classifier_sizes.MAX_LENGTHS6
            )
        removed = [key for key in settled.removed if key & 255]
        added = [key for key in settled.added if key & 255]
        if not self._bucket_of:
            for key in added:
                self._place(key)
        else:
            for key in removed:
                self._replace(key, stays=False)
            for key in added:
                self._replace(key, stays=True)
        if removed or added:
            self.gates = _gates(self._prefixes.keys)
        for top in settled.changed:
            within = (self._prefixes.keys[index] for index in self._prefixes.within(top))
            self._stale.update(self._bucket_of[key] for key in within if key & 255)

    def buckets(self) -> tuple[bytes, ...]:
        """buckets6, an element a block."""
        for number in self._stale:
            self._buckets[number] = self._packed(number)
        if self._stale:
            self._snapshot = tuple(self._buckets)
        self._stale.clear()
        return self._snapshot

    def _place(self, key: int) -> None:
        """Put a prefix into the first bucket that has room."""
        home = _home(key)
        for probe in range(classifier_sizes.MAX_PROBES6):
            number = (home + probe) % _NR_BUCKETS6
            held = self._held.setdefault(number, [])
            if len(held) < 2:
                held.append(key)
                self._bucket_of[key] = number
                self._stale.add(number)
                return
            self._overflowed.add(number)
            self._stale.add(number)
        used = len(self._bucket_of)
        raise classifier_sizes.LimitExceeded("IPv6 prefixes", used + 1, used)

    def _replace(self, key: int, *, stays: bool) -> None:
        """Put a prefix in, or take it out, and put anew those that could lie elsewhere then."""
        keys = {key}
        run: list[int] = []
        # buckets before its home do not depend on it
        start = _home(key)
        while not run or (run[-1] in self._overflowed and len(run) < _NR_BUCKETS6):
            run += self._run(run[-1] + 1 if run else start)
            for number in run:
                keys.update(self._clear(number))
            for placed in sorted(keys if stays else keys - {key}):
                self._place(placed)

    def _run(self, start: int) -> list[int]:
        """Buckets from here to the first from which nothing went on."""
        run = [start % _NR_BUCKETS6]
        while run[-1] in self._overflowed and len(run) < _NR_BUCKETS6:
            run.append((run[-1] + 1) % _NR_BUCKETS6)
        return run

    def _clear(self, number: int) -> list[int]:
        self._overflowed.discard(number)
        self._stale.add(number)
        keys = self._held.pop(number, [])
        for key in keys:
            del self._bucket_of[key]
        return keys

    def _packed(self, number: int) -> bytes:
        """struct bucket6."""
        entries = [(0, 0, 0, 0, 0)] * 2
        for place, key in enumerate(self._held.get(number, ())):
            leaf = self._prefixes.covering_leaf(key)
            went_on = int(place == 0 and number in self._overflowed)
            entries[place] = (key >> 72, key >> 8 & _MASK64, leaf, key & 255, went_on)
        return struct.pack("=QQIHH8xQQIHH8x", *entries[0], *entries[1])


def _home(key: int) -> int:
    return hash_prefix6(key >> 72, key >> 8 & _MASK64, key & 255) % _NR_BUCKETS6


def _gates(keys: Iterable[int]) -> bytes:
    """One bit for each value of the top 16 bits under which there is a prefix; prefixes sorted."""
    gates, last = 0, -1
    for key in keys:
        length, top = key & 255, key >> 120
        if length >= 16:
            if top != last:
                gates |= 1 << top
                last = top
        elif length:
            gates |= ((1 << (1 << (16 - length))) - 1) << top
    return gates.to_bytes(8192, "little")
