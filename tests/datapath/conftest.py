# SPDX-License-Identifier: Apache-2.0
"""A network namespace and the programs in it, for tests of single packets."""

import os
from collections.abc import Iterator

import pytest

from tests.datapath.programs import INTERFACE, Programs
from tests.lab import datapath as datapaths
from tests.lab.namespace import Namespace, ip


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    name = f"hl{os.getpid()}-programs"
    ip(f"netns add {name}", f"-n {name} link add {INTERFACE} type veth peer name one1")
    yield Namespace(name)
    ip(f"netns del {name}")


@pytest.fixture
def programs(namespace) -> Iterator[Programs]:
    with datapaths.loaded(namespace) as datapath:
        datapath.enable()
        made = Programs(namespace, datapath)
        yield made
        made.close()
