# SPDX-License-Identifier: Apache-2.0
"""What a frame is, said plainly from the standards, and which rule takes it. Shares nothing with the programs.

IEEE 802.1Q and 802.1ad (a tag 8100 or 88a8, then one more 8100), RFC 791 (IPv4), RFC 8200 (IPv6 and its extension headers),
RFC 4302 (AH counts its length in words of 4), RFC 6275 (mobility). What the programs promise beyond that:

- an IP packet of which the fixed header is there is read; one of which it is not, or is not one, is truncated;
- ports are known when the first 64 bits behind the IP header are there (what RFC 792 has an error quote), and only of TCP,
  UDP and SCTP, never of a later fragment;
- at most six extension headers are followed and none that begins behind byte 1600; where that ends early there are no ports,
  and the protocol is the number of the first header that was not followed.
"""

from collections.abc import Callable, Sequence

from hostint_agent import classifier

NOT_IP = "not IP"
TRUNCATED = "truncated"
_TAGS = frozenset({0x8100, 0x88A8})
_INNER_TAG = 0x8100
_PORTED = frozenset({6, 17, 132})
_EXTENSIONS = frozenset({0, 43, 44, 51, 60, 135})
_FRAGMENT, _AUTH = 44, 51
_MOST_EXTENSIONS = 6
_HORIZON = 1600

Ports = tuple[int, int] | None
# version, source, destination, protocol, ports
Packet = tuple[int, int, int, int, Ports]


def parse(frame: bytes) -> Packet | str:
    """The packet in a frame, or NOT_IP or TRUNCATED."""
    if len(frame) < 14:
        return TRUNCATED
    kind: int | None = frame[12] << 8 | frame[13]
    at = 14
    if kind in _TAGS:
        kind, at = _behind_tags(frame)
    if kind == 0x0800:
        return _ipv4(frame, at)
    if kind == 0x86DD:
        return _ipv6(frame, at)
    return TRUNCATED if kind is None else NOT_IP


def _behind_tags(frame: bytes) -> tuple[int | None, int]:
    """Type and offset behind one or two tags; no type if the frame ends before it."""
    if len(frame) < 18:
        return None, 0
    kind = frame[16] << 8 | frame[17]
    if kind != _INNER_TAG:
        return kind, 18
    if len(frame) < 22:
        return None, 0
    return frame[20] << 8 | frame[21], 22


def _ports(frame: bytes, at: int, protocol: int) -> Ports:
    if protocol not in _PORTED or at > _HORIZON or len(frame) < at + 8:
        return None
    return frame[at] << 8 | frame[at + 1], frame[at + 2] << 8 | frame[at + 3]


def _ipv4(frame: bytes, at: int) -> Packet | str:
    if len(frame) < at + 20:
        return TRUNCATED
    first = frame[at]
    if first >> 4 != 4 or first & 15 < 5:
        return TRUNCATED
    protocol = frame[at + 9]
    later_fragment = frame[at + 6] & 0x1F or frame[at + 7]
    return (
        4,
        int.from_bytes(frame[at + 12 : at + 16], "big"),
        int.from_bytes(frame[at + 16 : at + 20], "big"),
        protocol,
        None if later_fragment else _ports(frame, at + 4 * (first & 15), protocol),
    )


def _ipv6(frame: bytes, at: int) -> Packet | str:
    if len(frame) < at + 40 or frame[at] >> 4 != 6:
        return TRUNCATED
    protocol, behind = frame[at + 6], at + 40
    has_ports = True
    if protocol in _EXTENSIONS:
        protocol, behind, has_ports = _behind_extensions(frame, protocol, behind)
    return (
        6,
        int.from_bytes(frame[at + 8 : at + 24], "big"),
        int.from_bytes(frame[at + 24 : at + 40], "big"),
        protocol,
        _ports(frame, behind, protocol) if has_ports else None,
    )


def _behind_extensions(frame: bytes, protocol: int, at: int) -> tuple[int, int, bool]:
    """(protocol, offset, whether ports may follow)."""
    for _ in range(_MOST_EXTENSIONS):
        if protocol not in _EXTENSIONS:
            return protocol, at, True
        if at > _HORIZON or len(frame) < at + 8:
            return protocol, at, False
        following, length = frame[at], frame[at + 1]
        if protocol == _FRAGMENT:
            if (frame[at + 2] << 8 | frame[at + 3]) >> 3:
                return following, at + 8, False
            at += 8
        elif protocol == _AUTH:
            at += 4 * (length + 2)
        else:
            at += 8 * (length + 1)
        protocol = following
    return protocol, at, protocol not in _EXTENSIONS


def matcher(rules: Sequence[classifier.Rule]) -> Callable[[Packet], classifier.Rule | None]:
    """A function that finds the first rule that takes a packet."""
    plain = [
        (rule, rule.protocol, _masks(rule.sources), _masks(rule.destinations)) for rule in rules
    ]

    def first_match(packet: Packet) -> classifier.Rule | None:
        version, source, destination, protocol, ports = packet
        for rule, wanted, sources, destinations in plain:
            if (
                (wanted is None or wanted == protocol)
                and _is_in(version, source, sources)
                and _is_in(version, destination, destinations)
                and _has_ports(rule, ports)
            ):
                return rule
        return None

    return first_match


def _masks(networks: Sequence[classifier.Network]) -> list[tuple[int, int, int]]:
    return [(n.version, int(n.netmask), int(n.network_address)) for n in networks]


def _is_in(version: int, address: int, networks: list[tuple[int, int, int]]) -> bool:
    if not networks:
        return True
    for network_version, mask, value in networks:
        if network_version == version and address & mask == value:
            return True
    return False


def _has_ports(rule: classifier.Rule, ports: Ports) -> bool:
    if not rule.source_ports and not rule.destination_ports:
        return True
    if ports is None:
        return False
    return all(
        not ranges or any(first <= port <= last for first, last in ranges)
        for port, ranges in zip(ports, (rule.source_ports, rule.destination_ports), strict=True)
    )
