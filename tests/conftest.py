# SPDX-License-Identifier: Apache-2.0
"""Fixtures of every test run, and those that need a real Kubernetes, made once."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostint_agent.__main__ import ensure_bpffs
from tests.leftovers import Leftovers
from tests.testcluster import Cluster, ControlPlane, images


@pytest.fixture(scope="session", autouse=True)
def leftovers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A session leaves nothing on the machine."""
    watched = Leftovers(tmp_path_factory.getbasetemp())
    yield
    assert watched.end() == []


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """What we start can be interrupted, though a shell may have started us in the background, where SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def bpffs() -> None:
    """A bpffs where the agent would have one: a fresh machine has none mounted."""
    if os.geteuid() == 0:
        ensure_bpffs(Path("/sys/fs/bpf"))


@pytest.fixture(scope="session")
def api_server() -> Iterator[ControlPlane]:
    """The control plane alone: etcd, API server, controller manager."""
    with (
        tempfile.TemporaryDirectory(prefix="hostint-plane-") as directory,
        ControlPlane(Path(directory)) as plane,
    ):
        yield plane


@pytest.fixture(scope="session")
def cluster(pytestconfig: pytest.Config) -> Iterator[Cluster]:
    """Two nodes with our images loaded; nothing is deployed."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", flush=True)

    os.environ.setdefault("NO_COLOR", "1")
    with Cluster(wanted_images=images.build_all(say), say=say) as running:
        yield running
