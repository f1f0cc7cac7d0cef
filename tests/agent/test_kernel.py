# SPDX-License-Identifier: Apache-2.0
"""What is read of the running kernel is what the kernel itself says elsewhere."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from hostint_agent import bpf_types, kernel
from hostint_report import drop_reasons


def test_offsets_agree_with_bpftool():
    text = subprocess.run(
        ["bpftool", "btf", "dump", "file", str(kernel.VMLINUX_BTF)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    body = re.search(r"^\[\d+\] STRUCT 'net_device' .*?(?=^\[)", text, re.MULTILINE | re.DOTALL)
    assert body
    bits = re.search(r"'ifindex' type_id=\d+ bits_offset=(\d+)", body[0])
    assert bits
    assert kernel.offsets().dev_ifindex == int(bits[1]) // 8


def test_drop_reasons_include_those_of_the_netfilter_and_the_routing_code():
    names = set(kernel.drop_reason_names().values())
    assert {"NETFILTER_DROP", "IP_INNOROUTES", "IP_INHDR", "QDISC_DROP"} <= names


def test_drop_reason_numbers_agree_with_the_tracepoint_format():
    formats = [
        Path("/sys/kernel/tracing/events/skb/kfree_skb/format"),
        Path("/sys/kernel/debug/tracing/events/skb/kfree_skb/format"),
    ]
    subprocess.run(["mount", "-t", "tracefs", "tracefs", "/sys/kernel/tracing"], check=False)
    text = next(path.read_text() for path in formats if path.exists())
    told = {int(number): name for number, name in re.findall(r"\{ (\d+), \"(\w+)\" \}", text)}
    named = kernel.drop_reason_names()
    assert told
    assert {number: named.get(number) for number in told if number < 256} == {
        number: name for number, name in told.items() if number < 256
    }


def test_the_namespace_cookie_is_not_zero():
    assert kernel.netns_cookie() > 0


def test_the_wall_offset_turns_monotonic_into_wall_time():
    import time

    assert abs(time.monotonic_ns() + kernel.wall_offset_ns() - time.time_ns()) < 5_000_000


def test_a_firewall_drop_is_reported_as_policy_deny():
    by_name = {name: index for index, name in kernel.drop_reason_names().items()}
    entries = kernel.drop_reason_entries(kernel.drop_reason_names())
    entry = bpf_types.DropReason.from_buffer_copy(entries[by_name["NETFILTER_DROP"]])
    assert entry.code == drop_reasons.for_kernel_name("NETFILTER_DROP").code == 80
    assert entry.flags & bpf_types.DropFlag.REPORT
    assert not entry.flags & bpf_types.DropFlag.AFTER_EGRESS


def test_only_reasons_that_say_little_are_counted_by_function():
    names = {2: "NOT_SPECIFIED", 3: "NO_SOCKET", 4: "NEWER_THAN_OUR_TABLE"}
    entries = kernel.drop_reason_entries(names)
    flags = {i: bpf_types.DropReason.from_buffer_copy(entry).flags for i, entry in entries.items()}
    counted = {i for i, each in flags.items() if each & bpf_types.DropFlag.BY_FUNCTION}
    assert {2, 4, 255, 256, 511} <= counted
    assert 3 not in counted


def test_something_that_is_not_btf_is_refused():
    with pytest.raises(kernel.KernelError, match="is not BTF"):
        kernel.Btf(bytes(64))


def test_tcx_is_found_where_this_kernel_has_it():
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    assert kernel.has_tcx() == ((major, minor) >= (6, 6))
