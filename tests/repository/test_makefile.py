# SPDX-License-Identifier: Apache-2.0
"""`make setup` does its work when there is work to do."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(directory: Path, *options: str) -> int:
    """The exit status of `make setup`; with -q 1 if there is something to do."""
    command = ["make", "-C", str(directory), *options, "setup"]
    return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.fixture
def set_up(tmp_path):
    """A copy of the repository, as far as make looks, after `make setup`."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "build").mkdir()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    # touches what `make setup` makes
    assert make(tmp_path, "-t") == 0
    assert make(tmp_path, "-q") == 0
    return tmp_path


def test_setup_is_done_again_without_its_environment(set_up):
    shutil.rmtree(set_up / ".venv")
    assert make(set_up, "-q") == 1


def test_setup_is_done_again_without_a_python_that_runs(set_up):
    python = set_up / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/usr/bin/python3.0")
    assert make(set_up, "-q") == 1


def test_setup_needs_nothing_of_the_folder_build(set_up):
    shutil.rmtree(set_up / "build")
    assert make(set_up, "-q") == 0


@pytest.mark.parametrize("name", ["Makefile", "pyproject.toml"])
def test_setup_is_done_again_when_what_it_reads_is_newer(set_up, name):
    later = time.time() + 10
    os.utime(set_up / name, (later, later))
    assert make(set_up, "-q") == 1
