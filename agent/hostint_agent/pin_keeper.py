# SPDX-License-Identifier: Apache-2.0
"""Keep the pins of the datapath in place while the agent runs.

What is unpinned is pinned again from descriptors that the agent holds.
"""

import fcntl
import os
import shutil
from pathlib import Path

import structlog

from hostint_agent import bpf_calls

log = structlog.get_logger()


class PinsTaken(Exception):
    """Another agent works with a pin directory of the same name."""


class PinKeeper:
    """Holds every map and program of a build."""

    def __init__(self, pin_dir: Path, directory: Path) -> None:
        """Open what is pinned in `directory`, which is `PIN/<build>`. Raises OSError."""
        self._pin_dir, self._directory = pin_dir, directory
        self._held = {
            path: bpf_calls.obj_get(path)
            for kind in ("maps", "programs")
            for path in sorted((directory / kind).iterdir())
        }
        self._known = pin_dir.stat()
        self._folders = [str(directory), *(str(directory / kind) for kind in ("maps", "programs"))]
        self._seen: list[tuple[int, int]] = []
        self._lock: int | None = None

    def close(self) -> None:
        """Let go; what is pinned stays."""
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def in_place(self) -> bool:
        """Return True if everything is pinned where it was.

        Asked four times a second: as long as no folder has changed, no pin in it is looked at.
        """
        try:
            seen = [(found.st_ino, found.st_mtime_ns) for found in map(os.stat, self._folders)]
        except FileNotFoundError:
            return False
        if seen != self._seen:
            if not all(map(os.path.exists, self._held)):
                return False
            self._seen = seen
        return self._is_same_directory()

    def restore(self) -> None:
        """Pin again what is missing. Raises PinsTaken, or OSError."""
        if not self._is_same_directory():
            self._lock_again()
        missing = [path for path in self._held if not path.exists()]
        if not missing:
            return
        if self._directory.exists():
            self._pin(missing, self._directory)
        else:
            self._pin_build()
        log.warning(
            "pins were removed below the running agent, pinned again",
            build=self._directory.name,
            pins=len(missing),
        )

    def _is_same_directory(self) -> bool:
        try:
            return os.path.samestat(self._pin_dir.stat(), self._known)
        except FileNotFoundError:
            return False

    def _lock_again(self) -> None:
        """Lock the directory that has the name now: the one that this process locked is gone."""
        self._pin_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._pin_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise PinsTaken(
                f"pin directory {self._pin_dir} was removed, and another hostint-agent works with "
                "the new one; stop one of the two"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        if self._lock is not None:
            os.close(self._lock)
        self._lock = descriptor
        self._known = os.fstat(descriptor)

    def _pin_build(self) -> None:
        """Pin everything under another name first: a build is whole or not there."""
        # The loader removes what has this name.
        partial = self._directory.with_name(f"{self._directory.name}-partial")
        shutil.rmtree(partial, ignore_errors=True)
        self._pin(list(self._held), partial)
        partial.rename(self._directory)

    def _pin(self, paths: list[Path], where: Path) -> None:
        for path in paths:
            pin = where / path.relative_to(self._directory)
            pin.parent.mkdir(parents=True, exist_ok=True)
            bpf_calls.obj_pin(self._held[path], pin)
