# SPDX-License-Identifier: Apache-2.0
"""Draw cost against the number of rules, of flows, and against the share of watched packets."""

from collections.abc import Sequence
from pathlib import Path

from tests.bench.figure import Figure


def draw(figures: Sequence[Figure], directory: Path) -> list[Path]:
    """Write the plots that these figures are enough for."""
    return []
