# SPDX-License-Identifier: Apache-2.0
"""Directories for pins in the machine's bpffs."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_NUMBERS = itertools.count(1)


@contextlib.contextmanager
def pin_directory(purpose: str) -> Iterator[Path]:
    """An empty directory that is gone afterwards, with all that is in it.

    The id of this process is in its name, by which what a session leaves is known (see `leftovers`).
    """
    directory = Path(f"/sys/fs/bpf/hostint-{purpose}-{os.getpid()}-{next(_NUMBERS)}")
    directory.mkdir()
    try:
        yield directory
    finally:
        # what an agent is still taking down may go at the same time
        shutil.rmtree(directory, ignore_errors=True)
