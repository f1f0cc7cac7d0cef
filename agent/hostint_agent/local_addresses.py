# SPDX-License-Identifier: Apache-2.0
"""The host's own addresses in the datapath's maps: by them the programs know what is delivered to the host itself."""

import ipaddress
import struct
from collections.abc import Iterable
from pathlib import Path

from hostint_agent import bpf_calls, bpf_types


def filter_bit(key: bytes) -> int:
    """The hash of bpf/local.h; `key` is one of the map local_addresses."""
    first, second, third, fourth = (int(word) for word in struct.unpack("=IIII", key))
    mixed = (first ^ second ^ third ^ fourth) * 0x9E3779B1 & 0xFFFFFFFF
    return (mixed >> 16) % (64 * bpf_types.NR_LOCAL_FILTER_WORDS)


def _key(text: str) -> bytes:
    """16 bytes; an IPv4 address as the IPv4-mapped one (RFC 4291, 2.5.5.2)."""
    address = ipaddress.ip_address(text)
    return bytes(10) + b"\xff\xff" + address.packed if address.version == 4 else address.packed


class LocalAddresses:
    """The hash of the addresses, and the filter of bits before it."""

    def __init__(self, maps: Path) -> None:
        """Open the pinned maps below `maps`. Raises bpf_calls.BpfError."""
        self._map = bpf_calls.Map.open(maps / "local_addresses")
        self._filter = bpf_calls.Map.open(maps / "local_filter")

    def replace(self, addresses: Iterable[str]) -> None:
        """Make the maps hold exactly these addresses."""
        wanted = {_key(text) for text in addresses}
        present = set(self._map.keys())
        for key in wanted - present:
            self._map.update(key, struct.pack("=Q", 1))
        for key in present - wanted:
            self._map.delete(key)
        # always: a process that ended between the two left a filter that lacks addresses
        self._write_filter(wanted)

    def _write_filter(self, keys: Iterable[bytes]) -> None:
        words = [0] * bpf_types.NR_LOCAL_FILTER_WORDS
        for bit in map(filter_bit, keys):
            words[bit // 64] |= 1 << bit % 64
        present = struct.unpack(f"={len(words)}Q", self._filter.values())
        for index, (word, before) in enumerate(zip(words, present, strict=True)):
            if word != before:
                self._filter.update(struct.pack("=I", index), struct.pack("=Q", word))
