# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: what is quick and needs nothing runs first, the cluster last."""

import pytest

_ORDER = ("bpf", "lab", "cluster")


def _rank(item: pytest.Item) -> tuple[int, int]:
    marks = [i for i, name in enumerate(_ORDER, start=1) if item.get_closest_marker(name)]
    # of the cluster's tests, those that need the control plane alone come before those that need nodes
    needs_nodes = "cluster" in getattr(item, "fixturenames", ())
    return max(marks, default=0), int(needs_nodes)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by what a test needs; the order within is kept."""
    items.sort(key=_rank)
