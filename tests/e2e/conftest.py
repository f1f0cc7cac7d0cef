# SPDX-License-Identifier: Apache-2.0
"""hostint installed on the test cluster, with a collector in this process that every node reaches."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from hostint_collector.embedded import CollectorThread
from tests.e2e import deployment
from tests.testcluster import Cluster


@dataclass
class Installed:
    """The cluster, and where its reports arrive."""

    cluster: Cluster
    collector: CollectorThread

    def reset(self) -> None:
        """No watchlist, the collector `default` is ours, nothing remembered."""
        self.cluster.kubectl("delete", "iwl", "--all", "--wait=true")
        address, port = self.cluster.plane.address, self.collector.port
        deployment.apply(self.cluster, deployment.collector("default", address=address, port=port))
        self.collector.clear()

    def watch(self, name: str, *rules: dict, **spec: object) -> None:
        """Apply a watchlist and wait until it is Ready on all nodes."""
        deployment.apply(self.cluster, deployment.watchlist(name, *rules, **spec))
        self.cluster.kubectl("wait", "--for=condition=Ready", f"iwl/{name}", "--timeout=30s")


@pytest.fixture(scope="session")
def installed(cluster: Cluster) -> Iterator[Installed]:
    deployment.install(cluster)
    deployment.install_app(cluster)
    with CollectorThread(cluster.plane.address) as collector:
        yield Installed(cluster, collector)


@pytest.fixture
def clean(installed: Installed) -> Installed:
    installed.reset()
    return installed
