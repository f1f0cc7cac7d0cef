# SPDX-License-Identifier: Apache-2.0
"""What a test session leaves on the machine: temporary files, pins, network namespaces.

Other sessions may run at the same time, so only what this one made counts: its own temporary folder,
directories that `tempfile` made elsewhere, and names with this process's id in them.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_BPFFS = Path("/sys/fs/bpf")


class Leftovers:
    """Watches a session from its construction to `end`."""

    def __init__(self, kept: Path) -> None:
        """Give this process and its children a temporary folder of their own.

        `kept` is pytest's own folder, whose contents outlive a session on purpose.
        """
        self._kept = kept
        self._patch = pytest.MonkeyPatch()
        self._made: list[Path] = []
        self._directory = Path(tempfile.mkdtemp(prefix="hostint-tests-"))
        self._patch.setattr(tempfile, "tempdir", str(self._directory))
        self._patch.setenv("TMPDIR", str(self._directory))
        make = tempfile.mkdtemp

        def recorded(*arguments: str | None, **more: str | None) -> str:
            made = make(*arguments, **more)
            self._made.append(Path(made))
            return made

        self._patch.setattr(tempfile, "mkdtemp", recorded)

    def end(self) -> list[str]:
        """Return what is left, and remove the temporary folder."""
        self._patch.undo()
        left = {*self._directory.iterdir(), *(path for path in self._made if path.exists())}
        found = [str(path) for path in left if self._kept not in path.parents]
        # the bpffs may be root's alone, and then nothing of ours is in it
        if os.access(_BPFFS, os.R_OK):
            found += [str(path) for path in _BPFFS.iterdir() if _is_ours(path.name)]
        listed = subprocess.run(
            ["ip", "netns", "list"], capture_output=True, text=True, check=False
        )
        names = [line.split()[0] for line in listed.stdout.splitlines() if line.strip()]
        found += [f"network namespace {name}" for name in names if _is_ours(name)]
        shutil.rmtree(self._directory)
        return sorted(found)


def _is_ours(name: str) -> bool:
    """Whether the id of this process is in a name, as a number of its own."""
    return re.search(rf"(?<!\d){os.getpid()}(?!\d)", name) is not None
