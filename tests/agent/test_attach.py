# SPDX-License-Identifier: Apache-2.0
"""Attaching without traffic: who is first on a hook, how long we insist, and what a kernel without TCX gets."""

import ctypes
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest

from hostint_agent import attach, bpf_calls, bpf_types, clsact, interfaces, kernel
from tests.agent.rings import make_map
from tests.lab import cni
from tests.lab.namespace import Namespace, ip
from tests.lab.topology import Node
from tests.pins import pin_directory

_HASH, _ARRAY, _MMAPABLE = 1, 2, 1024


@pytest.mark.bpf
def test_ports_are_looked_up_only_where_one_is_not_its_index():
    with pin_directory("ports") as maps:
        make_map(maps / "ports", _HASH, 8, 64)
        config = make_map(maps / "config", _ARRAY, ctypes.sizeof(bpf_types.Config), 1, _MMAPABLE)

        def is_index() -> int:
            return bpf_types.Config.from_buffer_copy(config.lookup(bytes(4))).port_is_ifindex

        ports = attach.Ports(maps)
        assert is_index() == 0
        assert ports.assign([2, 70]) == {2: 2, 70: 70}
        assert is_index() == 1
        assert ports.assign([2, 70_000]) == {2: 2, 70_000: 65535}
        assert is_index() == 0
        assert ports.assign([2, 65535, 70_000]) == {2: 2, 65535: 65534, 70_000: 65535}
        assert ports.assign([2, 65535]) == {2: 2, 65535: 65534}
        assert is_index() == 0
        # another process finds the ids as they are
        assert attach.Ports(maps).assign([2, 65535]) == {2: 2, 65535: 65534}
        assert ports.assign([2]) == {2: 2}
        assert is_index() == 1


@pytest.mark.bpf
def test_the_ports_of_tunnel_devices_come_before_the_usual_ones(node):
    def told() -> tuple[list[int], int]:
        tunnels = bpf_types.Config.from_buffer_copy(config.lookup(bytes(4))).tunnels
        return list(tunnels.vxlan), tunnels.geneve

    def read() -> None:
        network = node.namespace.inside(interfaces.read_network)
        written.set_tunnels(network.tunnel_ports("vxlan"), network.tunnel_ports("geneve"))

    with pin_directory("tunnels") as maps:
        config = make_map(maps / "config", _ARRAY, ctypes.sizeof(bpf_types.Config), 1, _MMAPABLE)
        written = kernel.DatapathConfig(maps)
        read()
        assert told() == ([4789, 8472, 0], 6081)
        vxlan = f"-n {node.namespace.name} link add vx{{0}} type vxlan id {{0}} dstport {{1}}"
        ip(vxlan.format(1, 8472), vxlan.format(2, 4444))
        read()
        assert told() == ([4444, 8472, 4789], 6081)
        ip(vxlan.format(3, 5555), f"-n {node.namespace.name} link del vx1")
        read()
        assert told() == ([4444, 5555, 4789], 6081)
        written.set_tunnels(geneve=[7777])
        assert told() == ([4789, 8472, 0], 7777)


@pytest.fixture
def node() -> Iterator[Node]:
    namespace = Namespace(f"hostint-at-{os.getpid()}")
    ip(f"netns add {namespace.name}", f"-n {namespace.name} link add eth0 type ifb")
    try:
        yield Node(namespace, 1, "192.0.2.1", "2001:db8::1")
    finally:
        ip(f"netns del {namespace.name}")


@pytest.mark.bpf
def test_the_first_of_several_programs_is_told_and_0_where_there_is_none(node):
    with cni.Cni(node) as theirs:
        index = theirs.index("eth0")
        head = bpf_calls.TcxHead(index, bpf_calls.TCX_INGRESS)
        ask = lambda: node.namespace.inside(head.program_id)  # noqa: E731
        assert ask() == 0
        for place in ("last", "last", "first"):
            theirs.tcx(cni.verdict(cni.PIPE), "eth0", "ingress", first=place == "first")
            order = [entry.program for entry in theirs.order("eth0", "ingress")]
            assert ask() == ask() == order[0]
        assert len(order) == 3
        assert node.namespace.inside(bpf_calls.TcxHead(index, bpf_calls.TCX_EGRESS).program_id) == 0
        assert node.namespace.inside(bpf_calls.TcxHead(9999, bpf_calls.TCX_INGRESS).program_id) == 0


@pytest.mark.bpf
def test_the_link_of_a_device_that_is_gone_is_not_taken_for_its_successors(node):
    """The successor has the same name and index, and the programs are others by now: nothing of the old link can be used."""
    with pin_directory("links") as pins, cni.Cni(node) as theirs:
        index = theirs.index("eth0")
        older, newer = (
            bpf_calls.Program(fd, bpf_calls.program_id(fd)) for fd in map(cni.verdict, (-1, 3))
        )
        hooks = attach.TcxHooks(pins, {"ingress": older})
        assert node.namespace.inside(lambda: hooks.ensure(index, "ingress")) == "not attached"
        ip(
            f"-n {node.namespace.name} link del eth0",
            f"-n {node.namespace.name} link add eth0 index {index} type ifb",
        )
        hooks = attach.TcxHooks(pins, {"ingress": newer})
        assert node.namespace.inside(lambda: hooks.ensure(index, "ingress")) == "not first"
        assert [entry.program for entry in theirs.order("eth0", "ingress")] == [newer.id]
    os.close(older.fd)
    os.close(newer.fd)


@pytest.mark.bpf
def test_only_our_filters_are_removed_and_the_qdisc_stays(node):
    """Neither one with our handle and another name, nor one with our name and another handle."""
    with cni.Cni(node) as theirs:
        index = theirs.index("eth0")
        theirs.filter(cni.verdict(cni.OK), "eth0", "ingress", pref=1, handle=2)
        theirs.filter(cni.verdict(cni.OK), "eth0", "egress", pref=5, handle=clsact.FILTER_HANDLE)
        fd = cni.verdict(-1)
        program = bpf_calls.Program(fd, bpf_calls.program_id(fd))
        hooks = clsact.Hooks({"ingress": program, "egress": program})
        before = [theirs.filters("eth0", hook) for hook in cni.HOOKS]
        for hook in cni.HOOKS:
            assert node.namespace.inside(lambda: hooks.ensure(index, hook)) == "not attached"
            assert node.namespace.inside(lambda: hooks.ensure(index, hook)) is None
            assert theirs.filters("eth0", hook)[0]["options"]["bpf_name"] == clsact.FILTER_NAME
        stay = frozenset({program.id})
        assert node.namespace.inside(lambda: clsact.remove_all(except_programs=stay)) == []
        removed = node.namespace.inside(clsact.remove_all)
        os.close(fd)
        assert removed == [(index, "ingress"), (index, "egress")]
        assert [theirs.filters("eth0", hook) for hook in cni.HOOKS] == before
        assert "clsact" in node.namespace.run("tc", "qdisc", "show", "dev", "eth0")
        assert node.namespace.inside(clsact.remove_all) == []


# BPF_LINK_CREATE and BPF_PROG_QUERY answer EINVAL, as before Linux 6.6
_OLD_KERNEL = textwrap.dedent(
    """
    import ctypes, struct, sys
    libc = ctypes.CDLL(None, use_errno=True)

    def forbid(call, commands):
        # load the system call's number, then its first argument; return SECCOMP_RET_ERRNO | EINVAL, or allow
        program = [(0x20, 0, 0, 0), (0x15, 0, len(commands) + 1, call), (0x20, 0, 0, 16)]
        for place, command in enumerate(commands):
            program.append((0x15, len(commands) - place, 0, command))
        program += [(6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x50000 | 22)]
        code = b"".join(struct.pack("=HBBI", *one) for one in program)
        memory = ctypes.create_string_buffer(code, len(code))
        fprog = struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(memory))
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, ctypes.create_string_buffer(fprog), 0, 0) == 0, ctypes.get_errno()

    from pathlib import Path
    from hostint_agent import attach, bpf_calls, interfaces, kernel, loader
    directory = loader.load(Path(sys.argv[1]))
    if sys.argv[2] == "old":
        forbid(bpf_calls._SYSCALL, [bpf_calls.LINK_CREATE, bpf_calls.PROG_QUERY])
    made = attach.Attacher(
        Path(sys.argv[1]), directory, patterns=interfaces.Patterns(include=("eth0",)), mode="auto",
        cgroup=Path("/sys/fs/cgroup"), on_change=lambda state: None,
    )
    made.start()
    print([(a.interface.name, a.method, a.error) for a in made.state().attachments])
    print("pyroute2" in sys.modules)
    made.stop()
    """
)


@pytest.mark.bpf
@pytest.mark.parametrize(("kernel", "method"), [("old", "clsact"), ("new", "tcx")])
def test_auto_means_tcx_where_the_kernel_has_it_and_clsact_where_not(node, kernel, method):
    """And neither needs more than our own netlink."""
    pins = f"/sys/fs/bpf/{node.namespace.name}"
    os.mkdir(pins)
    ip(f"-n {node.namespace.name} link set eth0 up")
    ran = subprocess.run(
        node.namespace.command(sys.executable, "-c", _OLD_KERNEL, pins, kernel),
        capture_output=True,
        text=True,
    )
    unloaded = node.namespace.run(
        sys.executable, "-m", "hostint_agent", "unload", "--pin-dir", pins
    )
    assert ran.stdout.splitlines()[-2:] == [f"[('eth0', '{method}', None)]", "False"], ran.stderr
    assert ("filter on eth0 ingress" in unloaded) == (method == "clsact")
    assert ("link tcx-" in unloaded) == (method == "tcx")
