# SPDX-License-Identifier: Apache-2.0
"""What was found: a table for people, bench.json for programs, with the facts about the machine that figures depend on."""

import dataclasses
import datetime
import itertools
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.box
import rich.console
import rich.table
import rich.text

from tests.bench.figure import Figure

VERSION = 1
_COLUMNS = ("what", "value", "kept", "unit", "goal", "reached", "baseline")
_TO_THE_RIGHT = ("value", "kept", "goal")
_WIDTH_OF_A_FILE = 160


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine before the first run; `facts` afterwards."""

    load_1m: float
    jiffies: tuple[int, ...]

    @classmethod
    def before(cls) -> "Machine":
        """How things stand now."""
        return cls(os.getloadavg()[0], _jiffies())

    def facts(self) -> dict[str, object]:
        """What figures depend on, and how disturbed the machine was since."""
        passed = [now - then for now, then in zip(_jiffies(), self.jiffies, strict=True)]
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "cpu": _cpu_model(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "load1mBefore": round(self.load_1m, 2),
            "stolenPercent": round(100 * passed[7] / max(1, sum(passed)), 2),
        }


def _jiffies() -> tuple[int, ...]:
    """user nice system idle iowait irq softirq steal, of all CPUs (proc(5), /proc/stat)."""
    first = Path("/proc/stat").read_text().splitlines()[0].split()
    return tuple(int(word) for word in first[1:9])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def document(
    figures: Sequence[Figure], failed: dict[str, str], machine: Machine, quick: bool
) -> dict[str, object]:
    """bench.json. Keys do not change within a version."""
    return {
        "version": VERSION,
        "quick": quick,
        "machine": machine.facts(),
        "failed": failed,
        "figures": {figure.key: _entry(figure) for figure in figures},
    }


def _entry(figure: Figure) -> dict[str, object]:
    entry = dataclasses.asdict(figure) | {"reached": figure.reached}
    del entry["key"], entry["shown"]
    return entry


def write(
    path: Path, figures: Sequence[Figure], failed: dict[str, str], machine: Machine, quick: bool
) -> None:
    """Write bench.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(figures, failed, machine, quick), indent=2) + "\n")


def number(value: float) -> str:
    """As many digits as say something."""
    if value == int(value):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return (
        f"{value:.1f}"
        if abs(value) >= 100
        else f"{value:.2f}"
        if abs(value) >= 10
        else f"{value:.3g}"
    )


# of a figure: the value that was kept of it with the change since, and whether it is worse now
Comparison = Callable[[Figure], tuple[str, bool]]


def show(
    figures: Sequence[Figure],
    console: rich.console.Console | None = None,
    compared: Comparison = lambda _: ("", False),
) -> None:
    """Print the table."""
    console = console or rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=_WIDTH_OF_A_FILE, file=console.file)
    table = rich.table.Table(
        box=rich.box.SIMPLE, show_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _TO_THE_RIGHT else "left")
    for _, group in itertools.groupby((f for f in figures if f.shown), _section):
        for figure in group:
            table.add_row(*_row(figure, compared))
        table.add_section()
    console.print()
    console.print(table)
    console.print()


def _section(figure: Figure) -> str:
    return figure.key.split("_")[0]


def _row(figure: Figure, compared: Comparison) -> tuple[str | rich.text.Text, ...]:
    goal = f"{figure.compare} {number(figure.goal)}" if figure.goal is not None else ""
    reached: str | rich.text.Text = ""
    if figure.reached is not None:
        word, style = ("yes", "green") if figure.reached else ("no", "bold red")
        reached = rich.text.Text(word, style=style)
    kept, worse = compared(figure)
    before = rich.text.Text(kept, style="bold yellow" if worse else "dim")
    value = number(figure.value)
    return figure.what, value, before, figure.unit, goal, reached, figure.baseline
