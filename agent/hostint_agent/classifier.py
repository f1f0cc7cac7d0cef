# SPDX-License-Identifier: Apache-2.0
"""Pure: from rules to the tables of bpf/classify.h. A rule set is an integer with one bit a rule; bit 0 is the first rule.

An address (or port) is in the class of all rules that can match it, so the number of classes is bounded by the number of
distinct prefixes, and what the rules have in common is left to the kernel to find.
"""

import ipaddress
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hostint_agent import bpf_types

# sizes of bpf/classify.h
NR_RULES = 16384
NR_CLASSES = 32768
NR_CLASS_WORDS = 524288
NR_TRIE_CHUNKS = 8192
NR_BUCKETS6 = 8192
MAX_LENGTHS6 = 16
MAX_PROBES6 = 4
NR_PORT_PAGES = 4096
NR_PORT_GROUPS = 16
SEGMENT_WORDS = 16
ROW_SEGMENTS = NR_RULES // 64 // SEGMENT_WORDS

PROTOCOLS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132}
PORTED = (6, 17, 132)
# port groups: a protocol with ports or types of its own, and one for all others
_GROUPS = {6: 0, 17: 1, 132: 2, 1: 3, 58: 4}
_OTHER_GROUP = 5
_PORTED_GROUPS = (0, 1, 2)

_CHUNK = 0x80000000
_PAGE = 0x8000
_MASK64 = (1 << 64) - 1
_SEGMENT_BYTES = SEGMENT_WORDS * 8
_EMPTY_SEGMENT = bytes(_SEGMENT_BYTES)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
PortRange = tuple[int, int]


def host_network(address: str) -> Network:
    """The network of one address. Raises ValueError."""
    return ipaddress.ip_network(address)


class LimitExceeded(Exception):
    """The rules do not fit a table; says which, how much was needed, and how much there is."""

    def __init__(self, what: str, needed: int, limit: int) -> None:
        super().__init__(f"{what}: {needed} needed, at most {limit} are possible")
        self.what = what
        self.needed = needed
        self.limit = limit


@dataclass(frozen=True, slots=True)
class Rule:
    """A directed rule: a set of sources, destinations and ports; what is empty or None matches anything."""

    rule_id: int
    watchlist: int
    action: bpf_types.RuleAction
    protocol: int | None = None
    sources: tuple[Network, ...] = ()
    destinations: tuple[Network, ...] = ()
    source_ports: tuple[PortRange, ...] = ()
    destination_ports: tuple[PortRange, ...] = ()


@dataclass(frozen=True, slots=True)
class Image:
    """One side of all tables: contents by map name, from the first element on; `side` lacks only its generation."""

    tables: Mapping[str, bytes]
    side: bytes
    rules: int
    classes: int

    def side_of(self, generation: int) -> bytes:
        """Contents of classifier_sides for this generation of the verdict cache."""
        return self.side[:8] + struct.pack("=I", generation & 0xFFFFFFFF) + self.side[12:]


class _Classes:
    """Interned rule sets: the same set is the same class."""

    def __init__(self) -> None:
        self._ids = {0: 0}
        self.sets = [0]

    def of(self, bits: int) -> int:
        found = self._ids.get(bits)
        if found is None:
            found = self._ids[bits] = len(self.sets)
            self.sets.append(bits)
            if found >= NR_CLASSES:
                raise LimitExceeded("classes of addresses and ports", found + 1, NR_CLASSES)
        return found


def hash_prefix6(high: int, low: int, length: int) -> int:
    """The hash of bpf/classify.h."""
    value = ((high + length) * 0x9E3779B97F4A7C15) & _MASK64
    value ^= value >> 31
    value = ((value ^ low) * 0xBF58476D1CE4E5B9) & _MASK64
    value ^= value >> 29
    value = (value * 0x94D049BB133111EB) & _MASK64
    return value >> 40


@dataclass(frozen=True, slots=True)
class _Prefix:
    """A prefix with the classes of the addresses that have no longer one."""

    address: int
    length: int
    leaf: int


def _prefixes(rules: Sequence[Rule], version: int, classes: _Classes) -> list[_Prefix]:
    """All prefixes of one family, parents before children, each with the rules of its ancestors."""
    bits = 32 if version == 4 else 128
    own: dict[tuple[int, int], list[int]] = {}
    for index, rule in enumerate(rules):
        for side, networks in enumerate((rule.sources, rule.destinations)):
            for network in networks:
                if network.version == version:
                    key = (int(network.network_address), network.prefixlen)
                    own.setdefault(key, [0, 0])[side] |= 1 << index
    found, ancestors = [], [(0, 0, 0, 0)]
    for (address, length), (own_source, own_destination) in sorted(own.items()):
        while address >> (bits - ancestors[-1][1]) != ancestors[-1][0]:
            ancestors.pop()
        source = own_source | ancestors[-1][2]
        destination = own_destination | ancestors[-1][3]
        ancestors.append((address >> (bits - length), length, source, destination))
        leaf = classes.of(source) | classes.of(destination) << 16
        found.append(_Prefix(address, length, leaf))
    return found


class _Trie:
    """The IPv4 trie: 16, 8 and 8 bits."""

    def __init__(self) -> None:
        self.roots = array("I", bytes(4 * 65536))
        self.chunks: list[array[int]] = []

    def paint(self, prefix: _Prefix) -> None:
        """Give a prefix its leaf; parents must have been painted before."""
        block, position, depth = self.roots, prefix.address >> 16, 16
        while prefix.length > depth:
            block = self._below(block, position)
            depth += 8
            position = (prefix.address >> (32 - depth)) & 255
        count = 1 << (depth - prefix.length)
        block[position : position + count] = array("I", [prefix.leaf]) * count

    def _below(self, block: "array[int]", position: int) -> "array[int]":
        entry = block[position]
        if entry & _CHUNK:
            return self.chunks[entry & ~_CHUNK]
        if len(self.chunks) >= NR_TRIE_CHUNKS:
            raise LimitExceeded(
                "blocks of the IPv4 address trie", len(self.chunks) + 1, NR_TRIE_CHUNKS
            )
        block[position] = _CHUNK | len(self.chunks)
        self.chunks.append(array("I", [entry]) * 256)
        return self.chunks[-1]


@dataclass(frozen=True, slots=True)
class _Tables6:
    """The IPv6 tables and what of them stands in classifier_sides."""

    default_leaf: int
    lengths: list[int]
    gates: bytes
    buckets: bytes


def _tables6(prefixes: Iterable[_Prefix]) -> _Tables6:
    default, lengths, gate = 0, set(), 0
    buckets: list[list[tuple[int, int, int, int]]] = [[] for _ in range(NR_BUCKETS6)]
    overflow: set[int] = set()
    for prefix in prefixes:
        if prefix.length == 0:
            default = prefix.leaf
            continue
        lengths.add(prefix.length)
        span = 1 << max(0, 16 - prefix.length)
        gate |= ((1 << span) - 1) << (prefix.address >> 112)
        high, low = prefix.address >> 64, prefix.address & _MASK64
        first = hash_prefix6(high, low, prefix.length)
        for probe in range(MAX_PROBES6):
            bucket = (first + probe) % NR_BUCKETS6
            if len(buckets[bucket]) < 2:
                buckets[bucket].append((high, low, prefix.leaf, prefix.length))
                break
            overflow.add(bucket)
        else:
            used = sum(map(len, buckets))
            raise LimitExceeded("IPv6 prefixes", used + 1, used)
    if len(lengths) > MAX_LENGTHS6:
        raise LimitExceeded("different IPv6 prefix lengths", len(lengths), MAX_LENGTHS6)
    packed = bytearray(NR_BUCKETS6 * 64)
    for index, entries in enumerate(buckets):
        for slot, (high, low, leaf, length) in enumerate(entries):
            went_on = int(slot == 0 and index in overflow)
            struct.pack_into(
                "=QQIHHQ", packed, index * 64 + slot * 32, high, low, leaf, length, went_on, 0
            )
    return _Tables6(
        default, sorted(lengths, reverse=True), gate.to_bytes(8192, "little"), bytes(packed)
    )


def _protocol_groups(rules: Iterable[Rule]) -> dict[int, int]:
    """Port group of every protocol that has one of its own; any other a rule names gets one too."""
    groups = dict(_GROUPS)
    for rule in rules:
        if rule.protocol is not None and rule.protocol not in groups:
            groups[rule.protocol] = len(groups) + 1  # one number is taken by _OTHER_GROUP
    if len(groups) + 1 > NR_PORT_GROUPS:
        raise LimitExceeded("protocols named by rules", len(groups), NR_PORT_GROUPS - 1)
    return groups


def _groups_of(rule: Rule, groups: Mapping[int, int]) -> Sequence[int]:
    has_ports = bool(rule.source_ports or rule.destination_ports)
    if rule.protocol is None:
        return _PORTED_GROUPS if has_ports else range(len(groups) + 1)
    group = groups[rule.protocol]
    return (group,) if not has_ports or group in _PORTED_GROUPS else ()


def _segments(rules: Iterable[tuple[int, Sequence[PortRange]]]) -> list[tuple[int, int]]:
    """(first port, rule set) where the set of rules that take a port changes, from port 0 on."""
    always, edges = 0, dict[int, int]()
    for bit, ranges in rules:
        if not ranges:
            always |= bit
        for first, last in _merged(ranges):
            edges[first] = edges.get(first, 0) ^ bit
            edges[last + 1] = edges.get(last + 1, 0) ^ bit
    current, found = always ^ edges.pop(0, 0), [(0, 0)]
    found[0] = (0, current)
    for port in sorted(edges):
        if port <= 65535 and edges[port]:
            current ^= edges[port]
            found.append((port, current))
    return found


def _merged(ranges: Iterable[PortRange]) -> list[PortRange]:
    """Ranges without overlap, so that each edge of a rule is crossed once."""
    merged: list[PortRange] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


class _Ports:
    """Port classes of every group and direction."""

    def __init__(self, classes: _Classes) -> None:
        self._classes = classes
        self.roots = array("H", bytes(2 * 2 * NR_PORT_GROUPS * 256))
        self.pages: list[array[int]] = []

    def fill(self, block: int, segments: Sequence[tuple[int, int]]) -> None:
        """Write one block of the roots and the pages it needs."""
        leaves = array("H", bytes(2 * 65536))
        for (first, bits), following in zip(segments, [*segments[1:], (65536, 0)], strict=True):
            count = following[0] - first
            leaves[first : first + count] = array("H", [self._classes.of(bits)]) * count
        for high in range(256):
            page = leaves[high * 256 : high * 256 + 256]
            uniform = page.count(page[0]) == 256
            self.roots[block * 256 + high] = page[0] if uniform else self._page(page)

    def _page(self, page: "array[int]") -> int:
        if len(self.pages) >= NR_PORT_PAGES:
            raise LimitExceeded("pages of port ranges", len(self.pages) + 1, NR_PORT_PAGES)
        self.pages.append(page)
        return _PAGE | (len(self.pages) - 1)


def _rows(classes: Sequence[int]) -> tuple[bytes, bytes]:
    """class_rows and class_words: what of a class's rule set is not zero, equal segments shared."""
    rows = bytearray(len(classes) * 128)
    words = bytearray(_EMPTY_SEGMENT)
    known = {_EMPTY_SEGMENT: 0}
    for index, bits in enumerate(classes):
        data = bits.to_bytes(NR_RULES // 8, "little")
        summary, positions = 0, [0] * ROW_SEGMENTS
        for number in range(ROW_SEGMENTS):
            segment = data[number * _SEGMENT_BYTES : (number + 1) * _SEGMENT_BYTES]
            position = known.get(segment)
            if position is None:
                position = known[segment] = len(words) // 8
                words += segment
            if position:
                positions[number] = position
                for offset, word in enumerate(struct.unpack("=16Q", segment)):
                    summary |= bool(word) << (number * SEGMENT_WORDS + offset)
        rows[index * 128 : index * 128 + 32] = summary.to_bytes(32, "little")
        struct.pack_into("=16I", rows, index * 128 + 32, *positions)
    if len(words) // 8 > NR_CLASS_WORDS:
        raise LimitExceeded("words of rule sets", len(words) // 8, NR_CLASS_WORDS)
    return bytes(rows), bytes(words)


def _side(
    tables6: _Tables6,
    any_classes: tuple[int, int],
    no_ports: Sequence[int],
    protocol_groups: Mapping[int, int],
) -> bytes:
    """struct classifier_side with generation 0."""
    lengths = tables6.lengths + [0] * (MAX_LENGTHS6 - len(tables6.lengths))
    masks = [((1 << length) - 1) << (128 - length) for length in lengths]
    groups = bytearray([_OTHER_GROUP] * 256)
    for protocol, group in protocol_groups.items():
        groups[protocol] = group
    return struct.pack(
        "=IIIHH16Q16Q16I16H256s",
        tables6.default_leaf,
        len(tables6.lengths),
        0,
        *any_classes,
        *(mask >> 64 for mask in masks),
        *(mask & _MASK64 for mask in masks),
        *lengths,
        *no_ports,
        *([0] * (NR_PORT_GROUPS - len(no_ports))),
        bytes(groups),
    )


def compile_rules(rules: Sequence[Rule]) -> Image:
    """Compile rules, the first that matches wins, into one side of the tables.

    Raises LimitExceeded; nothing is half done then.
    """
    if len(rules) > NR_RULES:
        raise LimitExceeded("rules, both directions counted", len(rules), NR_RULES)
    classes, trie = _Classes(), _Trie()
    any_source = sum(1 << index for index, rule in enumerate(rules) if not rule.sources)
    any_destination = sum(1 << index for index, rule in enumerate(rules) if not rule.destinations)
    for prefix in _prefixes(rules, 4, classes):
        trie.paint(prefix)
    tables6 = _tables6(_prefixes(rules, 6, classes))
    ports, no_ports = _Ports(classes), []
    groups = _protocol_groups(rules)
    placed = [(1 << i, rule, _groups_of(rule, groups)) for i, rule in enumerate(rules)]
    for group in range(len(groups) + 1):
        members = [(bit, rule) for bit, rule, within in placed if group in within]
        ports.fill(group, _segments((bit, rule.destination_ports) for bit, rule in members))
        ports.fill(
            group + NR_PORT_GROUPS, _segments((bit, rule.source_ports) for bit, rule in members)
        )
        without = (b for b, rule in members if not rule.source_ports and not rule.destination_ports)
        no_ports.append(classes.of(sum(without)))
    side = _side(tables6, (classes.of(any_source), classes.of(any_destination)), no_ports, groups)
    rows, words = _rows(classes.sets)
    verdicts = b"".join(struct.pack("=IHH", r.rule_id, r.watchlist, r.action) for r in rules)
    tables = {
        "trie_roots": trie.roots.tobytes(),
        "trie_chunks": b"".join(chunk.tobytes() for chunk in trie.chunks),
        "gates6": tables6.gates,
        "buckets6": tables6.buckets,
        "port_roots": ports.roots.tobytes(),
        "port_pages": b"".join(page.tobytes() for page in ports.pages),
        "class_rows": rows,
        "class_words": words,
        "classifier_rules": verdicts,
    }
    return Image(tables=tables, side=side, rules=len(rules), classes=len(classes.sets))
