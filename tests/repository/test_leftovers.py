# SPDX-License-Identifier: Apache-2.0
"""The check at the end of a test session finds what a test leaves, and nothing else."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.leftovers import Leftovers


@pytest.fixture
def watched(tmp_path):
    made = Leftovers(tmp_path / "kept")
    yield made
    made._patch.undo()


def test_session_that_cleans_up_has_left_nothing(watched, tmp_path):
    own = watched._directory
    with tempfile.TemporaryDirectory() as directory:
        assert Path(directory).parent == own
    (tmp_path / "kept").mkdir()
    tempfile.mkdtemp(dir=tmp_path / "kept")
    assert watched.end() == []
    assert not own.exists()
    assert tempfile.gettempdir() != str(own)


def test_directory_that_was_made_elsewhere_is_found(watched, tmp_path):
    made = tempfile.mkdtemp(dir=tmp_path)
    assert watched.end() == [made]


@pytest.mark.parametrize(
    "leave",
    [
        lambda: tempfile.mkdtemp(prefix="hostint-lab-"),
        lambda: os.close(tempfile.mkstemp()[0]),
        lambda: subprocess.run([sys.executable, "-c", "import tempfile; tempfile.mkdtemp()"]),
    ],
    ids=["directory", "file", "of-a-child"],
)
def test_what_is_left_is_found(watched, leave):
    leave()
    (found,) = watched.end()
    assert Path(found).parent == watched._directory


@pytest.mark.lab
def test_pins_and_namespaces_of_this_process_are_found(watched):
    name = f"hx{os.getpid()}-left"
    pinned = Path(f"/sys/fs/bpf/hostint-left-{os.getpid()}")
    subprocess.run(["ip", "netns", "add", name], check=True)
    pinned.mkdir()
    try:
        assert watched.end() == [str(pinned), f"network namespace {name}"]
    finally:
        pinned.rmdir()
        subprocess.run(["ip", "netns", "del", name], check=True)
