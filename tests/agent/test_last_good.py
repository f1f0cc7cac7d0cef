# SPDX-License-Identifier: Apache-2.0
"""What was live is found again, and a damaged file is told and not believed."""

import pytest
import structlog

from hostint_agent import last_good
from hostint_agent.node_rules import Indexes
from hostint_api import NodeConfigSpec
from tests.agent.test_node_rules import COLLECTOR, RULE, WATCHLIST

SPEC = NodeConfigSpec.model_validate(
    {"nodeID": 5, "collectors": [COLLECTOR], "watchlists": [WATCHLIST], "rules": [RULE]}
)
GOOD = last_good.LastGood(SPEC, 7, Indexes({"shop": 3}, (1, 2)), Indexes({"default": 0}))


def test_what_was_saved_is_loaded(tmp_path):
    last_good.save(tmp_path / "new" / "directory", "node-1", GOOD)
    assert last_good.load(tmp_path / "new" / "directory", "node-1") == GOOD


def test_the_absence_of_a_configuration_is_remembered_too(tmp_path):
    nothing = last_good.LastGood(None, 0, Indexes(), Indexes())
    last_good.save(tmp_path, "node-1", nothing)
    assert last_good.load(tmp_path, "node-1") == nothing


def test_nothing_saved_is_nothing_told(tmp_path):
    with structlog.testing.capture_logs() as logs:
        assert last_good.load(tmp_path, "node-1") is None
    assert logs == []


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"spec": {"nodeID": "x"}}', "null"])
def test_a_damaged_file_is_told_and_not_used(tmp_path, text):
    (tmp_path / "last-good-node-1.json").write_text(text)
    with structlog.testing.capture_logs() as logs:
        assert last_good.load(tmp_path, "node-1") is None
    assert [entry["event"] for entry in logs] == ["last good configuration not usable"]


def test_a_disk_that_refuses_does_not_stop_the_agent(tmp_path):
    (tmp_path / "file").write_text("")
    with structlog.testing.capture_logs() as logs:
        last_good.save(tmp_path / "file", "node-1", GOOD)
    assert [entry["event"] for entry in logs] == ["last good configuration not kept"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    last_good.save(tmp_path, "node-1", GOOD)
    (tmp_path / "last-good-node-1.new").mkdir()
    last_good.save(tmp_path, "node-1", last_good.LastGood(None, 0, Indexes(), Indexes()))
    assert last_good.load(tmp_path, "node-1") == GOOD


def test_a_directory_that_nodes_share_does_not_mix_them(tmp_path):
    last_good.save(tmp_path, "node-1", GOOD)
    assert last_good.load(tmp_path, "node-2") is None
