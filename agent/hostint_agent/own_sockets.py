# SPDX-License-Identifier: Apache-2.0
"""Tell the programs which sockets send reports: what those send is never watched, wherever NAT sends it."""

import struct
from collections.abc import Set
from pathlib import Path

from hostint_agent import bpf_calls

_COOKIE, _PRESENT = struct.Struct("=Q"), struct.pack("=Q", 1)


class OwnSockets:
    """The map own_sockets; its keys are socket cookies (SO_COOKIE)."""

    def __init__(self, maps: Path) -> None:
        """Open the pinned map below `maps`. Raises bpf_calls.BpfError."""
        self._map = bpf_calls.Map.open(maps / "own_sockets")

    def replace(self, cookies: Set[int]) -> None:
        """Make the map hold exactly these cookies, new ones first. Raises bpf_calls.BpfError."""
        wanted = {_COOKIE.pack(cookie) for cookie in cookies}
        present = set(self._map.keys())
        for key in wanted - present:
            self._map.update(key, _PRESENT)
        for key in present - wanted:
            self._map.delete(key)
