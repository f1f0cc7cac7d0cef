# SPDX-License-Identifier: Apache-2.0
"""The API server goes away: what happened meanwhile is caught up with, also deletions, which nobody tells of."""

import pathlib
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.operator import fakes
from tests.operator.cluster import Cluster, replica, until

pytestmark = pytest.mark.cluster


@pytest.fixture
def world(api_server: Any, tmp_path: pathlib.Path) -> Iterator[Cluster]:
    made = Cluster(api_server, tmp_path)
    made.set_up()
    yield made
    made.tear_down()


@pytest.fixture
def proxy(world: Cluster) -> Iterator[fakes.ProxyThread]:
    """Make the operator's way to the API server one that can be cut."""
    config = yaml.safe_load(world.kubeconfig.read_text())
    cluster = config["clusters"][0]["cluster"]
    target = urllib.parse.urlparse(cluster["server"])
    made = fakes.ProxyThread(target.hostname, target.port)
    made.start()
    cluster["server"] = f"https://127.0.0.1:{made.port}"
    world.kubeconfig.write_text(yaml.safe_dump(config))
    yield made
    made.close()


def test_after_an_outage_everything_that_changed_meanwhile_is_caught_up_with(
    world: Cluster, proxy: fakes.ProxyThread
) -> None:
    with replica(world, "cut-off") as operator:
        world.apply(world.collector(), world.watchlist("goes"), world.watchlist("changes"))
        first, second = world.nodes
        world.until_told(second, {"goes": 1, "changes": 1})
        proxy.stop()
        world.kubectl("delete", "iwl", "goes")
        world.kubectl("delete", "inc", first)
        world.apply(world.watchlist("changes", priority=1), world.watchlist("comes"))
        time.sleep(3)  # less than a leader may be without the API server
        assert world.told_watchlists(second) == {"goes": 1, "changes": 1}
        proxy.start()
        expected = {"changes": 2, "comes": 1}
        for node in world.nodes:
            world.until_told(node, expected, seconds=40)
        assert operator.stop() == 0


def test_a_leader_that_stays_without_the_api_server_exits_to_start_over(
    world: Cluster, proxy: fakes.ProxyThread
) -> None:
    with replica(world, "cut-off") as operator:
        until("leadership", operator.leads)
        proxy.stop()
        assert operator.process.wait(25) == 1
