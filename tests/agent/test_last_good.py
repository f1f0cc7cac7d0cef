# SPDX-License-Identifier: Apache-2.0
"""What was live is found again, and what is damaged is logged and left out."""

import json
import os
import subprocess
from pathlib import Path

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
NOTHING = last_good.LastGood(None, 0, Indexes(), Indexes())
NAME = "last-good-node-1.json"
NOT_USABLE = "last good configuration not usable"
INDEXES_NOT_USABLE = "indexes of the last good configuration not usable, assigning new ones"
NOT_KEPT = "last good configuration not kept"


def save(directory: Path, good: last_good.LastGood = GOOD, node: str = "node-1") -> None:
    last_good.Keeper(directory, node).save(good)


def loaded(directory: Path) -> tuple[last_good.LastGood | None, list[tuple[str, str]]]:
    """What is loaded, and what is logged of it."""
    with structlog.testing.capture_logs() as logs:
        good = last_good.load(directory, "node-1")
    return good, [(entry["event"], entry["error"]) for entry in logs]


def test_what_was_saved_is_loaded(tmp_path):
    save(tmp_path / "new" / "directory")
    assert loaded(tmp_path / "new" / "directory") == (GOOD, [])


def test_the_absence_of_a_configuration_is_remembered_too(tmp_path):
    save(tmp_path, NOTHING)
    assert loaded(tmp_path) == (NOTHING, [])


def test_nothing_saved_is_nothing_told(tmp_path):
    assert loaded(tmp_path) == (None, [])


def saved(directory: Path) -> dict:
    """The object in a good file."""
    save(directory)
    return json.loads((directory / NAME).read_text())


WHOLE = [
    b"",
    b"{",
    b"[]",
    b"{}",
    b"null",
    b"7",
    b'"text"',
    b"\xff\xfe",
    b"[" * 100_000,
    b"\0" * 4096,
]


@pytest.mark.parametrize("content", WHOLE, ids=range(len(WHOLE)))
def test_damaged_file_is_logged_and_not_used(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    good, logs = loaded(tmp_path)
    assert good is None
    assert [event for event, _ in logs] == [NOT_USABLE]
    assert logs[0][1]


def test_truncated_file_is_never_believed(tmp_path):
    save(tmp_path)
    content = (tmp_path / NAME).read_bytes()
    for size in range(0, len(content), 7):
        (tmp_path / NAME).write_bytes(content[:size])
        good, logs = loaded(tmp_path)
        assert (good, [event for event, _ in logs]) == (None, [NOT_USABLE])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spec": 0}, "spec"),
        ({"spec": ""}, "spec"),
        ({"spec": []}, "spec"),
        ({"spec": {}}, "spec.nodeID"),
        ({"spec": {"nodeID": "x"}}, "spec.nodeID"),
        ({"spec": {"nodeID": 1, "ofANewerVersion": 1}}, "spec.ofANewerVersion"),
        ({"generation": "7"}, "generation: '7' is not an integer of 0.."),
        ({"generation": None}, "generation"),
        ({"generation": 7.5}, "generation"),
        ({"generation": True}, "generation"),
        ({"generation": -1}, "generation"),
    ],
)
def test_wrong_value_is_named_and_the_file_not_used(tmp_path, change, words):
    (tmp_path / NAME).write_text(json.dumps(saved(tmp_path) | change))
    good, logs = loaded(tmp_path)
    assert good is None
    assert [(event, words in error) for event, error in logs] == [(NOT_USABLE, True)]


@pytest.mark.parametrize("field", ["spec", "generation"])
def test_missing_field_is_named(tmp_path, field):
    data = saved(tmp_path)
    del data[field]
    (tmp_path / NAME).write_text(json.dumps(data))
    assert loaded(tmp_path) == (None, [(NOT_USABLE, f"{field} is missing")])


def indexes(names: object, retired: object = ()) -> dict[str, object]:
    return {"names": names, "retired": retired}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # 0 is the index of the agent's own rules, 256 the first that no map has
        (
            {"watchlists": indexes({"shop": 0})},
            "watchlists.names.shop: 0 is not an integer of 1..255",
        ),
        ({"watchlists": indexes({"shop": 256})}, "watchlists.names.shop: 256"),
        ({"watchlists": indexes({"shop": -1})}, "watchlists.names.shop: -1"),
        ({"watchlists": indexes({"shop": 1 << 70})}, "watchlists.names.shop"),
        ({"watchlists": indexes({"shop": "1"})}, "watchlists.names.shop: '1'"),
        ({"watchlists": indexes({"shop": 1.0})}, "watchlists.names.shop: 1.0"),
        ({"watchlists": indexes({"shop": True})}, "watchlists.names.shop: True"),
        ({"watchlists": indexes({"shop": None})}, "watchlists.names.shop: None"),
        ({"watchlists": indexes({"shop": 1, "web": 1})}, "watchlists: an index is there twice"),
        ({"watchlists": indexes({"shop": 1}, [1])}, "watchlists: an index is there twice"),
        ({"watchlists": indexes({"shop": 1}, [2, 2])}, "watchlists: an index is there twice"),
        ({"watchlists": indexes({"shop": 1}, [0])}, "watchlists.retired: 0"),
        ({"watchlists": indexes({"shop": 1}, [256])}, "watchlists.retired: 256"),
        ({"watchlists": indexes({"shop": 1}, ["2"])}, "watchlists.retired: '2'"),
        ({"watchlists": indexes(["shop"])}, "watchlists: names is not an object"),
        ({"watchlists": indexes({}, {})}, "or retired not a list"),
        ({"watchlists": {"names": {}}}, "retired is missing"),
        ({"watchlists": None}, "NoneType"),
        ({"watchlists": []}, "list indices"),
        (
            {"collectors": indexes({"default": 16})},
            "collectors.names.default: 16 is not an integer of 0..15",
        ),
        ({"collectors": indexes({"default": -1})}, "collectors.names.default: -1"),
        ({"collectors": indexes({"a": 0, "b": 0})}, "collectors: an index is there twice"),
    ],
)
def test_bad_index_costs_the_indexes_and_not_the_rules(tmp_path, change, words):
    (tmp_path / NAME).write_text(json.dumps(saved(tmp_path) | change))
    good, logs = loaded(tmp_path)
    assert good == last_good.LastGood(SPEC, 7, Indexes(), Indexes())
    assert [(event, words in error) for event, error in logs] == [(INDEXES_NOT_USABLE, True)]


def test_every_index_that_a_map_has_is_good(tmp_path):
    every = last_good.LastGood(
        SPEC,
        7,
        Indexes({f"w{i}": i for i in range(1, 200)}, tuple(range(200, 256))),
        Indexes({f"c{i}": i for i in range(15)}, (15,)),
    )
    save(tmp_path, every)
    assert loaded(tmp_path) == (every, [])


def make_directory(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("make", [make_directory, make_fifo, make_loop, make_huge])
def test_what_is_no_file_of_ours_is_logged_and_not_used(tmp_path, make):
    make(tmp_path / NAME)
    good, logs = loaded(tmp_path)
    assert good is None
    assert [event for event, _ in logs] == [NOT_USABLE]


@pytest.mark.parametrize(
    "node", ["n" * 253, "n" * 1000, "a/b", "../../etc/x", "..", "", "a\0b", "ä", "x y"]
)
def test_any_name_of_a_node_makes_a_file_in_the_directory(tmp_path, node):
    state = tmp_path / "state"
    for number, name in enumerate((node, f"{node}-2")):
        save(state, last_good.LastGood(SPEC, number, Indexes(), Indexes()), name)
    for number, name in enumerate((node, f"{node}-2")):
        assert last_good.load(state, name).generation == number
    assert len(list(state.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [state]


def test_usual_names_of_nodes_are_names_of_files(tmp_path):
    save(tmp_path, node="ip-10-0-0-1.eu-central-1.compute.internal")
    (file,) = tmp_path.iterdir()
    assert file.name == "last-good-ip-10-0-0-1.eu-central-1.compute.internal.json"


def test_disk_that_refuses_is_logged_once_and_so_is_its_end(tmp_path):
    state = tmp_path / "state"
    state.write_text("")
    keeper = last_good.Keeper(state, "node-1")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            keeper.save(GOOD)
        state.unlink()
        for _ in range(3):
            keeper.save(GOOD)
    assert [entry["event"] for entry in logs] == [NOT_KEPT, "last good configuration kept again"]
    assert loaded(state) == (GOOD, [])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    save(tmp_path)
    (tmp_path / "last-good-node-1.new").mkdir()
    save(tmp_path, NOTHING)
    assert loaded(tmp_path) == (GOOD, [])


def test_directory_in_the_place_of_the_file_stops_nothing(tmp_path):
    (tmp_path / NAME).mkdir()
    with structlog.testing.capture_logs() as logs:
        save(tmp_path)
    assert [entry["event"] for entry in logs] == [NOT_KEPT]
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.lab
def test_full_disk_keeps_the_old_file_and_its_room(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", tmp_path], check=True)
    try:
        save(tmp_path, NOTHING)
        many = Indexes({f"watchlist-{i:0>200}": i for i in range(1, 255)})
        with structlog.testing.capture_logs() as logs:
            save(tmp_path, last_good.LastGood(SPEC, 8, many, Indexes()))
        assert [entry["error"] for entry in logs] == ["No space left on device"]
        assert loaded(tmp_path) == (NOTHING, [])
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_directory_that_nodes_share_does_not_mix_them(tmp_path):
    save(tmp_path)
    assert last_good.load(tmp_path, "node-2") is None
