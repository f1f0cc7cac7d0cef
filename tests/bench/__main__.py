# SPDX-License-Identifier: Apache-2.0
"""`make bench`: run the benches one after the other, show one table, write bench.json and plots."""

import argparse
import importlib
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hostint_agent.__main__ import ensure_bpffs
from tests.bench import kept, node, plots, results
from tests.bench.figure import Figure

# in the order of the table
_ORDER = (
    "forwarding",
    "delivery",
    "rules",
    "flows",
    "share",
    "reports",
    "export",
    "change",
    "attach",
    "agent",
)
BENCHES = tuple(name for name in _ORDER if importlib.util.find_spec(f"tests.bench.{name}"))
_ROOT = Path(__file__).parents[2]
_DEFAULT_TAKES_S = (8, 60)


@dataclass
class Outcome:
    """What the benches found, and what of them could not run."""

    figures: list[Figure] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class _Progress:
    """One line a step, with the time since the start."""

    def __init__(self, total: int, expected_s: int) -> None:
        self._total = total
        self._started = time.monotonic()
        self._expected_s = expected_s
        self._number = 0
        self._name = ""

    def begin(self, name: str) -> None:
        self._number += 1
        self._name = name
        words = importlib.import_module(f"tests.bench.{name}").__doc__ or ""
        self.say(words.strip().splitlines()[0])

    def say(self, text: str) -> None:
        passed = time.monotonic() - self._started
        where = f"{self._number}/{self._total} {self._name}"
        print(f"[{passed:3.0f}/{self._expected_s} s] {where}: {text}", flush=True)


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure what hostint costs on this machine. Needs root; an idle machine gives the best figures.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds: at most a minute")
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        help=f"some of the benches: {', '.join(BENCHES)}",
        type=_names,
        default=BENCHES,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=_ROOT / "build" / "bench.json",
        metavar="FILE",
        help="where the figures go, plots beside it (default: build/bench.json)",
    )
    parser.add_argument(
        "--bpf-dir", type=Path, metavar="DIR", help="other sources of the datapath (default: bpf)"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="write the table to docs/, to be compared with from now on; not with --quick or --only",
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 when a goal is not reached"
    )
    options = parser.parse_args(arguments)
    if options.keep and (options.quick or options.only != BENCHES):
        parser.error("--keep needs all of it: not with --quick or --only")
    return options


def _names(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in BENCHES]
    if unknown or not names:
        wrong = f"no bench '{unknown[0]}'" if unknown else "no bench named"
        raise argparse.ArgumentTypeError(f"{wrong}; there are {', '.join(BENCHES)}")
    return tuple(name for name in BENCHES if name in names)


def expected_seconds(names: Sequence[str], quick: bool) -> int:
    """How long these benches say that they take."""
    modules = [importlib.import_module(f"tests.bench.{name}") for name in names]
    return sum(getattr(module, "TAKES_S", _DEFAULT_TAKES_S)[not quick] for module in modules)


def run_benches(names: Sequence[str], quick: bool) -> Outcome:
    """Run them; one that fails is told and the others go on."""
    outcome = Outcome()
    progress = _Progress(len(names), expected_seconds(names, quick))
    for name in names:
        progress.begin(name)
        try:
            outcome.figures += importlib.import_module(f"tests.bench.{name}").run(
                quick, progress.say
            )
        except Exception as error:
            traceback.print_exc()
            outcome.failed[name] = f"{type(error).__name__}: {error}"
    return outcome


def main(arguments: Sequence[str]) -> int:
    """Entry point. 0: everything ran (with --check: and every goal is reached)."""
    options = _arguments(arguments)
    if os.geteuid() != 0:
        print(
            "make bench: needs root: it makes network namespaces and loads programs",
            file=sys.stderr,
        )
        return 1
    if options.bpf_dir:
        os.environ["HOSTINT_BPF_DIR"] = str(options.bpf_dir.resolve())
    try:
        seconds = expected_seconds(options.only, options.quick)
        print(
            f"Measuring {', '.join(options.only)}: about {seconds} s. Nothing else should run meanwhile.",
            flush=True,
        )
        ensure_bpffs(Path("/sys/fs/bpf"))
        machine = results.Machine.before()
        with node.kept():
            outcome = run_benches(options.only, options.quick)
        results.write(options.output, outcome.figures, outcome.failed, machine, options.quick)
        drawn = plots.draw(outcome.figures, options.output.parent)
    except KeyboardInterrupt:
        print("\nstopped; namespaces and programs are gone")
        return 130
    before = kept.load()
    results.show(outcome.figures, compared=lambda figure: kept.change(figure, before))
    if options.keep and not outcome.failed:
        kept.save(outcome.figures, machine.facts())
    for path in (options.output, *drawn):
        print(path)
    return _status(outcome, options.check)


def _status(outcome: Outcome, check: bool) -> int:
    for name, error in outcome.failed.items():
        print(f"{name} could not run: {error}", file=sys.stderr)
    before = kept.load()
    worse = [f.key for f in outcome.figures if f.shown and kept.change(f, before)[1]]
    if worse:
        print(f"Worse by more than 10 % than what was kept: {', '.join(worse)}")
    missed = [figure.key for figure in outcome.figures if figure.reached is False]
    if missed:
        print(f"Goals not reached: {', '.join(missed)}", file=sys.stderr if check else sys.stdout)
    return 1 if outcome.failed or (check and missed) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
