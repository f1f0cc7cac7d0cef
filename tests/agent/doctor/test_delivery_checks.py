# SPDX-License-Identifier: Apache-2.0
"""Where packets are taken: each thing that can be missing is seen, and said with its remedy."""

import os
from pathlib import Path

import pytest

from hostint_agent import bpf_calls, delivery, loader
from hostint_agent.doctor import datapath_checks, delivery_checks
from hostint_agent.doctor.finding import Finding
from hostint_agent.status import look as status
from tests.agent.doctor.findings import fails, is_ok, warns
from tests.agent.doctor.loaded import attached, look
from tests.lab import cni

CGROUP = Path("/sys/fs/cgroup")
BEFORE_6_4 = tuple(name for name in loader.PROGRAMS if name != "local_in")


def checked(cgroup: Path = CGROUP) -> list[Finding]:
    return list(delivery_checks.check(cgroup, Path("/none"), None))


@pytest.fixture
def old_kernel(monkeypatch) -> None:
    """A kernel without netfilter programs."""
    monkeypatch.setattr(loader, "programs", lambda: BEFORE_6_4)


@pytest.fixture
def without_local_in(old_kernel, pins):
    """What an agent has loaded there."""
    pin = loader.current(pins) / "programs" / "local_in"
    kept = bpf_calls.obj_get(pin)
    pin.unlink()
    yield
    bpf_calls.obj_pin(kept, pin)
    os.close(kept)


@pytest.mark.bpf
def test_host_with_everything_is_ok():
    (found,) = checked()
    is_ok(found, "can be seen")
    assert found.check == "delivery"


@pytest.mark.bpf
def test_missing_cgroup_root_fails(tmp_path):
    """Neither a folder of anything, nor what a container takes for the root."""
    remedy = "mount the host's /sys/fs/cgroup into the container and name it with --cgroup-root"
    for make in (lambda: None, (tmp_path / "cgroup.controllers").touch):
        make()
        (tmp_path / "cgroup.type").touch()
        (found,) = checked(tmp_path)
        fails(found, f"{tmp_path} is not the root of a cgroup v2", "is unresolved", remedy)
    (tmp_path / "cgroup.type").unlink()
    (found,) = checked(tmp_path)
    is_ok(found)


@pytest.mark.bpf
def test_hybrid_hierarchy_is_ok(tmp_path):
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified" / "cgroup.controllers").touch()
    (found,) = checked(tmp_path)
    is_ok(found)


@pytest.mark.bpf
def test_kernel_without_netfilter_programs_is_a_warning(old_kernel):
    (found,) = checked()
    warns(found, "no netfilter programs", "without a socket (ICMP) is unresolved", "Linux 6.4")


@pytest.mark.bpf
def test_each_problem_is_said(old_kernel, tmp_path):
    assert [each.result for each in checked(tmp_path)] == ["failure", "warning"]


@pytest.mark.bpf
def test_attached_links_are_ok(near, pins):
    with attached(near, pins):
        is_ok(look(near, pins)["delivery"], "our programs see what sockets take")


@pytest.mark.bpf
@pytest.mark.parametrize("name", delivery.LINK_PINS)
def test_missing_link_fails(near, pins, name):
    with attached(near, pins):
        (pins / "links" / name).unlink()
        fails(look(near, pins)["delivery"], f"link {name} is not attached", "start the agent")


@pytest.mark.bpf
@pytest.mark.parametrize("name", delivery.LINK_PINS)
def test_link_of_another_program_fails(near, pins, name):
    """As a build leaves it that was replaced."""
    with attached(near, pins):
        _, loaded = datapath_checks.find(pins, loader.default_bpf_dir())
        program = "deliver" if name == delivery.SOCKETS else "local_in"
        right = loaded.programs[program]
        other = datapath_checks.Loaded(
            loaded.directory, {**loaded.programs, program: right + 1}, True, False, 0
        )
        found = delivery_checks.link(pins / "links" / name, name, other)
        fails(found, f"link {name} runs program {right}, not {right + 1}", "start the agent")
        assert delivery_checks.link(pins / "links" / name, name, loaded) is None


@pytest.mark.bpf
def test_detached_link_fails(near, pins):
    """Its pin is there; the program runs no more."""
    with attached(near, pins):
        with bpf_calls.opened(pins / "links" / delivery.SOCKETS) as link:
            cni.detach(link)
        fails(look(near, pins)["delivery"], "link sockets was detached by another program")


@pytest.mark.bpf
def test_datapath_without_netfilter_program_is_whole(near, pins, without_local_in, tmp_path):
    """Before Linux 6.4. `status` works there as well."""
    with attached(near, pins):
        found = look(near, pins)
        where = status.Where(pins, loader.default_bpf_dir(), tmp_path, "node")
        programs = near.inside(lambda: status.gather(where, 0)).programs
    is_ok(found["datapath"], "is loaded and enabled")
    warns(found["delivery"], "no netfilter programs")
    assert tuple(programs) == BEFORE_6_4
