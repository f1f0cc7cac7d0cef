# SPDX-License-Identifier: Apache-2.0
"""A datapath attached as an agent leaves it, and what there is to say of it."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from hostint_agent import attach, clsact, command_line, interfaces, loader, settings
from hostint_agent.doctor import examination
from tests.agent.doctor.findings import Findings
from tests.lab.namespace import Namespace


@contextlib.contextmanager
def attached(near: Namespace, pins: Path, mode: attach.Mode = "tcx") -> Iterator[None]:
    """Everything attached as an agent leaves it."""

    def attacher() -> attach.Attacher:
        return attach.Attacher(
            pins,
            loader.current(pins),
            patterns=interfaces.Patterns(),
            mode=mode,
            cgroup=Path(settings.DEFAULT_CGROUP_ROOT),
            on_change=print,
        )

    made = near.inside(attacher)
    near.inside(made.start)
    made.stop()
    try:
        yield
    finally:
        shutil.rmtree(pins / "links")
        near.inside(clsact.remove_all)


def look(near: Namespace, pins: Path, *options: str) -> Findings:
    """What there is to say of the datapath and where it is attached, by a thread in the namespace."""
    command = ["doctor", "--pin-dir", str(pins), *options]
    chosen = settings.from_options(command_line.parser({}).parse_args(command))
    return {each.check: each for each in near.inside(lambda: list(examination._datapath(chosen)))}
