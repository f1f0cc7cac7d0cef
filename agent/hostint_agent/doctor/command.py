# SPDX-License-Identifier: Apache-2.0
"""`hostint-agent doctor`: say what is wrong with this node and what to do about it. What is looked at is in `examination`."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from hostint_agent import settings
from hostint_agent.doctor import examination
from hostint_agent.doctor.finding import Finding

_COLOURS = {"ok": "32", "warning": "33", "failure": "31"}
_WIDTH = max(map(len, _COLOURS))


def as_text(findings: Sequence[Finding], *, colours: bool) -> str:
    """One line each, what to do on a second, and a summary. Pure."""
    column = max((len(each.check) for each in findings), default=0)
    lines = []
    for each in findings:
        result = _coloured(each.result.ljust(_WIDTH), each.result, colours)
        lines.append(f"{result}  {_printable(each.check.ljust(column))}  {_printable(each.found)}")
        if each.remedy:
            lines.append(f"{' ' * (_WIDTH + 2)}do: {_printable(each.remedy)}")
    counts = [(r, sum(each.result == r for each in findings)) for r in _COLOURS]
    told = [f"{n} {r}{'s' if n > 1 and r != 'ok' else ''}" for r, n in counts if n or r == "ok"]
    return "\n".join([*lines, ", ".join(told)])


def _coloured(text: str, result: str, colours: bool) -> str:
    return f"\x1b[{_COLOURS[result]}m{text}\x1b[0m" if colours else text


def _printable(text: str) -> str:
    """The kernel takes any bytes for the name of an interface, a terminal's commands too."""
    return "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in text)


def as_json(findings: Sequence[Finding]) -> str:
    """An array of objects. Pure."""
    return json.dumps([dataclasses.asdict(each) for each in findings], indent=2)


def run(options: argparse.Namespace) -> int:
    """Examine the node and print what was found; 0: nothing failed, 1: something did."""
    findings = list(examination.examine(settings.from_options(options), options.collectors))
    if options.json:
        text = as_json(findings)
    else:
        colours = settings.wants_colours(sys.stdout.isatty(), settings.environment())
        text = as_text(findings, colours=colours)
    print(text)  # noqa: T201
    return 1 if any(each.result == "failure" for each in findings) else 0
