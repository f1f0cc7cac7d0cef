# SPDX-License-Identifier: Apache-2.0
"""Which builds go on with each other's maps, and that loading does."""

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, loader
from tests.pins import pin_directory


def edited(directory: Path, name: str, old: str, new: str) -> Path:
    """The sources with one text of a file replaced."""
    sources = Path(tempfile.mkdtemp(dir=directory)) / "bpf"
    shutil.copytree(loader.default_bpf_dir(), sources)
    text = (sources / name).read_text()
    assert text.count(old) == 1
    (sources / name).write_text(text.replace(old, new))
    return sources


def builds(*sources: Path) -> list[Path]:
    return [Path(loader.read_source(each).build) for each in sources]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("flow.h", "sample <= 1 ||", "sample < 2 ||"),
        ("flow.h", "/* What of an observation", "/* What of an observation (a comment)"),
        ("int_host.c", "int ingress(struct __sk_buff *skb)", "int  ingress(struct __sk_buff *skb)"),
    ],
    ids=["a body", "a comment", "a signature"],
)
def test_what_only_programs_do_otherwise_goes_on_with_the_same_maps(tmp_path, name, old, new):
    before, after = builds(loader.default_bpf_dir(), edited(tmp_path, name, old, new))
    assert before != after
    assert loader.have_same_maps(before, after)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("maps.h", "#define MAPS_VERSION 1", "#define MAPS_VERSION 2"),
        ("types.h", "#define NR_SLOTS 65536", "#define NR_SLOTS 32768"),
        ("types.h", "__u32 fingerprint;", "__u32 mark;"),
        ("types.h", "SLOT_PENDING = 2,", "SLOT_PENDING = 5,"),
        ("slot.h", "#define SLOT_SHIFT 8", "#define SLOT_SHIFT 7"),
        ("classify.h", "__u16 any_destination;\n", "__u16 any_destination;\n\t__u32 more;\n"),
        ("classify.h", "PINNED_MMAPABLE(class_words,", "PINNED_ARRAY(class_words,"),
        ("maps.h", '"%pB"', '"%ps"'),
    ],
    ids=["meaning", "size", "field", "state", "constant", "table", "kind", "text"],
)
def test_maps_that_differ_are_not_taken_over(tmp_path, name, old, new):
    before, after = builds(loader.default_bpf_dir(), edited(tmp_path, name, old, new))
    assert not loader.have_same_maps(before, after)


def test_other_numbers_of_cpus_have_other_maps():
    two, four = (Path(loader.read_source(loader.default_bpf_dir(), cpus).build) for cpus in (2, 4))
    assert not loader.have_same_maps(two, four)


@pytest.fixture
def pin_dir():
    with pin_directory("loader") as directory:
        yield directory


def ids(build: Path) -> dict[str, int]:
    return {pin.name: bpf_calls.Map.open(pin).id for pin in (build / "maps").iterdir()}


@pytest.mark.bpf
def test_another_version_is_loaded_with_the_maps_that_are_there(pin_dir, tmp_path):
    first = loader.load(pin_dir)
    for name in loader.PROGRAMS:
        assert len(ids_of_program(first / "programs" / name)) > 10
        assert ids_of_program(first / "programs" / name) <= set(ids(first).values())
    second = loader.load(pin_dir, edited(tmp_path, "flow.h", "sample <= 1 ||", "sample < 2 ||"))
    assert ids(first) == ids(second)
    assert len(ids(first)) == len(loader.read_source(loader.default_bpf_dir()).maps) > 30
    loader.remove(first)
    assert bpf_calls.Map.open(second / "maps" / "slots").max_entries == 65536
    # the programs hold the maps that are pinned, not what the compiler made for itself
    for name in loader.PROGRAMS:
        used = ids_of_program(second / "programs" / name)
        assert len(used) > 10
        assert used <= set(ids(second).values())


def ids_of_program(pin: Path) -> set[int]:
    """Maps that a program uses (struct bpf_prog_info: nr_map_ids, map_ids)."""
    fd, numbers = bpf_calls.obj_get(pin), (ctypes.c_uint32 * 64)()
    info = ctypes.create_string_buffer(232)
    struct.pack_into("=IQ", info, 52, len(numbers), ctypes.addressof(numbers))
    attr = struct.pack("=IIQ", fd, len(info), ctypes.addressof(info))
    bpf_calls.bpf(bpf_calls.OBJ_GET_INFO_BY_FD, attr, "object info")
    os.close(fd)
    return set(numbers[: struct.unpack_from("=I", info, 52)[0]])


@pytest.mark.bpf
def test_loader_needs_only_the_rights_of_the_container(pin_dir):
    """Among others it cannot see the kernel's symbols, by which bcc looks for helpers."""
    rights = ["setpriv", "--bounding-set=-all,+bpf,+net_admin,+perfmon", "--inh-caps=-all"]
    load = "import pathlib, sys; from hostint_agent import loader; loader.load(pathlib.Path(sys.argv[1]))"
    command = [*rights, sys.executable, "-c", load, str(pin_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(loader.builds(pin_dir)) == 1


@pytest.mark.bpf
def test_constants_cannot_be_changed(pin_dir):
    constants = loader.read_source(loader.default_bpf_dir()).constants
    assert constants == {"symbol_format": b"%pB\0\0\0\0\0"}
    constant = bpf_calls.Map.open(loader.load(pin_dir) / "maps" / "symbol_format")
    assert constant.lookup(bytes(4)) == constants["symbol_format"]
    with pytest.raises(bpf_calls.BpfError, match="not permitted"):
        constant.update(bytes(4), b"%px\0\0\0\0\0")


@pytest.mark.bpf
def test_a_build_of_which_a_map_is_missing_is_not_gone_on_with(pin_dir, tmp_path):
    first = loader.load(pin_dir)
    (first / "maps" / "flows").unlink()
    second = loader.load(pin_dir, edited(tmp_path, "flow.h", "sample <= 1 ||", "sample < 2 ||"))
    assert not set(ids(first).values()) & set(ids(second).values())
    assert bpf_calls.Map.open(second / "maps" / "flows").max_entries == 16384


@pytest.mark.bpf
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("observe_drop(address,", "observe_drop(, address,", "compile"),
        (
            "observe_delivery(packet_address(skb,",
            "observe_delivery(, packet_address(skb,",
            "compile",
        ),
        (
            "flags = classify(&scratch->key, scratch, &verdict, side_of(generation)",
            "flags = no_such_function(",
            "compile",
        ),
        ("observe_drop(address,", "scratch = NULL; observe_drop(address,", "drop"),
        (
            "now = bpf_ktime_get_ns();\n\t/* 0: in no rule",
            "skb->len = 1;\n\t/* 0: in no rule",
            "ingress",
        ),
        ("return CGROUP_PASS;", "return 7;", "deliver"),
        ("return NETFILTER_ACCEPT;", "return 7;", "local_in"),
    ],
    ids=[
        "compile drop",
        "compile deliver",
        "compile TC",
        "verify drop",
        "verify TC",
        "verify deliver",
        "verify local_in",
    ],
)
def test_a_program_that_cannot_be_loaded_is_told_and_nothing_is_left(
    pin_dir, tmp_path, old, new, words
):
    sources = edited(tmp_path, "int_host.c", old, new)
    with pytest.raises(loader.LoadError, match=words):
        loader.load(pin_dir, sources)
    assert not loader.builds(pin_dir)
    assert not [each for each in processes() if str(sources) in each]
    assert loader.load(pin_dir).is_dir()
    assert len(list(pin_dir.iterdir())) == 1


def processes() -> list[str]:
    """Command lines of all processes."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            found.append(each.read_text())
    return found
