# SPDX-License-Identifier: Apache-2.0
"""Pure: from rules to the tables of bpf/classify.h. The first rule that matches wins.

An address (or port) is in the class of all rules that can match it, so the number of classes is bounded by the number of
distinct prefixes, and what the rules have in common is left to the kernel to find. A compiler remembers what it compiled:
rules enter and leave the classes, and a list that changed a little costs a little. A whole list is the same from nothing.
"""

import ipaddress
import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hostint_agent import (
    address_tables,
    bpf_types,
    classifier_sizes,
    port_tables,
    rule_order,
    rule_sets,
    table_blocks,
)

PROTOCOLS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132}
NR_RULES = classifier_sizes.NR_RULES
LimitExceeded = classifier_sizes.LimitExceeded
PortRange = port_tables.PortRange
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_VERDICTS = 64  # in a block of classifier_rules
_DENSE = 1.0
# from one change in so many rules on, compiling all of them is no slower
_MANY = 8
_FEW = 32


def host_network(address: str) -> Network:
    """The network of one address. Raises ValueError."""
    return ipaddress.ip_network(address)


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
    """One side of all tables, by map name: blocks of equal size from the first element on; `side` lacks only its generation.

    Images of one compiler share the blocks that did not change.
    """

    tables: Mapping[str, tuple[bytes, ...]]
    side: bytes
    rules: int
    classes: int

    def side_of(self, generation: int) -> bytes:
        """Contents of classifier_sides for this generation of the verdict cache."""
        return self.side[:8] + struct.pack("=I", generation & 0xFFFFFFFF) + self.side[12:]


class Compiler:
    """Compiles one list of rules after the other."""

    def __init__(self) -> None:
        self._state: _State | None = None

    def compile(self, rules: Sequence[Rule]) -> Image:
        """Compile rules into one side of the tables.

        Raises LimitExceeded; the image that was compiled before stays what it is.
        """
        if len(rules) > NR_RULES:
            raise LimitExceeded("rules, both directions counted", len(rules), NR_RULES)
        state, self._state = self._state, None  # what fails half-way is not used again
        if state is None or not _followed(state, rules):
            state = _compiled(rules)
        self._state = state
        return state.image()


def compile_rules(rules: Sequence[Rule]) -> Image:
    """Compile rules without a past. Raises LimitExceeded."""
    return Compiler().compile(rules)


def _followed(state: "_State", rules: Sequence[Rule]) -> bool:
    """Change what is there; False if too much is different, or it does not fit that way."""
    try:
        return state.follow(rules)
    except LimitExceeded:
        return False


def _compiled(rules: Sequence[Rule]) -> "_State":
    """All anew: with gaps between the rules, or without where their room is needed. Raises LimitExceeded."""
    try:
        return _State(rules, rule_order.SPACING)
    except LimitExceeded:
        return _State(rules, _DENSE)


class _State:
    """Rules at their positions, and all tables of them."""

    def __init__(self, rules: Sequence[Rule], spacing: float) -> None:
        self._rules: tuple[Rule, ...] = ()
        self._positions: list[int] = []
        self._sets = sets = rule_sets.RuleSets()
        self._any = (rule_sets.Held(sets), rule_sets.Held(sets))
        self._prefixes4 = address_tables.Prefixes(32, sets)
        self._prefixes6 = address_tables.Prefixes(128, sets)
        self._trie = address_tables.Trie4(self._prefixes4)
        self._hash6 = address_tables.Hash6(self._prefixes6)
        self._ports = port_tables.PortTables(
            sets, (rule.protocol for rule in rules if rule.protocol is not None)
        )
        self._verdicts = table_blocks.Blocks("Q", _VERDICTS, NR_RULES // _VERDICTS)
        positions = rule_order.spread(len(rules), 0, NR_RULES, spacing)
        self._change([], zip(rules, positions, strict=True))
        self._remember(rules, positions)

    def follow(self, rules: Sequence[Rule]) -> bool:
        """Become the state of these rules; False, and nothing done, if that is not worth it. Raises LimitExceeded."""
        following = rule_order.follow(self._rules, self._positions, rules, _name)
        if following is None:
            return False
        end, new_end = len(self._rules) - following.tail, len(rules) - following.tail
        old = zip(self._rules, self._positions, strict=True)
        new = zip(rules[following.head : new_end], following.placed, strict=True)
        gone = dict(enumerate(itertools.islice(old, following.head, end), start=following.head))
        come = []
        for before, placed in zip(following.matched, new, strict=True):
            if before is not None and gone[before] == placed:
                del gone[before]
            else:
                come.append(placed)
        if len(come) * _MANY > len(rules) + _FEW * _MANY:
            return False
        if not all(self._ports.has_group(rule.protocol) for rule, _ in come):
            return False
        self._change(gone.values(), come)
        kept = self._positions
        self._remember(rules, [*kept[: following.head], *following.placed, *kept[end:]])
        return True

    def _remember(self, rules: Sequence[Rule], positions: list[int]) -> None:
        self._rules, self._positions = tuple(rules), positions

    def _change(self, gone: Iterable[tuple[Rule, int]], come: Iterable[tuple[Rule, int]]) -> None:
        for rule, position in gone:
            self._toggle(rule, position, -1)
            self._set_verdict(position, 0)
        for rule, position in come:
            self._toggle(rule, position, 1)
            self._set_verdict(position, _verdict(rule))
        for held in self._any:
            held.settle()
        self._trie.follow(self._prefixes4.settle())
        self._hash6.follow(self._prefixes6.settle())
        self._ports.settle()

    def _toggle(self, rule: Rule, position: int, users: int) -> None:
        """A rule enters (users 1) or leaves (users -1) the classes of its addresses and ports."""
        for side, networks in enumerate((rule.sources, rule.destinations)):
            if not networks:
                self._any[side].toggle(position)
            for version, key in _keys(networks):
                prefixes = self._prefixes4 if version == 4 else self._prefixes6
                prefixes.toggle(key, side, position, users)
        self._ports.toggle(rule.protocol, rule.source_ports, rule.destination_ports, position)

    def _set_verdict(self, position: int, verdict: int) -> None:
        self._verdicts.edit(position // _VERDICTS)[position % _VERDICTS] = verdict

    def image(self) -> Image:
        """The tables as they are now."""
        tables = {
            "trie_roots": self._trie.roots.snapshot(),
            "trie_chunks": self._trie.chunks.snapshot(),
            "gates6": (self._hash6.gates,),
            "buckets6": self._hash6.buckets(),
            "port_roots": self._ports.roots.snapshot(),
            "port_pages": self._ports.pages.snapshot(),
            "class_rows": self._sets.rows(),
            "class_words": self._sets.words(),
            "classifier_rules": self._verdicts.snapshot(),
        }
        return Image(tables, self._side(), rules=len(self._rules), classes=len(self._sets))

    def _side(self) -> bytes:
        """struct classifier_side with generation 0."""
        used = self._hash6.lengths
        lengths = used + [0] * (classifier_sizes.MAX_LENGTHS6 - len(used))
        masks = [((1 << length) - 1) << (128 - length) for length in lengths]
        no_ports = self._ports.no_ports()
        return struct.pack(
            "=IIIHH16Q16Q16I16H256s",
            self._prefixes6.default_leaf(),
            len(used),
            0,
            *(held.held for held in self._any),
            *(mask >> 64 for mask in masks),
            *(mask & 0xFFFFFFFFFFFFFFFF for mask in masks),
            *lengths,
            *no_ports,
            *([0] * (classifier_sizes.NR_PORT_GROUPS - len(no_ports))),
            self._ports.group_of_protocol(),
        )


def _name(rule: Rule) -> tuple[int, int]:
    return rule.watchlist, rule.rule_id


def _verdict(rule: Rule) -> int:
    """struct verdict as one number."""
    return int(rule.rule_id | rule.watchlist << 32 | rule.action << 48)


def _keys(networks: Iterable[Network]) -> Iterator[tuple[int, int]]:
    """(version, prefix as address_tables has them), without those that lie within another."""
    found = [(n.version, int(n.network_address) << 8 | n.prefixlen) for n in networks]
    if len(found) > 1:
        found.sort()
    last_version, end = 0, 0
    for version, key in found:
        if version != last_version or key >= end:
            yield version, key
            last_version, end = version, address_tables.end_of(key, 32 if version == 4 else 128)
