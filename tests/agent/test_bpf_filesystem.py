# SPDX-License-Identifier: Apache-2.0
"""Whether a path is in a bpffs, also one that does not exist yet, is relative, or cannot be made."""

from pathlib import Path

import pytest

from hostint_agent import bpf_filesystem
from hostint_agent.bpf_filesystem import MOUNT_POINT


@pytest.mark.bpf
def test_what_does_not_exist_is_where_it_would_be_made(tmp_path, monkeypatch):
    assert bpf_filesystem.existing(MOUNT_POINT / "none" / "deeper") == MOUNT_POINT
    assert bpf_filesystem.holds(MOUNT_POINT)
    assert bpf_filesystem.existing(tmp_path / "none" / "deeper") == tmp_path
    assert not bpf_filesystem.holds(tmp_path)
    monkeypatch.chdir(MOUNT_POINT)
    assert bpf_filesystem.holds(bpf_filesystem.existing(Path("none") / "deeper"))


def test_below_a_file_nothing_would_be_made(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert bpf_filesystem.existing(file / "none" / "deeper") == file
    assert not bpf_filesystem.holds(file)
