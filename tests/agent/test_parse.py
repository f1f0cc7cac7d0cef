# SPDX-License-Identifier: Apache-2.0
"""bpf/parse.h, compiled by gcc with its sanitizer of undefined behaviour, on packets of every shape cut at every length."""

import ctypes
import struct
import subprocess

import pytest

from hostint_agent import bpf_types, loader

WRAPPER = """
#include <sys/cdefs.h>
#include "parse.h"
int parse(const unsigned char *data, unsigned int bytes, struct flow_key *key, struct packet_offsets *offsets)
{
	const struct tunnel_ports tunnels = { .vxlan = { 4789, 8472 }, .geneve = 6081 };

	return parse_frame(data, data + bytes, &tunnels, key, offsets);
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
    _fields_ = (("network", ctypes.c_uint16), ("transport", ctypes.c_uint16))


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
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
    function = ctypes.CDLL(str(library)).parse

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


def prints(parse, packets: list[bytes]) -> list[int]:
    found = []
    for packet in packets:
        result, key, _ = parse(frame(packet))
        assert result == 0
        found.append(key.print)
    return found


def with_number(packet: bytes, at: int, size: int, number: int) -> bytes:
    return packet[:at] + number.to_bytes(size, "big") + packet[at + size :]


def udp(port: int, payload: bytes) -> bytes:
    return struct.pack("!HHHH", 50000, port, 8 + len(payload), 0) + payload


TCP4, UDP4 = ipv4(6, PORTS), ipv4(17, PORTS)
TCP6, UDP6 = ipv6(6, PORTS), ipv6(17, PORTS)
FRAGMENT6 = ipv6(44, extension(17) + PORTS)


@pytest.mark.parametrize(
    ("packet", "at", "size"),
    [
        pytest.param(TCP4, 4, 2, id="IPv4 identification"),
        pytest.param(TCP4, 24, 4, id="TCP sequence number"),
        pytest.param(ipv4(17, udp(9, b"")), 24, 2, id="UDP length"),
        pytest.param(ipv4(17, udp(9, bytes(16))), 28, 8, id="first bytes of a UDP payload"),
        pytest.param(ipv4(17, udp(9, bytes(16))), 36, 8, id="later bytes of a UDP payload"),
        pytest.param(ipv6(17, udp(9, bytes(16))), 48, 8, id="UDP payload, IPv6"),
        pytest.param(ipv4(132, bytes(20)), 36, 4, id="SCTP TSN"),
        pytest.param(ipv4(1, b"\x08" + bytes(7)), 26, 2, id="ICMP echo's sequence number"),
        pytest.param(ipv6(58, b"\x80" + bytes(7)), 46, 2, id="ICMPv6 echo's sequence number"),
        pytest.param(UDP6, 2, 2, id="flow label"),
        pytest.param(TCP6, 44, 4, id="TCP sequence number, IPv6"),
        pytest.param(FRAGMENT6, 44, 4, id="fragment identification"),
    ],
)
def test_the_print_tells_packets_of_a_flow_apart(parse, packet, at, size):
    found = prints(parse, [with_number(packet, at, size, number) for number in range(4096)])
    assert len(set(found)) == 256
    assert max(found.count(value) for value in range(256)) < 3 * 4096 / 256


@pytest.mark.parametrize("repeats", [(2, 8), (4, 4), (8, 2)], ids=str)
def test_a_number_that_is_repeated_in_the_payload_tells_packets_apart(parse, repeats):
    times, size = repeats
    numbers = [number.to_bytes(size, "big") * times for number in range(4096)]
    found = prints(parse, [ipv6(17, udp(9, number)) for number in numbers])
    assert len(set(found)) == 256
    assert max(found.count(value) for value in range(256)) < 4 * 4096 / 256


@pytest.mark.parametrize(
    ("packet", "at", "size"),
    [
        pytest.param(UDP4, 8, 1, id="TTL"),
        pytest.param(UDP4, 10, 2, id="header checksum"),
        pytest.param(UDP4, 12, 4, id="source, translated"),
        pytest.param(UDP4, 16, 4, id="destination, translated"),
        pytest.param(UDP4, 20, 2, id="source port, translated"),
        pytest.param(UDP4, 22, 2, id="destination port, translated"),
        pytest.param(UDP4, 26, 2, id="UDP checksum"),
        pytest.param(UDP4, 1, 1, id="DSCP"),
        pytest.param(TCP4, 28, 4, id="TCP acknowledgement"),
        pytest.param(ipv4(1, b"\x08" + bytes(7)), 24, 2, id="ICMP echo's identifier, translated"),
        pytest.param(ipv4(132, bytes(28)), 28, 4, id="SCTP checksum"),
        pytest.param(ipv4(17, udp(9, b"short")), 33, 11, id="padding behind a UDP payload"),
        pytest.param(UDP6, 7, 1, id="hop limit"),
        pytest.param(UDP6, 8, 4, id="IPv6 source, translated"),
    ],
)
def test_the_print_is_not_made_of_what_a_hop_changes(parse, packet, at, size):
    found = prints(parse, [with_number(packet, at, size, number) for number in range(200)])
    assert len(set(found)) == 1


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
def test_a_packet_in_a_tunnel_has_the_print_that_it_has_outside(parse, tunnel, inside):
    packets = numbered(INSIDE[inside])
    assert len(set(prints(parse, packets))) > 50
    assert prints(parse, [TUNNELS[tunnel](each) for each in packets]) == prints(parse, packets)


def test_the_tuple_of_a_tunnel_is_its_own(parse):
    _, key, _ = parse(frame(ipv4(17, vxlan(frame(ipv6())))))
    assert (key.family, key.protocol, key.destination_port, key.no_ports) == (4, 17, 4789, 0)
    _, key, _ = parse(frame(ipv4(41, ipv6())))
    assert (key.family, key.protocol, key.no_ports) == (4, 41, 1)


def test_what_only_looks_like_a_tunnel_has_a_print_of_its_own(parse):
    packets = numbered(INSIDE["tcp4"])
    for port in (4790, 53):
        assert (
            len(set(prints(parse, [ipv4(17, vxlan(frame(each), port)) for each in packets]))) == 1
        )
    # neither IPv4 nor IPv6 inside
    arp = ETHERNET + b"\x08\x06" + bytes(28)
    assert prints(parse, [ipv4(17, vxlan(arp))]) == prints(parse, [ipv4(17, vxlan(arp, 9))])


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("tunnel", TUNNELS)
def test_a_tunnel_cut_at_any_length_is_read_no_further(parse, tunnel, inside):
    whole = frame(TUNNELS[tunnel](INSIDE[inside]))
    for length in range(len(whole)):
        assert parse(whole[:length])[0] in (0, TRUNCATED)
