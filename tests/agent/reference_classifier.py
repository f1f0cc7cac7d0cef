# SPDX-License-Identifier: Apache-2.0
"""What the classifier has to say, said plainly: one rule after the other. Shares no code with the compiler.

Said twice: `classify` is the truth; reference_classifier.c says the same of many packets, and a test holds the two together.
"""

import ctypes
import ipaddress
import random
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostint_agent import bpf_types, classifier

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
PORTED = (6, 17, 132)
PROTOCOLS = (6, 6, 6, 17, 17, 132, 1, 58, 47, 50)
# none of the rules matches, but one side is in a rule: it may match after NAT
MAY_MATCH_LATER = 0xFFFFFFFE
# struct flow_key
_PACKET = struct.Struct("=16s16sHHBBBx")
_NETWORK = struct.Struct("=16sBB")
_RANGE = struct.Struct("=HH")
_RULE = struct.Struct("=Qi8I4x")


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet as rules see it; without ports: a later fragment. Of ICMP, the destination port is type and code."""

    source: Address
    destination: Address
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    later_fragment: bool = False

    @property
    def has_ports(self) -> bool:
        return self.protocol in PORTED and not self.later_fragment

    def frame(self) -> bytes:
        """The packet on the wire."""
        if self.protocol in (1, 58):
            payload = struct.pack("!HHI", self.destination_port, 0, 0)
        else:
            payload = struct.pack("!HH16x", self.source_port, self.destination_port)
        if self.source.version == 4:
            return self._frame4(payload)
        return self._frame6(payload)

    def _frame4(self, payload: bytes) -> bytes:
        fragment = 185 if self.later_fragment else 0
        header = struct.pack(
            "!BBHHHBBH4s4s",
            0x45,
            0,
            20 + len(payload),
            1,
            fragment,
            64,
            self.protocol,
            0,
            self.source.packed,
            self.destination.packed,
        )
        return bytes(12) + b"\x08\x00" + header + payload

    def _frame6(self, payload: bytes) -> bytes:
        following, extension = self.protocol, b""
        if self.later_fragment:
            extension = struct.pack("!BBHI", self.protocol, 0, 185 << 3, 7)
            following = 44
        header = struct.pack("!IHBB", 6 << 28, len(extension + payload), following, 64)
        return (
            bytes(12)
            + b"\x86\xdd"
            + header
            + self.source.packed
            + self.destination.packed
            + extension
            + payload
        )


def _in_any(address: Address, networks: tuple[classifier.Network, ...]) -> bool:
    return not networks or any(
        address.version == network.version and address in network for network in networks
    )


def _port_in_any(port: int, ranges: tuple[classifier.PortRange, ...]) -> bool:
    return not ranges or any(first <= port <= last for first, last in ranges)


def matches(rule: classifier.Rule, packet: Packet) -> bool:
    """Whether one rule takes a packet."""
    if rule.protocol is not None and rule.protocol != packet.protocol:
        return False
    if not _in_any(packet.source, rule.sources):
        return False
    if not _in_any(packet.destination, rule.destinations):
        return False
    if rule.source_ports or rule.destination_ports:
        return (
            packet.has_ports
            and _port_in_any(packet.source_port, rule.source_ports)
            and _port_in_any(packet.destination_port, rule.destination_ports)
        )
    return True


def classify(rules: Sequence[classifier.Rule], packet: Packet) -> int:
    """Verdict of the first rule that matches; else MAY_MATCH_LATER if a rule has one of the addresses, else 0."""
    for rule in rules:
        if matches(rule, packet):
            return verdict(rule)
    for rule in rules:
        if _in_any(packet.source, rule.sources) or _in_any(packet.destination, rule.destinations):
            return MAY_MATCH_LATER
    return 0


def verdict(rule: classifier.Rule) -> int:
    """struct verdict as one number."""
    return rule.rule_id | rule.watchlist << 32 | rule.action << 48


class Packets:
    """Many packets, as an array of struct flow_key."""

    BYTES = _PACKET.size

    def __init__(self, count: int) -> None:
        self.content = bytearray(count * self.BYTES)

    def __len__(self) -> int:
        return len(self.content) // self.BYTES

    def __getitem__(self, index: int) -> Packet:
        source, destination, source_port, destination_port, protocol, family, no_ports = (
            _PACKET.unpack_from(self.content, index * self.BYTES)
        )
        size = 4 if family == 4 else 16
        return Packet(
            ipaddress.ip_address(source[:size]),
            ipaddress.ip_address(destination[:size]),
            protocol,
            source_port,
            destination_port,
            # of other protocols nobody knows ports
            bool(no_ports) and protocol in (*PORTED, 1, 58),
        )


class Walk:
    """reference_classifier.c."""

    def __init__(self, directory: Path) -> None:
        library = directory / "reference_classifier.so"
        source = Path(__file__).with_suffix(".c")
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]
        subprocess.run([*command, str(library), str(source)], check=True)
        self._library = ctypes.CDLL(str(library))

    def make_packets(self, rules: "Flat", count: int, seed: int) -> Packets:
        """Packets that lie close to the rules."""
        packets = Packets(count)
        self._library.make_packets(
            *rules.pointers, _pointer(packets.content), count, ctypes.c_uint64(seed)
        )
        return packets

    def classify(self, rules: "Flat", packets: Packets) -> bytes:
        """A verdict of 64 bits a packet, as `classify` gives them."""
        verdicts = bytearray(8 * len(packets))
        self._library.classify(
            *rules.pointers, _pointer(packets.content), len(packets), _pointer(verdicts)
        )
        return bytes(verdicts)


def _pointer(buffer: bytearray) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * len(buffer)).from_buffer(buffer)


class Flat:
    """Rules as reference_classifier.c has them."""

    def __init__(self, rules: Sequence[classifier.Rule]) -> None:
        self._networks, self._ranges, self._rules = bytearray(), bytearray(), bytearray()
        for rule in rules:
            self._rules += _RULE.pack(
                verdict(rule),
                -1 if rule.protocol is None else rule.protocol,
                *self._add_networks(rule.sources),
                *self._add_networks(rule.destinations),
                *self._add_ranges(rule.source_ports),
                *self._add_ranges(rule.destination_ports),
            )
        self._count = len(rules)

    @property
    def pointers(self) -> tuple[object, ...]:
        networks, ranges = _pointer(self._networks), _pointer(self._ranges)
        return _pointer(self._rules), self._count, networks, ranges

    def _add_networks(self, networks: Sequence[classifier.Network]) -> tuple[int, int]:
        first = len(self._networks) // _NETWORK.size
        for network in networks:
            address = network.network_address.packed
            self._networks += _NETWORK.pack(address, network.version, network.prefixlen)
        return first, len(networks)

    def _add_ranges(self, ranges: Sequence[classifier.PortRange]) -> tuple[int, int]:
        first = len(self._ranges) // _RANGE.size
        for begin, end in ranges:
            self._ranges += _RANGE.pack(begin, end)
        return first, len(ranges)


_LENGTHS4 = (0, 1, 2, 7, 8, 9, 12, 15, 16, 17, 20, 23, 24, 25, 28, 31, 32)
_LENGTHS6 = (0, 1, 7, 16, 17, 32, 48, 52, 63, 64, 65, 96, 112, 127, 128)


class World:
    """Rules from a small universe, so that everything overlaps, and what people do to a list of rules."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._ids = 0

    def address(self, version: int) -> Address:
        pick = self._random
        if version == 4:
            base = pick.choice((0x0A000000, 0x0A0A0000, 0xC0A80000, 0, 0xFFFFFF00))
            bits = pick.choice((2, 4, 8, 12, 16, 20))
            return ipaddress.IPv4Address(base | pick.getrandbits(bits))
        base = pick.choice((0xFD00 << 112, 0xFD00_0010 << 96, 0x2001_0DB8 << 96, 0, 0xFFFF << 112))
        return ipaddress.IPv6Address(base | pick.getrandbits(pick.choice((2, 8, 16, 64, 80))))

    def network(self, version: int) -> classifier.Network:
        length = self._random.choice(_LENGTHS4 if version == 4 else _LENGTHS6)
        return ipaddress.ip_network((self.address(version), length), strict=False)

    def networks(self) -> tuple[classifier.Network, ...]:
        count = self._random.choice((0, 1, 1, 1, 2, 5))
        return tuple(self.network(self._random.choice((4, 6))) for _ in range(count))

    def ports(self) -> tuple[classifier.PortRange, ...]:
        ranges = []
        for _ in range(self._random.choice((0, 0, 1, 1, 3))):
            first = self._random.choice((0, 1, 80, 255, 256, 443, 1023, 1024, 65279, 65280, 65535))
            span = self._random.choice((0, 0, 1, 255, 256, 70000))
            ranges.append((first, min(65535, first + span)))
        return tuple(ranges)

    def rule(self) -> classifier.Rule:
        """Any rule; ICMP with ports, which matches nothing, is one of them."""
        self._ids += 1
        actions = (bpf_types.RuleAction.REPORT,) * 2 + (bpf_types.RuleAction.IGNORE,)
        return classifier.Rule(
            rule_id=self._ids,
            watchlist=self._random.randrange(256),
            action=self._random.choice(actions),
            protocol=self._random.choice((None, *PROTOCOLS)),
            sources=self.networks(),
            destinations=self.networks(),
            source_ports=self.ports(),
            destination_ports=self.ports(),
        )

    def rules(self, count: int) -> list[classifier.Rule]:
        """Rules, some of them with their reply direction behind them."""
        made: list[classifier.Rule] = []
        while len(made) < count:
            made.append(self.rule())
            if self._random.random() < 0.2:
                made.append(reply(made[-1]))
        return made[:count]

    def sample(self, items: Sequence[Any], count: tuple[int, int]) -> list[Any]:
        """Some of the items, so many from to; in their order."""
        picked = self._random.sample(range(len(items)), self._random.randint(*count))
        return [items[index] for index in sorted(picked)]

    def edited(self, rules: Sequence[classifier.Rule]) -> list[classifier.Rule]:
        """The list after one to three edits: rules that came, went, changed or moved."""
        edited = list(rules)
        for _ in range(self._random.choice((1, 1, 2, 3))):
            self._edit(edited)
        return edited

    def _edit(self, rules: list[classifier.Rule]) -> None:
        kind = self._random.randrange(6)
        at = self._random.randrange(len(rules) + 1)
        if kind == 0 or at == len(rules):
            rules[at:at] = self.rules(self._random.choice((1, 1, 2, 9)))
        elif kind == 1 and len(rules) > 1:
            del rules[at : at + self._random.choice((1, 1, 2, 9))]
        elif kind == 2:
            rules.insert(self._random.randrange(len(rules)), rules.pop(at))
        else:
            rules[at] = self._changed(rules[at], kind)

    def _changed(self, rule: classifier.Rule, kind: int) -> classifier.Rule:
        """The same rule with other addresses, other ports, or all of another."""
        other = self.rule()
        fields = {name: getattr(rule, name) for name in classifier.Rule.__slots__}
        if kind == 3:
            fields["sources"] = (*rule.sources[1:], *other.destinations)
        elif kind == 4:
            fields |= {"source_ports": other.source_ports, "protocol": other.protocol}
        else:
            fields = {name: getattr(other, name) for name in classifier.Rule.__slots__}
            fields |= {"rule_id": rule.rule_id, "watchlist": rule.watchlist}
        return classifier.Rule(**fields)


def reply(rule: classifier.Rule) -> classifier.Rule:
    """The reply direction of a rule."""
    return classifier.Rule(
        rule.rule_id,
        rule.watchlist,
        rule.action,
        rule.protocol,
        rule.destinations,
        rule.sources,
        rule.destination_ports,
        rule.source_ports,
    )
