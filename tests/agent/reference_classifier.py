# SPDX-License-Identifier: Apache-2.0
"""What the classifier has to say, said plainly: one rule after the other. Shares no code with the compiler."""

import ipaddress
import random
import struct
from dataclasses import dataclass

from hostint_agent import bpf_types, classifier

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
PROTOCOLS = (6, 6, 6, 17, 17, 132, 1, 58, 47, 50)


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet as rules see it; without ports: a later fragment."""

    source: Address
    destination: Address
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    later_fragment: bool = False

    @property
    def has_ports(self) -> bool:
        return self.protocol in (6, 17, 132) and not self.later_fragment

    def frame(self) -> bytes:
        """The packet on the wire."""
        if self.protocol in (1, 58):
            payload = struct.pack("!BBHI", self.destination_port >> 8, 0, 0, 0)
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


def classify(rules: list[classifier.Rule], packet: Packet) -> int:
    """Id of the first rule that matches, 0 if none does."""
    return next((rule.rule_id for rule in rules if matches(rule, packet)), 0)


class World:
    """Rules and packets from a small universe, so that everything overlaps."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def address(self, version: int) -> Address:
        pick = self._random
        if version == 4:
            base = pick.choice((0x0A000000, 0x0A0A0000, 0xC0A80000, 0))
            bits = pick.choice((2, 4, 8, 12, 16, 20))
            return ipaddress.IPv4Address(base | pick.getrandbits(bits))
        base = pick.choice((0xFD00 << 112, 0xFD00_0010 << 96, 0x2001_0DB8 << 96, 0))
        return ipaddress.IPv6Address(base | pick.getrandbits(pick.choice((2, 8, 16, 64, 80))))

    def network(self, version: int) -> classifier.Network:
        lengths = (
            (0, 1, 8, 12, 15, 16, 17, 20, 23, 24, 25, 28, 31, 32)
            if version == 4
            else (0, 7, 16, 32, 48, 52, 63, 64, 65, 112, 127, 128)
        )
        length = self._random.choice(lengths)
        return ipaddress.ip_network((self.address(version), length), strict=False)

    def networks(self) -> tuple[classifier.Network, ...]:
        count = self._random.choice((0, 1, 1, 1, 2, 5))
        return tuple(self.network(self._random.choice((4, 6))) for _ in range(count))

    def ports(self) -> tuple[classifier.PortRange, ...]:
        ranges = []
        for _ in range(self._random.choice((0, 0, 1, 1, 3))):
            first = self._random.choice((0, 1, 80, 255, 256, 443, 1023, 1024, 65535))
            span = self._random.choice((0, 0, 1, 255, 256, 70000))
            ranges.append((first, min(65535, first + span)))
        return tuple(ranges)

    def rule(self, rule_id: int) -> classifier.Rule:
        protocol = self._random.choice((None, *PROTOCOLS))
        has_ports = protocol in (6, 17, 132, None)
        return classifier.Rule(
            rule_id=rule_id,
            watchlist=1,
            action=self._random.choice(
                (
                    bpf_types.RuleAction.REPORT,
                    bpf_types.RuleAction.REPORT,
                    bpf_types.RuleAction.IGNORE,
                )
            ),
            protocol=protocol,
            sources=self.networks(),
            destinations=self.networks(),
            source_ports=self.ports() if has_ports else (),
            destination_ports=self.ports() if has_ports else (),
        )

    def rules(self, count: int) -> list[classifier.Rule]:
        return [self.rule(number + 1) for number in range(count)]

    def packet(self, rules: list[classifier.Rule]) -> Packet:
        """A packet, most often close to one of the rules."""
        rule = self._random.choice(rules)
        version = self._random.choice((4, 6))
        return Packet(
            source=self._near(rule.sources, version),
            destination=self._near(rule.destinations, version),
            protocol=rule.protocol or self._random.choice(PROTOCOLS),
            source_port=self._near_port(rule.source_ports),
            destination_port=self._near_port(rule.destination_ports),
            later_fragment=self._random.random() < 0.05,
        )

    def _near(self, networks: tuple[classifier.Network, ...], version: int) -> Address:
        candidates = [n for n in networks if n.version == version]
        if not candidates or self._random.random() < 0.2:
            return self.address(version)
        network = self._random.choice(candidates)
        span = network.max_prefixlen - network.prefixlen
        low = self._random.choice(
            (0, self._random.getrandbits(span) if span else 0, (1 << span) - 1)
        )
        return network.network_address + low

    def _near_port(self, ranges: tuple[classifier.PortRange, ...]) -> int:
        if not ranges:
            return self._random.choice((0, 80, 443, 1024, 65535))
        first, last = self._random.choice(ranges)
        near = self._random.choice((first, last, first - 1, last + 1))
        return max(0, min(65535, near))
