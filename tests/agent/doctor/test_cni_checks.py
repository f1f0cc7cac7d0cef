# SPDX-License-Identifier: Apache-2.0
"""A CNI is known by its programs, and what that means for reports is said."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostint_agent import bpf_calls
from hostint_agent.doctor import cni_checks
from hostint_agent.doctor.cni_checks import Other
from tests.agent.doctor.findings import examine, is_ok, warns
from tests.agent.doctor.loaded import attached, look
from tests.lab import cni, compiled
from tests.lab.topology import Node
from tests.pins import pin_directory

POLICY = "policy for what comes to a pod drops at the egress hook (reason 92)"


def judged(*others: Other, netkit=()) -> list:
    return list(cni_checks.judge(others, netkit))


def at_pod(name: str, direction="ingress") -> Other:
    return Other("pod0", True, direction, name)


def at_uplink(name: str, direction="ingress") -> Other:
    return Other("eth0", False, direction, name)


def test_without_programs_the_kernel_forwards():
    (found,) = judged()
    is_ok(found, "none that attaches programs")
    assert found.check == "cni"


# names as TCX has them (15 characters), as filters of Cilium have them, and those of before 1.12
@pytest.mark.parametrize(
    "name", ["cil_from_contai", "cil_from_container-lxc12ab", "bpf_lxc.o:[from-container]"]
)
def test_cilium_is_known_by_its_names(name):
    (found,) = judged(at_pod(name), at_uplink("cil_from_netdev"))
    is_ok(found, "Cilium (", "on pod0, eth0)", "BPF host routing", "up to the pod's socket")
    assert "lxc12ab" not in found.found
    assert POLICY not in found.found


@pytest.mark.parametrize("name", ["cil_to_containe", "cil_to_container-lxc12ab"])
def test_cilium_with_endpoint_routes_is_known(name):
    (found,) = judged(at_pod("cil_from_contai"), at_pod(name, "egress"))
    is_ok(found, "Cilium (", POLICY)


def test_program_on_egress_of_an_uplink_is_no_policy_for_pods():
    (found,) = judged(at_uplink("cil_to_netdev", "egress"))
    is_ok(found, "Cilium (cil_to_netdev on eth0)")
    assert POLICY not in found.found


@pytest.mark.parametrize(
    "name",
    ["cali_tc_preambl", "cali_tc_preambl:[812]", "a.o:[calico_to_workload_ep]", "tc_calico_to_wo"],
)
def test_calico_is_known_by_its_names(name):
    (found,) = judged(at_pod(name, "egress"))
    is_ok(found, "Calico eBPF (", "bpfRedirectToPeer", POLICY)
    assert "[812]" not in found.found


def test_other_programs_are_of_no_known_cni():
    """Not either those whose names are like one."""
    (found,) = judged(at_pod("tc_ingress_flow"), at_uplink("pencil_from"), at_uplink("calibrate"))
    is_ok(found, "of no known CNI: calibrate, pencil_from, tc_ingress_flow on pod0, eth0")


def test_names_that_may_not_be_read_are_a_warning():
    known, unknown = judged(at_pod("cil_from_container-lxc1"), at_uplink(""))
    is_ok(known, "Cilium (cil_from_container on pod0)")
    warns(unknown, "whose programs run on eth0 is not known", "CAP_SYS_ADMIN")
    (only,) = judged(at_pod(""))
    warns(only, "on pod0")


def test_netkit_is_a_warning():
    (found,) = judged(netkit=["lxc1"])
    warns(found, "lxc1", "as if the host had sent it", "veth")


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Iterator[Path]:
    """Programs of Cilium's names that let everything pass."""
    names = ("cil_from_container", "cil_to_container")
    source = tmp_path_factory.mktemp("cilium") / "cilium.c"
    source.write_text("\n".join(f"int {n}(struct __sk_buff *skb)\n{{ return 0; }}" for n in names))
    with pin_directory("cilium") as pins:
        compiled.bpf(source, pins, names, {})
        yield pins


@pytest.mark.bpf
def test_programs_behind_ours_are_found(near, pins, programs):
    with attached(near, pins), cni.Cni(Node(near, 1, "", "")) as theirs:
        is_ok(look(near, pins)["cni"], "none that attaches programs")
        program = bpf_calls.obj_get(programs / "cil_from_container")
        theirs.tcx(program, "eth0", "ingress", first=False)
        is_ok(look(near, pins)["cni"], "Cilium (cil_from_contai on eth0)")
        program = bpf_calls.obj_get(programs / "cil_to_container")
        theirs.tcx(program, "eth0", "egress", first=False)
        is_ok(look(near, pins)["cni"], "Cilium (cil_from_contai, cil_to_containe on eth0)", POLICY)
        rights = ["setpriv", "--bounding-set=-sys_admin", "--no-new-privs"]
        found = examine("--pin-dir", pins, before=[*near.command(), *rights])
        warns(found["cni"], "whose programs run on eth0 is not known", "CAP_SYS_ADMIN")


@pytest.mark.bpf
@pytest.mark.parametrize("mode", ["tcx", "clsact"])
def test_own_programs_are_no_cni(near, pins, pin_dir, mode):
    with attached(near, pins, mode):
        is_ok(look(near, pins)["cni"], "none that attaches programs")
