# SPDX-License-Identifier: Apache-2.0
"""Maps by bpf(2): what is written is read, what is deleted is gone."""

import ctypes
import errno
import os
import struct
import sys
from concurrent import futures
from pathlib import Path

import pytest

from hostint_agent import bpf_calls

pytestmark = pytest.mark.bpf
HASH, ARRAY, MMAPABLE = 1, 2, 1024


def create(kind: int, key: int, value: int, entries: int, flags: int = 0) -> bpf_calls.Map:
    attr = struct.pack("=IIIII", kind, key, value, entries, flags)
    return bpf_calls.Map(bpf_calls.bpf(bpf_calls.MAP_CREATE, attr, "create"))


def test_a_hash_gives_back_what_was_put_in():
    table = create(HASH, 4, 8, 16)
    for number in range(5):
        table.update(struct.pack("=I", number), struct.pack("=Q", number * 10))
    assert sorted(struct.unpack("=I", key)[0] for key in table.keys()) == [0, 1, 2, 3, 4]
    assert table.lookup(struct.pack("=I", 3)) == struct.pack("=Q", 30)


def test_a_deleted_key_is_gone():
    table = create(HASH, 4, 8, 16)
    table.update(bytes(4), bytes(8))
    table.delete(bytes(4))
    assert list(table.keys()) == []
    with pytest.raises(bpf_calls.BpfError) as caught:
        table.delete(bytes(4))
    assert caught.value.errno == errno.ENOENT


def test_an_array_is_read_in_one_go():
    table = create(ARRAY, 4, 8, 3000)
    table.update(struct.pack("=I", 2999), struct.pack("=Q", 7))
    assert table.values() == bytes(8 * 2999) + struct.pack("=Q", 7)


def test_the_memory_of_an_array_is_the_array():
    table = create(ARRAY, 4, 8, 10, MMAPABLE)
    memory = table.memory()
    ctypes.c_uint64.from_buffer(memory, 8 * 3).value = 42
    assert table.lookup(struct.pack("=I", 3)) == struct.pack("=Q", 42)


def test_a_pin_that_is_not_there_is_told_by_name():
    with pytest.raises(bpf_calls.BpfError, match="no-such-pin") as caught:
        bpf_calls.obj_get(Path("/sys/fs/bpf/no-such-pin"))
    assert caught.value.errno == errno.ENOENT
    assert os.strerror(errno.ENOENT) in str(caught.value)


def test_threads_may_share_a_map():
    """What one looks up is never what another has asked for: metrics are read while rules change."""
    shared = create(ARRAY, 4, 8, 64)
    for place in range(64):
        shared.update(struct.pack("=I", place), struct.pack("=Q", place))

    def read(begin: int) -> int:
        places = [(begin + step) % 64 for step in range(20_000)]
        return sum(shared.lookup(struct.pack("=I", at)) != struct.pack("=Q", at) for at in places)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with futures.ThreadPoolExecutor(4) as threads:
            assert sum(threads.map(read, range(0, 64, 16))) == 0
    finally:
        sys.setswitchinterval(switch)
