# SPDX-License-Identifier: Apache-2.0
"""Draw cost against the number of rules, of flows, and against the share of watched packets."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.axes
import matplotlib.pyplot as plt

from tests.bench import flows, rules, share
from tests.bench.figure import Figure

_SIZE_INCHES = (8.0, 4.8)
_DPI = 130
# blue and orange differ for everybody; a third line is green
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_MARKERS = ("o", "s", "^", "D")
_GREY = "#666666"
_ROOM_FOR_LEGEND = 0.28
Figures = dict[str, Figure]


def draw(figures: Sequence[Figure], directory: Path) -> list[Path]:
    """Write the plots that these figures are enough for; their paths."""
    known = {figure.key: figure for figure in figures}
    drawn = []
    plots: tuple[tuple[str, str, Callable[[matplotlib.axes.Axes, Figures], None]], ...] = (
        ("bench-rules.png", rules.key("unwatched", "pods", rules.MANY) + "_ns", _rules),
        ("bench-flows.png", f"flows_plain_{flows.MANY}_ns", _flows),
        ("bench-watched-share.png", "share_plain_ns", _share),
    )
    for name, needed, plot in plots:
        if needed in known:
            drawn.append(_draw(directory / name, known, plot))
    return drawn


def _draw(
    path: Path, known: Figures, plot: Callable[[matplotlib.axes.Axes, Figures], None]
) -> Path:
    canvas, axes = plt.subplots(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    try:
        plot(axes, known)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines["top"].set_visible(False)
        canvas.savefig(path)
    finally:
        plt.close(canvas)
    return path


def _line(
    axes: matplotlib.axes.Axes, number: int, label: str, at: Sequence[float], of: Sequence[Figure]
) -> None:
    """One line of medians with the quartiles as bars."""
    values = [figure.value for figure in of]
    below = [f.value - (f.value if f.low is None else f.low) for f in of]
    above = [(f.value if f.high is None else f.high) - f.value for f in of]
    axes.errorbar(
        at,
        values,
        yerr=(below, above),
        label=label,
        color=_COLOURS[number],
        marker=_MARKERS[number],
        linewidth=1.8,
        elinewidth=1,
        capsize=3,
    )


def _categories(axes: matplotlib.axes.Axes, sizes: Sequence[int], label: str) -> None:
    """Evenly spaced: the steps are factors, and one of them is 0."""
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set_xlabel(label)


def _added(axes: matplotlib.axes.Axes, title: str, plain: Sequence[float]) -> None:
    """What all plots have: the title, both scales, the baseline, the legend above the lines."""
    axes.set_title(title, loc="left", fontweight="bold", pad=12)
    axes.set_ylabel("added, ns per packet")
    bottom, top = axes.get_ylim()
    bottom = min(0.0, bottom)
    axes.set_ylim(bottom, top + _ROOM_FOR_LEGEND * (top - bottom))
    axes.axhline(0, color=_GREY, linewidth=1)
    middle = statistics.median(plain)
    percent = axes.secondary_yaxis(
        "right", functions=(lambda ns: 100 * ns / middle, lambda of: of * middle / 100)
    )
    percent.set_ylabel(f"% of plain forwarding ({middle:.0f} ns)")
    span = f"{min(plain):.0f}" if len(plain) == 1 else f"{min(plain):.0f} to {max(plain):.0f}"
    axes.annotate(
        f"0 = plain forwarding: {span} ns per packet",
        (0.99, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(0, 4),
        ha="right",
        color=_GREY,
        fontsize=9,
    )
    axes.legend(
        frameon=False,
        loc="upper left",
        ncols=2,
        fontsize=9,
        title="median, bars from quartile to quartile",
        title_fontsize=9,
        alignment="left",
    )


def _rules(axes: matplotlib.axes.Axes, known: Figures) -> None:
    number = 0
    for kind in ("watched", "unwatched"):
        for name in rules.SETS:
            keys = {size: f"{rules.key(kind, name, size)}_ns" for size in rules.SIZES}
            sizes = [size for size in rules.SIZES if keys[size] in known]
            at = [rules.SIZES.index(size) for size in sizes]
            words = f"{kind}, {rules.SET_WORDS[name]}"
            _line(axes, number, words, at, [known[keys[size]] for size in sizes])
            number += 1
    _categories(axes, rules.SIZES, "rules")
    plain = [known[rules.plain_key(kind, name)].value for _, kind, name, _ in rules.COMPARED]
    _added(axes, "What the datapath adds to a packet, by the number of rules", plain)


def _flows(axes: matplotlib.axes.Axes, known: Figures) -> None:
    at = range(len(flows.COUNTS))
    for number, kind in enumerate(flows.KINDS):
        points = [known[f"flows_{kind}_{count}_ns"] for count in flows.COUNTS]
        _line(axes, number, kind, at, points)
    plain = [known[f"flows_plain_{count}_ns"].value for count in flows.COUNTS]
    _categories(axes, flows.COUNTS, "concurrent flows")
    _added(axes, "What the datapath adds to a packet, by the number of flows", plain)


def _share(axes: matplotlib.axes.Axes, known: Figures) -> None:
    points = [known[share.key(percent)] for percent in share.PERCENT]
    _line(axes, 0, "all packets, on average", share.PERCENT, points)
    axes.set_xticks(share.PERCENT, [f"{percent:g} %" for percent in share.PERCENT])
    axes.set_xlabel("packets that are watched")
    plain = [known["share_plain_ns"].value]
    _added(axes, "What the datapath adds to a packet, by the share of watched packets", plain)
