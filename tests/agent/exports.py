# SPDX-License-Identifier: Apache-2.0
"""Exporters for tests, whose accounts are checked after every test: reports written = sent + failed + waiting."""

import struct
from collections.abc import Iterator, Mapping

import pytest

from hostint_agent import exporter
from hostint_agent.node_rules import Destination
from tests.agent.rings import Rings

_MADE: list[tuple[Rings, exporter.Exporter]] = []


class Clock:
    """A clock that goes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def exported(
    datapath: Rings, destinations: Mapping[int, Destination], **options: object
) -> exporter.Exporter:
    """An exporter of these rings that knows these destinations; not started."""
    made = exporter.Exporter(datapath.maps, **{"renumber": False, **options})
    made.set_destinations(destinations)
    _MADE.append((datapath, made))
    return made


@pytest.fixture(autouse=True)
def accounts() -> Iterator[None]:
    """Exact after every test of a module that imports this, whatever went wrong in it."""
    _MADE.clear()
    yield
    for datapath, exports in _MADE:
        told = sum(sent + failed for sent, failed in exports.counters().values())
        assert datapath.written == told + sum(exports.fill())


def sequence(report: bytes) -> int:
    """The sequence number of a report."""
    return struct.unpack("!I", report[4:8])[0]
