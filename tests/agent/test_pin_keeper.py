# SPDX-License-Identifier: Apache-2.0
"""What is unpinned below a running agent is pinned again: the same maps, and all of them."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, loader, pin_keeper
from tests.pins import pin_directory

pytestmark = pytest.mark.bpf


@pytest.fixture(scope="module")
def loaded() -> Iterator[Path]:
    with pin_directory("keeper") as directory:
        loader.load(directory)
        yield directory


@pytest.fixture
def build(loaded) -> Path:
    return loader.current(loaded)


@pytest.fixture
def keeper(loaded, build) -> Iterator[pin_keeper.PinKeeper]:
    made = pin_keeper.PinKeeper(loaded, build)
    yield made
    made.restore()
    made.close()


def ids(build: Path) -> dict[str, int]:
    """Kernel ids of all that is pinned in a build."""
    found = {}
    for pin in sorted(build.glob("*/*")):
        if pin.parent.name == "maps":
            found[pin.name] = bpf_calls.Map.open(pin).id
        else:
            with bpf_calls.opened(pin) as descriptor:
                found[pin.name] = bpf_calls.program_id(descriptor)
    return found


def remove_maps(build: Path) -> None:
    shutil.rmtree(build / "maps")


def remove_some(build: Path) -> None:
    for pin in (build / "maps" / "config", build / "programs" / "egress"):
        pin.unlink()


def remove_build(build: Path) -> None:
    shutil.rmtree(build)


def remove_all(build: Path) -> None:
    shutil.rmtree(build.parent)


def rename_build(build: Path) -> None:
    build.rename(build.with_name("elsewhere"))


REMOVALS = [remove_maps, remove_some, remove_build, remove_all, rename_build]


@pytest.mark.parametrize("remove", REMOVALS, ids=lambda f: f.__name__)
def test_what_was_removed_is_pinned_again(loaded, build, keeper, remove):
    before = ids(build)
    assert len(before) > len(loader.PROGRAMS)
    assert keeper.in_place()
    remove(build)
    assert not keeper.in_place()
    keeper.restore()
    assert keeper.in_place()
    assert ids(build) == before
    assert loader.builds(loaded) == [build]


def test_a_build_is_whole_or_not_there(loaded, build, keeper, monkeypatch):
    """Half of one would be taken for one that is damaged."""
    shutil.rmtree(build)
    pin, seen = bpf_calls.obj_pin, []

    def last_fails(descriptor: int, path: Path) -> None:
        seen.append(build.exists())
        if path.parent.name == "programs":
            raise OSError(errno.ENOSPC, "no space here")
        pin(descriptor, path)

    monkeypatch.setattr(bpf_calls, "obj_pin", last_fails)
    with pytest.raises(OSError, match="no space here"):
        keeper.restore()
    assert len(seen) > 1
    assert not any(seen)
    remains = build.with_name(f"{build.name}-partial")
    # a process that is killed here leaves what the next one takes away
    assert loader.remove_remains(loaded) == [remains]
    with pytest.raises(OSError, match="no space here"):
        keeper.restore()
    monkeypatch.undo()
    keeper.restore()
    assert keeper.in_place()
    assert not remains.exists()


def test_the_directory_that_is_made_again_is_locked(loaded, build, keeper):
    shutil.rmtree(loaded)
    keeper.restore()
    descriptor = os.open(loaded, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def test_the_same_pins_in_another_directory_are_not_in_place(loaded, build, keeper):
    """Their directory may be locked by another process."""
    aside = loaded.with_name(f"{loaded.name}-aside")
    loaded.rename(aside)
    shutil.copytree(aside, loaded, copy_function=copy_pin)
    shutil.rmtree(aside)
    assert not keeper.in_place()
    keeper.restore()
    assert keeper.in_place()


def copy_pin(source: str, target: str) -> None:
    with bpf_calls.opened(Path(source)) as descriptor:
        bpf_calls.obj_pin(descriptor, Path(target))


def test_a_directory_that_another_agent_has_is_left_to_it(loaded, build, keeper):
    shutil.rmtree(loaded)
    loaded.mkdir()
    descriptor = os.open(loaded, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(pin_keeper.PinsTaken, match="another hostint-agent works with"):
            keeper.restore()
        assert list(loaded.iterdir()) == []
    finally:
        os.close(descriptor)
    keeper.restore()
    assert keeper.in_place()


def test_what_is_closed_stays_pinned(loaded, build):
    made = pin_keeper.PinKeeper(loaded, build)
    before = ids(build)
    made.close()
    assert ids(build) == before
