# SPDX-License-Identifier: Apache-2.0
"""bpf/parse.h and fingerprint.h, compiled by gcc with its sanitizer of undefined behaviour, on packets of every shape."""

import ctypes
import random
import struct
import subprocess

import pytest

from hostint_agent import bpf_types, loader

WRAPPER = """
#include <stdbool.h>
#include <stddef.h>
#include <sys/cdefs.h>
#include "fingerprint.h"
int parse(const unsigned char *data, unsigned int bytes, struct flow_key *key, struct packet_offsets *offsets)
{
	return parse_frame(data, data + bytes, key, offsets);
}
unsigned int fingerprint(const unsigned char *data, unsigned int bytes, const struct flow_key *key,
			 struct packet_offsets *offsets)
{
	const struct tunnel_ports tunnels = { .vxlan = { 4789, 8472 }, .geneve = 6081 };

	return packet_fingerprint(data, data + bytes, key, offsets, &tunnels);
}
"""
NOT_IP, TRUNCATED = -1, -2
ETHERNET = bytes(12)
SOURCE4, DESTINATION4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
SOURCE6, DESTINATION6 = (
    bytes.fromhex("fd00" + "00" * 13 + "01"),
    bytes.fromhex("fd00" + "00" * 13 + "02"),
)
PORTS = struct.pack("!HHI", 1234, 80, 0) + bytes(12)


class Offsets(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint16) for name in "network payload fragment transport inner".split()
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parse")
    (directory / "parse.c").write_text(WRAPPER)
    library = directory / "parse.so"
    command = [
        "gcc",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-shared",
        "-fPIC",
    ]
    command += ["-fsanitize=undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover"]
    command += [f"-I{loader.default_bpf_dir()}", "-o", str(library), str(directory / "parse.c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def parse(library):
    function = library.parse

    def run(frame: bytes) -> tuple[int, bpf_types.FlowKey, Offsets]:
        key, offsets = bpf_types.FlowKey(), Offsets()
        # at the end of a page of its own a read too far would be seen by the sanitizer as a wrong result below
        data = ctypes.create_string_buffer(frame, len(frame)) if frame else None
        result = function(data, len(frame), ctypes.byref(key), ctypes.byref(offsets))
        return result, key, offsets

    return run


def ipv4(protocol=6, payload=PORTS, options=b"", fragment=0) -> bytes:
    words = 5 + len(options) // 4
    total = words * 4 + len(payload)
    head = struct.pack("!BBHHHBBH", 4 << 4 | words, 0, total, 1, fragment, 64, protocol, 0)
    return head + SOURCE4 + DESTINATION4 + options + payload


def ipv6(next_header=6, payload=PORTS) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(payload), next_header, 64)
    return head + SOURCE6 + DESTINATION6 + payload


def extension(following: int, words: int = 0) -> bytes:
    return bytes([following, words]) + bytes(6 + 8 * words)


def frame(packet: bytes, *tags: int) -> bytes:
    kind = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    types = [*tags, kind]
    text = ETHERNET + struct.pack("!H", types[0])
    for following in types[1:]:
        text += struct.pack("!HH", 7, following)
    return text + packet


# frame, protocol, (source port, destination port) or None, offset of the IP header
SHAPES = {
    "tcp4": (frame(ipv4()), 6, (1234, 80), 14),
    "udp4-options": (frame(ipv4(17, options=bytes(40))), 17, (1234, 80), 14),
    "sctp4-vlan": (frame(ipv4(132), 0x8100), 132, (1234, 80), 18),
    "tcp4-qinq": (frame(ipv4(), 0x88A8, 0x8100), 6, (1234, 80), 22),
    "icmp4": (frame(ipv4(1, bytes([8, 0]) + bytes(6))), 1, (0, 8 << 8), 14),
    "first-fragment4": (frame(ipv4(17, fragment=0x2000)), 17, (1234, 80), 14),
    "later-fragment4": (frame(ipv4(17, fragment=0x2001)), 17, None, 14),
    "gre4": (frame(ipv4(47)), 47, None, 14),
    "tcp6": (frame(ipv6()), 6, (1234, 80), 14),
    "icmp6": (frame(ipv6(58, bytes([128, 0]) + bytes(6))), 58, (0, 128 << 8), 14),
    "tcp6-hop-by-hop-and-options": (
        frame(ipv6(0, extension(60) + extension(6, 2) + PORTS)),
        6,
        (1234, 80),
        14,
    ),
    "udp6-atomic-fragment": (frame(ipv6(44, bytes([17]) + bytes(7) + PORTS)), 17, (1234, 80), 14),
    "udp6-later-fragment": (
        frame(ipv6(44, bytes([17, 0, 5, 0]) + bytes(4) + PORTS)),
        17,
        None,
        14,
    ),
    "tcp6-six-extensions": (
        frame(ipv6(0, b"".join(extension(0) for _ in range(5)) + extension(6) + PORTS)),
        6,
        (1234, 80),
        14,
    ),
    "tcp6-seven-extensions": (
        frame(ipv6(0, b"".join(extension(0) for _ in range(6)) + extension(6) + PORTS)),
        0,
        None,
        14,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_whole_packet(parse, name):
    data, protocol, ports, network = SHAPES[name]
    result, key, offsets = parse(data)
    assert result == 0
    assert (key.protocol, offsets.network) == (protocol, network)
    if ports is None:
        assert key.no_ports == 1
    else:
        assert (key.source_port, key.destination_port, key.no_ports) == (*ports, 0)
        assert offsets.transport > network


@pytest.mark.parametrize("name", SHAPES)
def test_a_packet_cut_at_any_length_is_truncated_or_has_no_ports_or_is_as_it_was(parse, name):
    data, protocol, ports, network = SHAPES[name]
    header = network + (20 if data[network] >> 4 == 4 else 40)
    for length in range(len(data)):
        result, key, _ = parse(data[:length])
        if length < header:
            assert result == TRUNCATED, length
            continue
        assert result == 0, length
        if not key.no_ports:
            assert (key.protocol, (key.source_port, key.destination_port)) == (protocol, ports), (
                length
            )


@pytest.mark.parametrize("kind", [0x0806, 0x8847, 0x88CC, 0])
def test_what_is_not_ip_is_told_so(parse, kind):
    assert parse(ETHERNET + struct.pack("!H", kind) + bytes(60))[0] == NOT_IP


def test_a_header_length_below_the_minimum_is_no_header(parse):
    broken = bytearray(frame(ipv4()))
    broken[14] = 0x44
    assert parse(bytes(broken))[0] == TRUNCATED


def test_a_version_that_the_type_denies_is_no_header(parse):
    assert parse(ETHERNET + b"\x08\x00" + ipv6())[0] == TRUNCATED
    assert parse(ETHERNET + b"\x86\xdd" + ipv4() + bytes(40))[0] == TRUNCATED


@pytest.fixture(scope="module")
def fingerprints(library, parse):
    """Fingerprints of IP packets."""

    def run(packets: list[bytes], linear: int | None = None) -> list[int]:
        found = []
        for packet in packets:
            data = frame(packet)[:linear]
            result, key, offsets = parse(data)
            assert result == 0
            read = ctypes.create_string_buffer(data, len(data))
            arguments = (len(data), ctypes.byref(key), ctypes.byref(offsets))
            found.append(library.fingerprint(read, *arguments) & 0xFFFFFFFF)
        return found

    return run


def with_number(packet: bytes, at: int, size: int, number: int) -> bytes:
    return packet[:at] + number.to_bytes(size, "big") + packet[at + size :]


def udp(port: int, payload: bytes) -> bytes:
    return struct.pack("!HHHH", 50000, port, 8 + len(payload), 0) + payload


TCP4, UDP4 = ipv4(6, PORTS), ipv4(17, PORTS)
TCP6, UDP6 = ipv6(6, PORTS), ipv6(17, PORTS)


FIRST_FRAGMENT4 = ipv4(17, udp(9, bytes(16)), fragment=0x2000)
LATER_FRAGMENT4 = ipv4(17, bytes(24), fragment=0x2001)
LATER_FRAGMENT6 = ipv6(44, bytes([17, 0, 5, 1, 1, 2, 3, 4]) + bytes(24))
ECHO = b"\x08" + bytes(7) + bytes(16)


@pytest.mark.parametrize(
    ("packet", "at", "size"),
    [
        pytest.param(TCP4, 4, 2, id="IPv4 identification"),
        pytest.param(TCP4, 24, 4, id="TCP sequence number"),
        pytest.param(TCP4, 28, 4, id="TCP acknowledgement number"),
        pytest.param(ipv4(17, udp(9, b"")), 24, 2, id="UDP length"),
        pytest.param(ipv4(17, udp(9, bytes(4))), 28, 4, id="4 bytes of UDP payload"),
        pytest.param(ipv4(17, udp(9, bytes(8))), 28, 8, id="8 bytes of UDP payload"),
        pytest.param(ipv4(17, udp(9, bytes(16))), 28, 8, id="first bytes of a UDP payload"),
        pytest.param(ipv4(17, udp(9, bytes(16))), 36, 8, id="later bytes of a UDP payload"),
        pytest.param(ipv6(17, udp(9, bytes(16))), 48, 8, id="UDP payload, IPv6"),
        pytest.param(ipv4(132, bytes(24)), 24, 4, id="SCTP verification tag"),
        pytest.param(ipv4(132, bytes(24)), 36, 4, id="SCTP TSN"),
        pytest.param(ipv4(132, bytes(24)), 42, 2, id="SCTP stream sequence number"),
        pytest.param(ipv4(1, b"\x08" + bytes(7)), 26, 2, id="ICMP echo's sequence number"),
        pytest.param(ipv4(1, ECHO), 28, 8, id="ICMP echo's content"),
        pytest.param(ipv6(58, b"\x80" + bytes(7)), 46, 2, id="ICMPv6 echo's sequence number"),
        pytest.param(ipv4(50, bytes(16)), 24, 4, id="ESP sequence number"),
        pytest.param(ipv6(89, bytes(16)), 48, 4, id="any other protocol, IPv6"),
        pytest.param(UDP6, 2, 2, id="flow label"),
        pytest.param(TCP6, 44, 4, id="TCP sequence number, IPv6"),
        pytest.param(LATER_FRAGMENT4, 4, 2, id="identification of a later fragment"),
        pytest.param(LATER_FRAGMENT6, 44, 4, id="identification of a later IPv6 fragment"),
    ],
)
def test_fingerprint_differs_between_packets(fingerprints, packet, at, size):
    found = fingerprints([with_number(packet, at, size, number) for number in range(4096)])
    assert len(set(found)) == 4096
    # and in every part of it
    for shift in (0, 8, 16, 24):
        part = [value >> shift & 255 for value in found]
        assert max(part.count(value) for value in range(256)) < 3 * 4096 / 256


@pytest.mark.parametrize("offsets", [(0x2000, 0x20B9, 0x0172), (0x4000, 0x4001)])
def test_fingerprint_differs_between_fragments(fingerprints, offsets):
    found = fingerprints([ipv4(17, bytes(24), fragment=offset) for offset in offsets])
    assert len(set(found)) == len(offsets)
    headers = [struct.pack("!BBHI", 17, 0, (n & 0x1FFF) << 3, 7) for n in offsets]
    found = fingerprints([ipv6(44, header + bytes(24)) for header in headers])
    assert len(set(found)) == len(offsets)


def test_fingerprint_of_a_first_fragment_is_that_of_the_datagram(fingerprints):
    """Which is put together in its sk_buff if it comes last."""
    datagram = udp(9, bytes(range(200)))
    whole4, first4 = ipv4(17, datagram), ipv4(17, datagram[:64], fragment=0x2000)
    first6 = ipv6(44, struct.pack("!BBHI", 17, 0, 1, 7) + datagram[:64])
    assert len(set(fingerprints([whole4, first4]))) == 1
    assert len(set(fingerprints([ipv6(17, datagram), first6]))) == 1


@pytest.mark.parametrize("repeats", [(2, 8), (4, 4), (8, 2)], ids=str)
def test_fingerprint_survives_repeated_numbers(fingerprints, repeats):
    times, size = repeats
    numbers = [number.to_bytes(size, "big") * times for number in range(4096)]
    assert len(set(fingerprints([ipv6(17, udp(9, number)) for number in numbers]))) == 4096


def test_fingerprint_differs_between_protocols(fingerprints):
    found = fingerprints([ipv4(protocol, bytes(20)) for protocol in (6, 47, 50, 89, 103, 112)])
    assert len(set(found)) == 6


def test_fingerprint_survives_an_identification_that_counts_along(fingerprints):
    """A sender whose payload and IPv4 identification hold the same number."""
    packets = [
        with_number(ipv4(17, udp(9, number.to_bytes(2, "big") * 8)), 4, 2, number)
        for number in range(4096)
    ]
    assert len(set(fingerprints(packets))) == 4096


@pytest.mark.parametrize(
    ("packet", "at", "size"),
    [
        pytest.param(UDP4, 8, 1, id="TTL"),
        pytest.param(UDP4, 10, 2, id="header checksum"),
        pytest.param(UDP4, 12, 4, id="source, translated"),
        pytest.param(UDP4, 16, 4, id="destination, translated"),
        pytest.param(UDP4, 20, 2, id="source port, translated"),
        pytest.param(UDP4, 22, 2, id="destination port, translated"),
        pytest.param(ipv4(17, udp(9, bytes(16))), 26, 2, id="UDP checksum"),
        pytest.param(UDP4, 1, 1, id="DSCP"),
        pytest.param(ipv4(1, b"\x08" + bytes(7)), 24, 2, id="ICMP echo's identifier, translated"),
        pytest.param(ipv4(132, bytes(28)), 28, 4, id="SCTP checksum"),
        pytest.param(ipv4(17, udp(9, b"short")), 33, 11, id="padding behind a UDP payload"),
        pytest.param(ipv4(1, b"\x08" + bytes(7)) + bytes(18), 28, 8, id="padding behind ICMP"),
        pytest.param(ipv4(50, bytes(12)) + bytes(14), 32, 4, id="padding behind ESP"),
        pytest.param(ipv4(132, bytes(16)) + bytes(10), 36, 8, id="padding behind SCTP"),
        pytest.param(ipv4(6, PORTS, fragment=0x4000), 6, 1, id="don't fragment"),
        pytest.param(UDP6, 7, 1, id="hop limit"),
        pytest.param(UDP6, 8, 4, id="IPv6 source, translated"),
    ],
)
def test_fingerprint_ignores_what_forwarding_changes(fingerprints, packet, at, size):
    values = (0x40, 0x00) if size == 1 and at == 6 else range(200)
    found = fingerprints([with_number(packet, at, size, value) for value in values])
    assert len(set(found)) == 1


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo_header(source: bytes, destination: bytes, length: int) -> bytes:
    """RFC 768, and RFC 8200, 8.1, whose zeros change no sum."""
    return source + destination + struct.pack("!HH", 17, length)


def udp_between(
    source: bytes, destination: bytes, ports: tuple[int, int], payload: bytes, how: str
) -> bytes:
    """An IP packet whose UDP checksum is complete, left to hardware ("partial"), or absent."""
    head = struct.pack("!HHH", *ports, 8 + len(payload))
    pseudo = pseudo_header(source, destination, 8 + len(payload))
    check = 0
    if how == "complete":
        check = checksum(pseudo + head + b"\0\0" + payload) or 0xFFFF
    elif how == "partial":
        check = ~checksum(pseudo) & 0xFFFF
    packet = ipv4(17) if len(source) == 4 else ipv6(17)
    at = 12 if len(source) == 4 else 8
    datagram = head + struct.pack("!H", check) + payload
    header = packet[:at] + source + destination
    length_at = 2 if len(source) == 4 else 4
    length = len(datagram) + (20 if len(source) == 4 else 0)
    return with_number(header, length_at, 2, length) + datagram


WAYS = {
    4: [(SOURCE4, DESTINATION4), (b"\x0a\x63\0\x0b", DESTINATION4), (SOURCE4, b"\xc0\xa8\1\1")],
    6: [(SOURCE6, DESTINATION6), (b"\xfd\x44" + bytes(13) + b"\7", DESTINATION6)],
}
PORT_PAIRS = [(1234, 80), (61000, 80), (1234, 8080), (0xFFFF, 1)]


@pytest.mark.parametrize("how", ["complete", "partial", "absent"])
@pytest.mark.parametrize("version", [4, 6])
def test_fingerprint_without_payload_survives_nat(fingerprints, version, how):
    """The payload is not in the linear part: the sum of it is what NAT leaves of the checksum."""
    linear = 14 + (20 if version == 4 else 40) + 8
    payloads = [random.Random(1000 + number).randbytes(101) for number in range(200)]
    by_payload = []
    for payload in payloads:
        packets = [
            udp_between(source, destination, ports, payload, how)
            for source, destination in WAYS[version]
            for ports in PORT_PAIRS
        ]
        found = set(fingerprints(packets, linear))
        assert len(found) == 1
        by_payload.append(found.pop())
    # a sum has 16 bits; one in 65,535 looks like one that is left to hardware, and none of these does
    assert len(set(by_payload)) >= 195 if how == "complete" else len(set(by_payload)) == 1


def vxlan(inside: bytes, port: int = 4789) -> bytes:
    return udp(port, struct.pack("!II", 8 << 24, 7 << 8) + inside)


def geneve(inside: bytes, options: bytes = b"") -> bytes:
    head = struct.pack("!BBHI", len(options) // 4, 0, 0x6558, 7 << 8)
    return udp(6081, head + options + inside)


INSIDE = {
    "tcp4": ipv4(6, PORTS),
    "udp4-options": ipv4(17, PORTS, options=bytes(40)),
    "icmp4": ipv4(1, bytes([8, 0]) + bytes(6)),
    "later-fragment4": ipv4(17, PORTS, fragment=0x2001),
    "tcp6": ipv6(6, PORTS),
    "udp6": ipv6(17, PORTS),
    "udp4-payload": ipv4(17, udp(9, bytes(range(32)))),
    "sctp6": ipv6(132, bytes(range(28))),
    "udp6-fragment": ipv6(44, extension(17) + PORTS),
    "udp6-later-fragment": ipv6(44, bytes([17, 0, 5, 0]) + bytes([1, 2, 3, 4]) + PORTS),
}
TUNNELS = {
    "vxlan": lambda packet: ipv4(17, vxlan(frame(packet))),
    "vxlan-other-port": lambda packet: ipv4(17, vxlan(frame(packet), 8472)),
    "vxlan6": lambda packet: ipv6(17, vxlan(frame(packet))),
    "geneve": lambda packet: ipv4(17, geneve(frame(packet))),
    "geneve-options": lambda packet: ipv6(17, geneve(frame(packet), bytes(24))),
    "ip-in-ip": lambda packet: ipv4(4 if packet[0] >> 4 == 4 else 41, packet),
    "ip-in-ipv6": lambda packet: ipv6(4 if packet[0] >> 4 == 4 else 41, packet),
}


def numbered(packet: bytes) -> list[bytes]:
    """The same packet with other numbers where it has some."""
    at, size = (4, 2) if packet[0] >> 4 == 4 else (2, 2)
    return [with_number(packet, at, size, number) for number in range(100)]


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("tunnel", TUNNELS)
def test_fingerprint_is_kept_in_a_tunnel(fingerprints, tunnel, inside):
    packets = numbered(INSIDE[inside])
    assert len(set(fingerprints(packets))) == len(packets)
    assert fingerprints([TUNNELS[tunnel](each) for each in packets]) == fingerprints(packets)


@pytest.mark.parametrize("tunnel", TUNNELS)
def test_offset_of_the_packet_in_a_tunnel(library, parse, fingerprints, tunnel):
    whole = frame(TUNNELS[tunnel](INSIDE["tcp4"]))
    result, key, offsets = parse(whole)
    assert (result, offsets.inner) == (0, 0)
    read = ctypes.create_string_buffer(whole, len(whole))
    library.fingerprint(read, len(whole), ctypes.byref(key), ctypes.byref(offsets))
    assert whole[offsets.inner :] == INSIDE["tcp4"]


def test_the_tuple_of_a_tunnel_is_its_own(parse):
    _, key, _ = parse(frame(ipv4(17, vxlan(frame(ipv6())))))
    assert (key.family, key.protocol, key.destination_port, key.no_ports) == (4, 17, 4789, 0)
    _, key, _ = parse(frame(ipv4(41, ipv6())))
    assert (key.family, key.protocol, key.no_ports) == (4, 41, 1)


def test_fingerprint_of_what_only_looks_like_a_tunnel(fingerprints):
    packets = numbered(INSIDE["tcp4"])
    for port in (4790, 53):
        assert len(set(fingerprints([ipv4(17, vxlan(frame(each), port)) for each in packets]))) == 1
    # neither IPv4 nor IPv6 inside
    arp = ETHERNET + b"\x08\x06" + bytes(28)
    assert fingerprints([ipv4(17, vxlan(arp))]) == fingerprints([ipv4(17, vxlan(arp, 9))])


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("tunnel", TUNNELS)
def test_a_tunnel_cut_at_any_length_is_read_no_further(parse, fingerprints, tunnel, inside):
    packet = TUNNELS[tunnel](INSIDE[inside])
    for length in range(len(packet)):
        if parse(frame(packet)[:length])[0] == 0:
            fingerprints([packet], length)
