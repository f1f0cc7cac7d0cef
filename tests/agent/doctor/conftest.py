# SPDX-License-Identifier: Apache-2.0
"""What the checks of a node are tried on: pins, sources, and a network namespace with an interface."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostint_agent import kernel, loader
from tests.agent.cable import cable
from tests.lab.namespace import Namespace
from tests.pins import pin_directory


@pytest.fixture
def pin_dir() -> Iterator[Path]:
    directory = Path(f"/sys/fs/bpf/hostint-doctor-{os.getpid()}")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of the sources, to be changed."""
    return Path(shutil.copytree(loader.default_bpf_dir(), tmp_path / "bpf"))


@pytest.fixture(scope="module")
def pins() -> Iterator[Path]:
    """A pin directory with a datapath that is loaded, enabled, and attached nowhere."""
    with pin_directory("doctor") as directory:
        build = loader.load(directory)
        kernel.DatapathConfig(build / "maps").set_enabled(True)
        yield directory


@pytest.fixture
def near() -> Iterator[Namespace]:
    with cable() as (end, _):
        yield end
