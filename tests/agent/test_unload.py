# SPDX-License-Identifier: Apache-2.0
"""Unloading removes what is ours and leaves what is somebody else's."""

from pathlib import Path

import pytest

from hostint_agent import loader, unload
from tests.agent.rings import Rings
from tests.pins import pin_directory

pytestmark = pytest.mark.bpf


@pytest.fixture
def pin_dir():
    with pin_directory("unload") as directory:
        yield directory


def test_nothing_loaded_is_nothing_removed(pin_dir):
    assert unload.unload(pin_dir / "none") == []


def test_all_pins_of_ours_go_and_so_does_the_directory(pin_dir):
    maps = pin_dir / "0123456789abcdef" / "maps"
    maps.mkdir(parents=True)
    Rings(maps, 1)
    removed = unload.unload(pin_dir)
    assert "map report_records" in removed
    assert not pin_dir.exists()
    assert unload.unload(pin_dir) == []


def test_pins_of_others_in_the_same_directory_stay(pin_dir):
    theirs = [pin_dir / "cilium" / "maps", pin_dir / "links"]
    for directory in theirs:
        directory.mkdir(parents=True)
        Rings(directory, 1)
    assert unload.unload(pin_dir) == []
    assert loader.builds(pin_dir) == []
    assert all((directory / "report_records").exists() for directory in theirs)


def pinned(build: Path) -> Path:
    (build / "maps").mkdir(parents=True)
    (build / "programs").mkdir()
    Rings(build / "maps", 1)
    return build


def test_what_a_killed_loader_or_unloader_left_goes_too(pin_dir):
    pinned(pin_dir / "0123456789abcdef-partial")
    assert unload.unload(pin_dir) == ["remains 0123456789abcdef-partial"]
    assert not pin_dir.exists()


def test_a_build_whose_removal_was_begun_once_can_be_removed_again(pin_dir):
    pinned(pin_dir / "0123456789abcdef-partial")
    pinned(pin_dir / "0123456789abcdef")
    unload.unload(pin_dir)
    assert not pin_dir.exists()


def test_a_build_disappears_at_once_and_never_by_halves(pin_dir, monkeypatch):
    build = pinned(pin_dir / "0123456789abcdef")
    monkeypatch.setattr(loader.shutil, "rmtree", lambda *_, **__: None)
    loader.remove(build)
    assert loader.builds(pin_dir) == []


def test_what_is_not_a_build_of_ours_is_no_remains_of_ours(pin_dir):
    theirs = pin_dir / "calico-partial"
    theirs.mkdir()
    assert unload.unload(pin_dir) == []
    assert theirs.exists()
