# SPDX-License-Identifier: Apache-2.0
"""The last table that was worth keeping: in docs/performance.json for the next run to compare with, and in docs/performance.md to read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench import results
from tests.bench.figure import Figure

DOCS = Path(__file__).parents[2] / "docs"
JSON, PAGE = "performance.json", "performance.md"
_BEGIN, _END = "<!-- table: make bench KEEP=1 -->", "<!-- end of table -->"
_HEADER = "| what | value | unit | goal | reached | beside it, in the same run |"
# figures move by so much from run to run
_NOISE = 0.10


class NotKept(Exception):
    """The table could not be kept; says why."""


def load(docs: Path = DOCS) -> dict[str, float]:
    """Values that were kept, by key; none if nothing was."""
    try:
        return dict(json.loads((docs / JSON).read_text())["figures"])
    except FileNotFoundError:
        return {}


def save(figures: Sequence[Figure], machine: Mapping[str, object], docs: Path = DOCS) -> None:
    """Keep these figures. Raises NotKept where the page has no place for them."""
    page = (docs / PAGE).read_text()
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise NotKept(f"docs/{PAGE} has no '{_BEGIN}' with '{_END}' behind it")
    values = {figure.key: float(f"{figure.value:.4g}") for figure in figures}
    text = json.dumps({"machine": machine, "figures": values}, indent=2)
    (docs / JSON).write_text(text + "\n")
    words = ", ".join(f"{name} {machine[name]}" for name in ("date", "kernel", "cpu", "cpus"))
    rows = [_row(figure) for figure in figures if figure.shown]
    table = "\n".join([_HEADER, "|" + "---|" * (_HEADER.count("|") - 1), *rows])
    (docs / PAGE).write_text(f"{before}{_BEGIN}\n{words}\n\n{table}\n\n{_END}{after}")


def _row(figure: Figure) -> str:
    goal = f"{figure.compare} {results.number(figure.goal)}" if figure.goal is not None else ""
    reached = {True: "yes", False: "**no**", None: ""}[figure.reached]
    cells = [figure.what, results.number(figure.value), figure.unit, goal, reached, figure.baseline]
    return f"| {' | '.join(cells)} |"


def change(figure: Figure, before: Mapping[str, float]) -> tuple[str, bool]:
    """(the value that was kept and by how much this one differs, whether that is worse by more than noise)."""
    old = before.get(figure.key)
    if old is None:
        return "", False
    if not old:
        return results.number(old), figure.value > old and figure.compare != ">="
    moved = figure.value / old - 1
    worse = -moved if figure.compare == ">=" else moved
    return f"{results.number(old)} ({moved:+.0%})", worse > _NOISE
