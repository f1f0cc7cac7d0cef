# SPDX-License-Identifier: Apache-2.0
"""All checks together: none hides another, rights that are missing are named, and nothing changes by looking."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hostint_agent import command_line, loader, settings
from hostint_agent.doctor import (
    collector_checks,
    datapath_checks,
    examination,
    finding,
    http_checks,
    node_checks,
)
from tests.agent.cable import FAR
from tests.agent.doctor.findings import examine, fails, is_ok
from tests.agent.doctor.loaded import attached
from tests.agent.nobody import NOBODY
from tests.lab import cni
from tests.lab.topology import Node

NO_RIGHTS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def test_one_check_that_fails_in_an_unforeseen_way_hides_no_other():
    def check() -> Iterator[finding.Finding]:
        yield finding.ok("a", "first")
        raise KeyError("b")

    told = list(examination._each("a", check))
    assert [each.result for each in told] == ["ok", "failure"]
    assert "KeyError: 'b'" in told[1].found


def test_an_error_of_the_system_says_of_what():
    found = finding.unseen("a", PermissionError(errno.EACCES, "Permission denied", "/x"))
    fails(found, "/x: Permission denied", "run doctor as root")
    fails(finding.unseen("a", OSError("odd")), "odd", "mend this")


@pytest.mark.bpf
@pytest.mark.parametrize("before", [NO_RIGHTS, NOBODY], ids=["no capabilities", "nobody"])
def test_without_rights_each_check_that_needs_them_says_so(before, tmp_path):
    found = examine("--state-dir", tmp_path, before=before)
    fails(found["capabilities"], "CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF")
    for check in ("programs", "bpf jit", "drop tracepoint", "tcx", "rings"):
        fails(found[check], "Operation not permitted", "run doctor as root, or with CAP_BPF")
    for check in ("kernel", "btf", "compiler", "datapath", "network namespace"):
        is_ok(found[check])


@pytest.mark.bpf
def test_with_the_rights_of_the_manifest_nothing_fails(tmp_path):
    rights = "-all,+bpf,+net_admin,+perfmon"
    found = examine(
        "--state-dir", tmp_path, "--http", "none",
        before=["setpriv", f"--bounding-set={rights}", "--no-new-privs"],
    )  # fmt: skip
    assert [each for each in found.values() if each.result == "failure"] == []


@pytest.mark.bpf
def test_nothing_of_it_stays_open_attached_or_pinned(near, pins, tmp_path):
    listed = lambda: sorted(map(str, pins.rglob("*")))  # noqa: E731
    with attached(near, pins), cni.Cni(Node(near, 1, "", "")) as theirs:
        state = lambda: [  # noqa: E731
            listed(),
            *(theirs.order("eth0", hook) for hook in cni.HOOKS),
            theirs.tc("qdisc show"),
        ]
        before, open_before = state(), len(os.listdir("/proc/self/fd"))
        node_checks.programs()
        node_checks.jit()
        node_checks.drop_tracepoint()
        node_checks.shared_memory()
        found, loaded = datapath_checks.find(pins, loader.default_bpf_dir())
        is_ok(found)
        chosen = settings.from_options(
            command_line.parser({}).parse_args(["doctor", "--pin-dir", str(pins)])
        )
        assert near.inside(lambda: list(datapath_checks.attachments(chosen, loaded)))
        destination = command_line.parse_collector(f"{FAR}:1")
        near.inside(lambda: collector_checks.reach(destination))
        http_checks.address(("127.0.0.1", 0))
        assert len(os.listdir("/proc/self/fd")) == open_before
        examine("--pin-dir", pins, "--collector", f"{FAR}:1", before=near.command())
        assert state() == before


@pytest.mark.bpf
def test_llvm_is_mapped_into_the_child_alone(tmp_path):
    code = (
        "import sys; from hostint_agent import __main__; __main__.main(sys.argv[1:]);"
        "print('LLVM' in open('/proc/self/maps').read(), 'bcc' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "doctor", "--state-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "finds all headers" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "False False"
