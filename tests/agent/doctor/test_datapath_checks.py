# SPDX-License-Identifier: Apache-2.0
"""Checks of what is loaded and attached, and where: each is seen to pass, and to fail for the reason that it names."""

import fcntl
import os
import time

import pytest

from hostint_agent import bpf_calls, interfaces, kernel, loader
from hostint_agent.doctor import datapath_checks
from hostint_agent.status import look as status
from tests.agent.doctor.findings import examine, fails, is_ok, warns
from tests.agent.doctor.loaded import attached, look
from tests.lab import cni
from tests.lab.namespace import ip
from tests.lab.topology import Node


@pytest.mark.bpf
def test_the_network_namespace_of_the_host_is_told_from_others(near):
    is_ok(datapath_checks.network_namespace(None), "the host's")
    found = near.inside(lambda: datapath_checks.network_namespace(None))
    warns(found, "not the host's", "hostNetwork: true")


@pytest.mark.bpf
def test_without_a_datapath_it_is_told_what_would_be_watched(near, pin_dir):
    found = look(near, pin_dir)
    is_ok(found["datapath"], f"none is loaded at {pin_dir}", "when it starts")
    is_ok(found["interfaces"], "1 to watch: eth0 (pod)")
    is_ok(look(near, pin_dir, "--include-interfaces", "eth*")["interfaces"], "1 to watch")


@pytest.mark.bpf
def test_no_interface_to_watch_is_a_warning(near, pin_dir):
    found = look(near, pin_dir, "--exclude-interfaces", "eth*")
    warns(found["interfaces"], "neither a pod's interface nor an uplink", "--include-interfaces")


@pytest.mark.bpf
def test_an_uplink_that_cannot_be_watched_is_named(near, pins):
    ip(
        f"-n {near.name} tuntap add tun0 mode tun",
        f"-n {near.name} addr add 10.8.0.2/24 dev tun0",
        f"-n {near.name} link set tun0 up",
        f"-n {near.name} route add default dev tun0",
    )
    config = kernel.DatapathConfig(loader.current(pins) / "maps")
    with attached(near, pins):
        found = look(near, pins)
        is_ok(found["interfaces"], "run first on 1 of 1: eth0")
        words = (
            "the default route is on tun0, which is not watched: tun0 (kind tun) has no Ethernet"
        )
        warns(found["uplink tun0"], words, "--exclude-interfaces tun0")
        assert "uplink tun0" not in look(near, pins, "--exclude-interfaces", "tun*")
        ip(f"-n {near.name} addr add fd00:8::2/64 dev tun0 nodad")
        found = look(near, pins, "--node-addresses", "10.98.0.1,fd00:8::2")
        warns(found["uplink tun0"], "the node's address fd00:8::2 is on tun0")
        # status, with the same options
        exclude = interfaces.Patterns(exclude=("tun*",))
        for patterns, addresses, words in (
            (interfaces.Patterns(), (), ["the default route is on tun0"]),
            (interfaces.Patterns(), ("fd00:8::2",), ["the node's address fd00:8::2 is on tun0"]),
            (exclude, ("fd00:8::2",), []),
        ):
            where = status.Where(pins, loader.default_bpf_dir(), pins, "node", patterns, addresses)
            found = near.inside(lambda where=where: status.gather(where, 0)).unseen
            assert [each[: len(start)] for each, start in zip(found, words, strict=True)] == words
        config.set_node_id(int.from_bytes(bytes((10, 8, 0, 2))))
        try:
            warns(look(near, pins)["uplink tun0"], "the node's address 10.8.0.2 is on tun0")
        finally:
            config.set_node_id(0)


@pytest.mark.bpf
def test_an_agent_without_pins_is_a_failure(near, pin_dir):
    """`status` says the same."""
    pin_dir.mkdir()
    is_ok(look(near, pin_dir)["datapath"], "none is loaded")
    descriptor = os.open(pin_dir, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        words = f"an agent works with {pin_dir}, but no datapath is pinned there"
        fails(look(near, pin_dir)["datapath"], words, "restart it")
    finally:
        os.close(descriptor)


@pytest.mark.bpf
def test_filters_whose_maps_are_pinned_nowhere_are_a_warning(near, pins, pin_dir):
    """They go on without pins, and nothing reads what they count."""
    with attached(near, pins, "clsact"):
        found = look(near, pin_dir)
        warns(found["interfaces"], "programs of ours", "run on eth0", "hostint-agent unload")
    is_ok(look(near, pin_dir)["interfaces"], "1 to watch")


@pytest.mark.bpf
def test_links_that_are_left_without_a_build_are_a_warning(near, pins, pin_dir):
    """As the filters: somebody removed `PIN/<build>` while no agent ran."""
    pin_dir.mkdir()
    with attached(near, pins):
        build = loader.current(pins)
        build.rename(pins / "aside")
        try:
            warns(look(near, pins)["interfaces"], "programs of ours", "run on eth0", "unload")
        finally:
            (pins / "aside").rename(build)
        # what cannot be read is not taken for what is not there
        program = build / "programs" / "ingress"
        program.rename(pins / "aside")
        try:
            found = look(near, pins)
        finally:
            (pins / "aside").rename(program)
        fails(found["datapath"], "is loaded without program ingress")
        is_ok(found["interfaces"], "1 to watch: eth0")


@pytest.mark.bpf
@pytest.mark.parametrize("mode", ["tcx", "clsact"])
def test_a_datapath_that_is_attached_first_everywhere_is_ok(near, pins, mode):
    with attached(near, pins, mode):
        found = look(near, pins)
    is_ok(found["datapath"], "is loaded and enabled, drop program attached")
    is_ok(found["interfaces"], "our programs run first on 1 of 1: eth0")
    assert not [check for check in found if check.startswith("interface ")]


@pytest.mark.bpf
def test_an_interface_without_our_programs_is_a_failure(near, pins):
    with attached(near, pins):
        ip(f"-n {near.name} link add later type veth peer name other netns {near.name}")
        found = look(near, pins, "--include-interfaces", "later")
        fails(found["interface later"], "not attached on ingress and egress", "start the agent")
        is_ok(found["interfaces"], "first on 1 of 2: eth0")
        for pin in (pins / "links").glob("tcx-*-egress"):
            pin.unlink()
        # The kernel detaches what is unpinned a moment later, in a worker.
        deadline = time.monotonic() + 5
        while "interface eth0" not in (found := look(near, pins)):
            assert time.monotonic() < deadline
        fails(found["interface eth0"], "our program is not attached on egress")


@pytest.mark.bpf
@pytest.mark.parametrize("hook", cni.HOOKS)
def test_a_program_before_ours_is_a_warning_that_names_it_and_one_behind_is_none(near, pins, hook):
    with attached(near, pins), cni.Cni(Node(near, 1, "", "")) as theirs:
        theirs.tcx(cni.verdict(cni.PIPE), "eth0", hook, first=False)
        is_ok(look(near, pins)["interfaces"], "eth0")
        theirs.tcx(cni.verdict(cni.PIPE), "eth0", hook, first=True)
        first = theirs.order("eth0", hook)[0].program
        found = look(near, pins)
        words = f"others run before our program, on {hook}: cni (program {first})"
        warns(found["interface eth0"], words, "first again within a second")
        assert "interfaces" not in found


@pytest.mark.bpf
def test_a_program_that_we_may_not_ask_for_its_name_is_named_by_its_number(near, pins):
    """As in the agent's container: a name takes CAP_SYS_ADMIN."""
    with attached(near, pins), cni.Cni(Node(near, 1, "", "")) as theirs:
        theirs.tcx(cni.verdict(cni.PIPE), "eth0", "egress", first=True)
        first = theirs.order("eth0", "egress")[0].program
        rights = ["setpriv", "--bounding-set=-sys_admin", "--no-new-privs"]
        found = examine("--pin-dir", pins, before=[*near.command(), *rights])
        warns(found["interface eth0"], f"on egress: program {first} ->")


@pytest.mark.bpf
def test_with_clsact_both_filters_and_tcx_programs_can_be_before_ours(near, pins):
    with attached(near, pins, "clsact"), cni.Cni(Node(near, 1, "", "")) as theirs:
        theirs.filter(cni.verdict(cni.OK), "eth0", "ingress", pref=5)
        is_ok(look(near, pins)["interfaces"], "eth0")
        # of the same preference, the later one is before the earlier one
        theirs.filter(cni.verdict(cni.PIPE), "eth0", "ingress", pref=1, handle=9)
        theirs.tcx(cni.verdict(cni.PIPE), "eth0", "egress", first=True)
        found = look(near, pins)["interface eth0"]
    warns(found, "on ingress: program", "; egress: cni (program ")


_OURS = {"ingress": 1, "egress": 2}


@pytest.mark.parametrize(
    ("ingress", "egress", "result", "words"),
    [
        ([(1, "a")], [(2, "b")], "ok", "runs first on ingress and egress"),
        ([(1, "a"), (9, "x")], [(2, "b")], "ok", "runs first"),
        ([(9, "x"), (8, ""), (1, "a")], [(2, "b")], "warning", "ingress: x (program 9), program 8"),
        ([(2, "b")], [(2, "b")], "failure", "not attached on ingress"),
        ([], [], "failure", "not attached on ingress and egress"),
        ([(1, "a"), (9, "x"), (1, "a")], [(2, "b")], "failure", "runs twice on ingress"),
    ],
    ids=["alone", "first", "behind others", "the other of ours", "none", "twice"],
)
def test_the_order_on_a_hook_is_judged(ingress, egress, result, words):
    hooks = [datapath_checks.Hook("ingress", ingress), datapath_checks.Hook("egress", egress)]
    found = datapath_checks.order("eth0", hooks, _OURS)
    assert (found.check, found.result) == ("interface eth0", result)
    assert words in found.found


def test_of_many_interfaces_ten_are_named():
    names = [f"veth{number}" for number in range(12)]
    assert datapath_checks.listed(names).endswith("veth8, veth9 and 2 more")
    assert datapath_checks.listed(names[:10]).endswith("veth8, veth9")


@pytest.mark.bpf
def test_a_datapath_whose_drop_program_is_not_attached_fails(near, pins):
    with attached(near, pins):
        (pins / "links" / "kfree_skb").unlink()
        fails(look(near, pins)["datapath"], "drop program is not attached", "start the agent")


@pytest.mark.bpf
@pytest.mark.parametrize("pin", ["programs/egress", "maps/slots"])
def test_a_datapath_that_is_not_whole_fails(near, pins, pin):
    path = loader.current(pins) / pin
    kept = bpf_calls.obj_get(path)
    path.unlink()
    try:
        found = look(near, pins)
    finally:
        bpf_calls.obj_pin(kept, path)
        os.close(kept)
    words = pin.replace("s/", " ")
    fails(found["datapath"], f"is loaded without {words}", "restart the agent")


@pytest.mark.bpf
def test_a_datapath_that_looks_at_no_packet_is_a_warning(near, pins):
    config = kernel.DatapathConfig(loader.current(pins) / "maps")
    config.set_enabled(False)
    try:
        with attached(near, pins):
            warns(look(near, pins)["datapath"], "looks at no packet", "start the agent")
    finally:
        config.set_enabled(True)


@pytest.mark.bpf
def test_a_datapath_that_holds_its_reports_back_is_a_warning(near, pins):
    config = kernel.DatapathConfig(loader.current(pins) / "maps")
    config.set_hold(True)
    try:
        with attached(near, pins):
            warns(look(near, pins)["datapath"], "holds its reports back", "completes the upgrade")
    finally:
        config.set_hold(False)


@pytest.mark.bpf
def test_a_datapath_of_other_sources_is_a_warning_and_none_without_sources_a_failure(
    near, pins, sources
):
    main = sources / loader.MAIN_SOURCE
    main.write_text(f"{main.read_text()}\n/* another version */\n")
    newer = loader.read_source(sources).build
    with attached(near, pins):
        found = look(near, pins, "--bpf-dir", str(sources))
        words = f"build {loader.current(pins).name} is loaded, the sources here are build {newer}"
        warns(found["datapath"], words, "takes the place")
        is_ok(found["interfaces"], "run first on 1 of 1: eth0")
        main.unlink()
        fails(look(near, pins, "--bpf-dir", str(sources))["datapath"], "int_host.c: No such", "--bpf-dir")  # fmt: skip


@pytest.mark.bpf
def test_the_network_namespace_is_compared_with_the_one_that_the_datapath_watches(near, pins):
    config = kernel.DatapathConfig(loader.current(pins) / "maps")
    config._config.netns_cookie = near.inside(kernel.netns_cookie)
    try:
        with attached(near, pins):
            is_ok(look(near, pins)["network namespace"], "the loaded datapath watches")
            _, loaded = datapath_checks.find(pins, loader.default_bpf_dir())
            found = datapath_checks.network_namespace(loaded)
            warns(found, "watches another one than this", "where the agent runs")
    finally:
        config._config.netns_cookie = 0
