# SPDX-License-Identifier: Apache-2.0
"""Pure: text for a terminal of 100 columns: labelled lines, tables, colours."""

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100
LABEL = 12
_LEAST_NAME = 8
_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}

# colour, and words in it
Cell = tuple[str, str]


class Page:
    """Lines in the order in which they are added; painted only if `colours`."""

    def __init__(self, colours: bool) -> None:
        self.lines: list[str] = []
        self._colours = colours

    def paint(self, colour: str, words: str) -> str:
        """Words in a colour; "" is none. The kernel takes any bytes for a name: what a terminal might obey is not printed."""
        words = "".join(letter if letter.isprintable() else "?" for letter in words)
        painted = self._colours and colour and words
        return f"\x1b[{_CODES[colour]}m{words}\x1b[0m" if painted else words

    def gap(self) -> None:
        """An empty line between groups."""
        self.lines.append("")

    def field(self, label: str, words: str, colour: str = "") -> None:
        """A label, and words that are wrapped beside it."""
        self.beside([("bold", label.ljust(LABEL))], words, colour)

    def beside(self, cells: Sequence[Cell], words: str, colour: str = "") -> None:
        """Cells, and words that are wrapped beside them."""
        begin = "".join(self.paint(*cell) for cell in cells)
        indent = sum(len(text) for _, text in cells)
        for line in textwrap.wrap(words, WIDTH - indent, break_on_hyphens=False) or [""]:
            self.lines.append((begin + self.paint(colour, line)).rstrip())
            begin = " " * indent

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str | Cell]], left: int) -> None:
        """Columns, so many of them to the left, the others to the right; the first is cut where there is no room."""
        cells = [[("", c) if isinstance(c, str) else c for c in row] for row in rows]
        lines = [[("bold", name) for name in header], *cells]
        widths = [max(len(words) for _, words in column) for column in zip(*lines, strict=True)]
        room = WIDTH - sum(widths[1:]) - 2 * len(widths[1:])
        widths[0] = max(_LEAST_NAME, min(widths[0], room))
        for line in lines:
            shown = []
            for column, ((colour, words), width) in enumerate(zip(line, widths, strict=True)):
                fitted = cut(words, width)
                fitted = fitted.ljust(width) if column < left else fitted.rjust(width)
                shown.append(self.paint(colour, fitted))
            self.lines.append("  ".join(shown).rstrip())


def cut(words: str, width: int) -> str:
    """Words of at most so many columns."""
    return words if len(words) <= width else words[: width - 2] + ".."
