# SPDX-License-Identifier: Apache-2.0
"""`hostint-agent doctor`: every check is seen to pass, and to fail for the reason that it names; and nothing changes by it."""

import argparse
import contextlib
import errno
import http.server
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostint_agent import __main__ as hostint_agent
from hostint_agent import (
    attach,
    bpf_calls,
    clsact,
    interfaces,
    kernel,
    last_good,
    loader,
    node_rules,
    settings,
    topology,
)
from hostint_agent import http as agent_http
from hostint_agent.doctor import (
    collector_checks,
    datapath_checks,
    examination,
    finding,
    http_checks,
    node_checks,
    probes,
)
from hostint_agent.doctor import command as doctor
from hostint_api import NodeConfigSpec
from tests.agent.cable import FAR, FAR6, cable
from tests.lab import cni
from tests.lab.namespace import Namespace, ip
from tests.lab.topology import Node

COMMAND = [sys.executable, "-m", "hostint_agent", "doctor"]
NO_RIGHTS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
Findings = dict[str, finding.Finding]


def wrong_usage(capsys, *options: str) -> str:
    """What is said of options that end the command with status 2."""
    with pytest.raises(SystemExit) as ended:
        hostint_agent.main(["doctor", *options])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    return printed.err


def run(*options: object, before=(), **more) -> subprocess.CompletedProcess[str]:
    command = [*before, *COMMAND, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)


def examine(*options: object, before=(), **more) -> Findings:
    """Findings of the whole command by check."""
    ended = run("--json", *options, before=before, **more)
    assert "Traceback" not in ended.stderr
    told = [finding.Finding(**each) for each in json.loads(ended.stdout)]
    assert ended.returncode == int(any(each.result == "failure" for each in told))
    return {each.check: each for each in told}


def is_ok(found: finding.Finding, *words: str) -> None:
    assert found.result == "ok", found
    assert not found.remedy
    assert all(each in found.found for each in words), found


def warns(found: finding.Finding, *words: str) -> None:
    assert found.result == "warning", found
    assert all(each in f"{found.found} -> {found.remedy}" for each in words), found
    assert found.remedy


def fails(found: finding.Finding, *words: str) -> None:
    assert found.result == "failure", found
    assert all(each in f"{found.found} -> {found.remedy}" for each in words), found
    assert found.remedy


# system calls of a child that the kernel refuses: (number, first argument or None, errno)
_REFUSING = textwrap.dedent(
    """
    import ctypes, dataclasses, json, struct, sys
    from hostint_agent.doctor import node_checks
    libc = ctypes.CDLL(None, use_errno=True)
    call, first, code = json.loads(sys.argv[1])
    program = [(0x20, 0, 0, 0), (0x15, 0, 3, call), (0x20, 0, 0, 16), (0x15, 0, 1, first)]
    program += [(6, 0, 0, 0x50000 | code), (6, 0, 0, 0x7FFF0000)]
    text = b"".join(struct.pack("=HBBI", *one) for one in program)
    memory = ctypes.create_string_buffer(text, len(text))
    fprog = struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(memory))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.create_string_buffer(fprog), 0, 0) == 0, ctypes.get_errno()
    found = getattr(node_checks, sys.argv[2])(*sys.argv[3:])
    print(json.dumps(dataclasses.asdict(found)))
    """
)


def refused_bpf(check: str, *arguments: str, command: int) -> finding.Finding:
    """What a check finds where the kernel refuses a command of bpf(2)."""
    refusal = json.dumps([bpf_calls._SYSCALL, command, errno.EINVAL])
    line = [sys.executable, "-c", _REFUSING, refusal, check, *arguments]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return finding.Finding(**json.loads(ended.stdout))


# the kernel


@pytest.mark.parametrize("text", ["6.1.0", "6.1", "6.18.44-fc", "10.0-rc1"])
def test_a_kernel_from_6_1_on_is_new_enough(text):
    is_ok(node_checks.release(text), text)


@pytest.mark.parametrize("text", ["6.0.19", "5.15.0-91-generic", "nonsense"])
def test_an_older_kernel_fails(text):
    fails(node_checks.release(text), f"Linux {text} is older than 6.1", "boot Linux 6.1 or newer")


@pytest.fixture
def vmlinux_btf(monkeypatch, tmp_path) -> Iterator[Callable[[bytes | None], None]]:
    """Give the kernel module other bytes to read as the kernel's BTF; None: no file."""

    def replace(content: bytes | None) -> None:
        path = tmp_path / "vmlinux"
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setattr(kernel, "VMLINUX_BTF", path)
        kernel._types_of_interest.cache_clear()

    yield replace
    kernel._types_of_interest.cache_clear()


def test_this_kernel_has_the_btf_that_the_drop_program_needs():
    is_ok(node_checks.btf(), "/sys/kernel/btf/vmlinux: all 10 struct members", "drop reasons")


_BTF = kernel.VMLINUX_BTF.read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("No such file or directory", "CONFIG_DEBUG_INFO_BTF=y")),
        (b"", ("cannot be understood",)),
        (bytes(64), ("is not BTF",)),
        (_BTF[:1000], ("cannot be understood",)),
        (_BTF[: len(_BTF) // 2], ("vmlinux",)),
        (_BTF.replace(b"\0tc_index\0", b"\0tc_indax\0"), ("struct sk_buff of this kernel has no tc_index",)),
        (_BTF.replace(b"\0nd_net\0", b"\0nd_nat\0"), ("struct net_device of this kernel has no nd_net",)),
        (_BTF.replace(b"\0skb_drop_reason\0", b"\0skb_drop_raisin\0"), ("has no enum skb_drop_reason",)),
    ],
    ids=["none", "empty", "zeros", "cut", "half", "no member", "no member of net_device", "no reasons"],
)  # fmt: skip
def test_btf_that_lacks_something_fails(vmlinux_btf, content, words):
    vmlinux_btf(content)
    fails(node_checks.btf(), *words)


def test_broken_btf_fails_the_drop_tracepoint_and_says_where_to_look(vmlinux_btf):
    for content in (None, b"", bytes(64), _BTF[:1000]):
        vmlinux_btf(content)
        fails(node_checks.drop_tracepoint(), "without BTF", "see the check btf")


@pytest.mark.bpf
def test_programs_of_both_kinds_can_be_loaded_and_become_machine_code():
    is_ok(node_checks.programs())
    is_ok(node_checks.jit(), "machine code")


@pytest.mark.bpf
def test_a_kernel_that_refuses_to_load_programs_fails():
    found = refused_bpf("programs", command=probes._PROG_LOAD)
    fails(found, "load a TC program: Invalid argument", "lockdown=confidentiality")


@pytest.mark.bpf
def test_only_one_of_the_two_kinds_is_not_enough(monkeypatch):
    monkeypatch.setattr(probes, "_PROBE_READ_KERNEL", 9999)
    fails(node_checks.programs(), "load a raw tracepoint program: Invalid argument", "CONFIG_BPF")


def test_programs_that_are_interpreted_are_a_warning():
    warns(node_checks.jit(lambda kind: 0), "interpreted", "net.core.bpf_jit_enable=1")


@pytest.mark.bpf
def test_the_drop_tracepoint_is_there_and_carries_a_reason():
    is_ok(node_checks.drop_tracepoint(), "raw tracepoint kfree_skb")


@pytest.mark.bpf
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("consume_skb", "carries no drop reason"),
        ("kfree_skb_of_nobody", "this kernel has no raw tracepoint kfree_skb_of_nobody"),
    ],
)
def test_a_tracepoint_without_reason_or_none_at_all_fails(monkeypatch, name, words):
    monkeypatch.setattr(attach, "DROP_TRACEPOINT", name)
    fails(node_checks.drop_tracepoint(), words, "boot Linux 6.1 or newer")


@pytest.mark.bpf
def test_a_kernel_with_tcx_uses_it_unless_told_otherwise():
    is_ok(node_checks.tcx("auto"), "attached by it")
    is_ok(node_checks.tcx("tcx"), "attached by it")
    is_ok(node_checks.tcx("clsact"), "clsact is used")


@pytest.mark.bpf
def test_a_kernel_without_tcx_is_a_warning_and_a_failure_for_who_asks_for_it():
    found = {
        mode: refused_bpf("tcx", mode, command=bpf_calls.PROG_QUERY) for mode in ("auto", "tcx")
    }
    warns(found["auto"], "attached by clsact", "boot Linux 6.6 or newer")
    fails(found["tcx"], "--attach asks for", "--attach auto")


@pytest.mark.bpf
def test_maps_can_be_mapped_into_memory():
    is_ok(node_checks.shared_memory())


@pytest.mark.bpf
def test_maps_that_cannot_be_made_fail():
    found = refused_bpf("shared_memory", command=bpf_calls.MAP_CREATE)
    fails(found, "make an array that can be mapped: Invalid argument")


@pytest.mark.bpf
def test_running_programs_can_be_waited_for():
    is_ok(node_checks.grace_period())


def test_where_they_cannot_the_check_says_what_the_kernel_refused():
    def refuse() -> None:
        raise bpf_calls.BpfError(errno.EPERM, "Operation not permitted", "make a map of maps")

    found = list(examination._each("grace period", refuse))
    fails(found[0], "make a map of maps: Operation not permitted", finding.RIGHTS)


# rights

_ALL = (1 << 41) - 1
_HOST_USERS = 0xEFFFFFFD


def status(bits: int) -> str:
    return f"Name:\tx\nCapPrm:\t{_ALL:016x}\nCapEff:\t{bits:016x}\nCapBnd:\t{_ALL:016x}\n"


@pytest.mark.parametrize(
    ("bits", "missing"),
    [
        (0, "CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF"),
        (_ALL & ~(1 << 12), "CAP_NET_ADMIN"),
        (1 << 12 | 1 << 39, "CAP_PERFMON"),
        (1 << 12 | 1 << 38, "CAP_BPF"),
        (1 << 21, "CAP_NET_ADMIN"),
    ],
)
def test_capabilities_that_are_missing_are_named(bits, missing):
    found = node_checks.capabilities(status(bits), _HOST_USERS)
    fails(found, "give the container")
    assert found.found == f"not effective: {missing}"


@pytest.mark.parametrize("bits", [_ALL, 1 << 12 | 1 << 38 | 1 << 39, 1 << 12 | 1 << 21])
def test_capabilities_that_are_enough(bits):
    is_ok(node_checks.capabilities(status(bits), _HOST_USERS), "CAP_BPF")


@pytest.mark.bpf
def test_the_capabilities_of_root_are_enough_and_not_those_of_a_user_namespace():
    is_ok(node_checks.own_capabilities())
    found = examine(before=["unshare", "--user", "--map-root-user"])
    fails(found["capabilities"], "user namespace of its own", "rootless")


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


# the bpffs


@pytest.fixture
def pin_dir() -> Iterator[Path]:
    directory = Path(f"/sys/fs/bpf/hostint-doctor-{os.getpid()}")
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.bpf
def test_a_pin_directory_in_a_bpffs_is_ok_whether_it_is_there_or_not(pin_dir):
    is_ok(node_checks.bpffs(pin_dir), "/sys/fs/bpf is one")
    pin_dir.mkdir()
    is_ok(node_checks.bpffs(pin_dir), f"{pin_dir} is in one")


def test_a_pin_directory_elsewhere_fails(tmp_path):
    found = node_checks.bpffs(tmp_path / "pins")
    fails(found, f"{tmp_path}/pins is not in a bpffs", "choose a --pin-dir below /sys/fs/bpf")


@pytest.mark.bpf
def test_a_bpffs_that_is_not_mounted_fails():
    mounts = ["unshare", "--mount", "sh", "-c", 'umount --all-targets -l /sys/fs/bpf; exec "$@"', "sh"]  # fmt: skip
    found = examine(before=mounts)
    fails(found["bpffs"], "no bpffs is mounted at /sys/fs/bpf", "mount -t bpf bpf /sys/fs/bpf")


@pytest.mark.bpf
def test_a_bpffs_that_cannot_be_written_or_looked_into_fails(pin_dir):
    pin_dir.mkdir(mode=0o755)
    options = ("--bpf-dir", "/none", "--pin-dir")
    found = examine(*options, pin_dir, before=NOBODY)
    fails(found["bpffs"], f"{pin_dir} cannot be written")
    pin_dir.chmod(0o700)
    found = examine(*options, pin_dir / "deeper", before=NOBODY)
    fails(found["bpffs"], "Permission denied", "as root")
    fails(found["datapath"], "Permission denied", "as root")
    is_ok(found["network namespace"], "the host's")
    is_ok(found["interfaces"], "to watch")


@pytest.mark.bpf
def test_a_bpffs_that_is_mounted_read_only_fails():
    mounts = ["unshare", "--mount", "sh", "-c", 'mount -o remount,bind,ro /sys/fs/bpf; exec "$@"', "sh"]  # fmt: skip
    fails(examine(before=mounts)["bpffs"], "/sys/fs/bpf cannot be written", "mount it writable")


# the compiler


def test_the_compiler_finds_all_headers():
    is_ok(node_checks.compiler(loader.default_bpf_dir()), "bcc 0.")


def test_the_compiler_looks_where_the_loader_has_it_look():
    directory = Path("/somewhere")
    assert node_checks.header_flags(directory) == loader._header_flags(directory)


def test_a_machine_without_bcc_fails(tmp_path, monkeypatch):
    (tmp_path / "bcc.py").write_text("raise ModuleNotFoundError(\"No module named 'bcc'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = node_checks.compiler(loader.default_bpf_dir())
    fails(found, "No module named 'bcc'", "install python3-bpfcc")


def test_a_bcc_without_its_library_fails(tmp_path, monkeypatch):
    (tmp_path / "bcc.py").write_text('raise OSError("libbcc.so.0: cannot open shared object file")')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = node_checks.compiler(loader.default_bpf_dir())
    fails(found, "libbcc.so.0: cannot open shared object file", "python3-bpfcc")


def test_a_bcc_that_dies_without_a_word_fails(tmp_path, monkeypatch):
    (tmp_path / "bcc.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fails(node_checks.compiler(loader.default_bpf_dir()), "ended with -9")


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of the sources, to be changed."""
    return Path(shutil.copytree(loader.default_bpf_dir(), tmp_path / "bpf"))


def test_a_header_that_is_missing_is_named(sources):
    main = sources / loader.MAIN_SOURCE
    main.write_text(f"#include <linux/of_nobody.h>\n{main.read_text()}")
    found = node_checks.compiler(sources)
    fails(found, "'linux/of_nobody.h' file not found", "install linux-libc-dev")


@pytest.mark.bpf
def test_a_machine_without_the_kernels_headers_fails():
    """Where /usr/include has nothing of linux-libc-dev."""
    empty = 'mount -t tmpfs none /usr/include; exec "$@"'
    found = examine(before=["unshare", "--mount", "sh", "-c", empty, "sh"])
    fails(found["compiler"], "file not found", "install linux-libc-dev")


def test_sources_that_are_missing_fail(sources):
    shutil.rmtree(sources / "headers")
    fails(node_checks.compiler(sources), f"{sources}/headers is missing", "--bpf-dir")
    (sources / "types.h").unlink()
    fails(node_checks.compiler(sources), "types.h: No such file or directory", "--bpf-dir")


# the network namespace and the datapath


@pytest.mark.bpf
def test_the_network_namespace_of_the_host_is_told_from_others(near):
    is_ok(datapath_checks.network_namespace(None), "the host's")
    found = near.inside(lambda: datapath_checks.network_namespace(None))
    warns(found, "not the host's", "hostNetwork: true")


@pytest.fixture(scope="module")
def pins() -> Iterator[Path]:
    """A pin directory with a datapath that is loaded, enabled, and attached nowhere."""
    directory = Path(f"/sys/fs/bpf/hostint-doctor-loaded-{os.getpid()}")
    directory.mkdir()
    try:
        build = loader.load(directory)
        kernel.DatapathConfig(build / "maps").set_enabled(True)
        yield directory
    finally:
        shutil.rmtree(directory)


@contextlib.contextmanager
def attached(near: Namespace, pins: Path, mode: attach.Mode = "tcx") -> Iterator[None]:
    """Everything attached as an agent leaves it."""

    def attacher() -> attach.Attacher:
        return attach.Attacher(
            pins, loader.current(pins), patterns=interfaces.Patterns(), mode=mode, on_change=print
        )

    made = near.inside(attacher)
    near.inside(made.start)
    made.stop()
    try:
        yield
    finally:
        shutil.rmtree(pins / "links")
        near.inside(clsact.remove_all)


def look(near: Namespace, pins: Path, *options: str) -> Findings:
    """What there is to say of the datapath and where it is attached, by a thread in the namespace."""
    parser = argparse.ArgumentParser()
    doctor.add_options(parser, {})
    chosen = settings.from_options(parser.parse_args(["--pin-dir", str(pins), *options]))
    return {each.check: each for each in near.inside(lambda: list(examination._datapath(chosen)))}


@pytest.fixture
def near() -> Iterator[Namespace]:
    with cable() as (end, _):
        yield end


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
        fails(look(near, pins)["interface eth0"], "our program is not attached on egress")


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
    assert datapath_checks._listed(names).endswith("veth8, veth9 and 2 more")
    assert datapath_checks._listed(names[:10]).endswith("veth8, veth9")


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


# collectors


def reached(near: Namespace, text: str, tmp_path: Path) -> finding.Finding:
    given = [doctor.parse_collector(text)]
    found = the_one(near.inside(lambda: collector_checks.check(given, tmp_path, "a")))
    assert found.check == f"collector {text}"
    return found


def the_one(findings: list[finding.Finding]) -> finding.Finding:
    assert len(findings) == 1
    return findings[0]


@pytest.mark.lab
def test_a_collector_is_reached_over_an_interface_from_an_address(near, tmp_path):
    is_ok(
        reached(near, f"{FAR}:32766", tmp_path),
        f"{FAR}:32766 over eth0 from 10.98.0.1, MTU 1500, needed are 220",
    )
    is_ok(
        reached(near, f"[{FAR6}]:32766", tmp_path),
        f"[{FAR6}]:32766 over eth0 from fd98::1, MTU 1500, needed are 240",
    )


@pytest.mark.lab
@pytest.mark.parametrize("text", ["192.0.2.9:5000", "[2001:db8::9]:5000"])
def test_a_collector_without_a_route_fails_and_is_named(near, tmp_path, text):
    found = reached(near, text, tmp_path)
    fails(found, f"{text}: Network is unreachable", "add a route to")
    ip(
        f"-n {near.name} route add prohibit 192.0.2.0/24",
        f"-n {near.name} route add blackhole 2001:db8::/32",
    )
    fails(reached(near, text, tmp_path), text, "add a route to")


@pytest.mark.lab
def test_a_small_mtu_of_the_interface_or_of_the_path_is_a_warning(near, tmp_path):
    ip(f"-n {near.name} route add 203.0.113.0/24 via {FAR} mtu lock 219")
    found = reached(near, "203.0.113.9:5000", tmp_path)
    warns(found, "MTU 219: the biggest report is a packet of 220 bytes", "eth0", "snapLength")
    ip(f"-n {near.name} link set eth0 mtu 220")
    is_ok(reached(near, f"{FAR}:5000", tmp_path), "MTU 220")
    ip(f"-n {near.name} link set eth0 mtu 219")
    warns(reached(near, f"{FAR}:5000", tmp_path), "MTU 219", "in fragments")


@pytest.mark.parametrize(("address", "needed"), [("192.0.2.9", 220), ("2001:db8::9", 240)])
def test_what_is_needed_is_a_report_and_its_headers(address, needed):
    destination = node_rules.Destination("a", address, 5000, 0)
    way = lambda mtu: collector_checks.Way("eth0", "source", mtu)  # noqa: E731
    is_ok(collector_checks.fits(destination, address, way(needed)))
    warns(collector_checks.fits(destination, address, way(needed - 1)), str(needed))


@pytest.mark.lab
def test_a_name_that_cannot_be_looked_up_fails(near, tmp_path):
    text = "collector.invalid:5000"
    fails(reached(near, text, tmp_path), "collector.invalid: ", "correct the name")
    fails(reached(near, f"{'a' * 70}:1", tmp_path), "label too long", "correct the name")
    is_ok(reached(near, "localhost:5000", tmp_path), "over lo from")


def keep(directory: Path, node: str, *addresses: str) -> None:
    collectors = [
        {"name": f"of-{address[:3]}", "address": address, "port": 5000, "dscp": 46}
        | {"format": "TelemetryReportV05", "snapLength": 128, "reportsPerSecond": 0}
        for address in addresses
    ]
    spec = NodeConfigSpec.model_validate({"nodeID": 1, "collectors": collectors})
    nothing = node_rules.Indexes()
    last_good.save(directory, node, last_good.LastGood(spec, 1, nothing, nothing))


@pytest.mark.lab
def test_collectors_of_the_last_configuration_are_looked_at_unless_others_are_given(near, tmp_path):
    keep(tmp_path, "node-1", FAR, "192.0.2.9", FAR6)
    options = ("--state-dir", tmp_path, "--node", "node-1")
    found = examine(*options, before=near.command())
    is_ok(found["collector of-10."], f"{FAR}:5000 over eth0")
    is_ok(found["collector of-fd9"], f"[{FAR6}]:5000 over eth0")
    fails(found["collector of-192"], "192.0.2.9:5000: Network is unreachable")
    found = examine(*options, "--collector", "127.0.0.1:1", before=near.command())
    assert [check for check in found if check.startswith("collector")] == ["collector 127.0.0.1:1"]


def test_where_no_collector_is_known_it_is_told_why(tmp_path):
    check = lambda node: the_one(collector_checks.check([], tmp_path, node))  # noqa: E731
    warns(check("a"), f"none is known: {tmp_path} keeps no configuration of node a", "--collector")
    keep(tmp_path, "a")
    warns(check("a"), "the last configuration of node a has none")
    warns(check("b"), "no usable configuration of node b, but last-good-a.json", "--node")
    (tmp_path / "last-good-b.json").write_text("{")
    warns(check("b"), "no usable configuration of node b, but")
    warns(the_one(collector_checks.check([], tmp_path / "none", "a")), "none is known")


@pytest.mark.bpf
def test_a_state_directory_that_may_not_be_read_is_a_failure(tmp_path):
    tmp_path.chmod(0o700)
    found = examine("--state-dir", tmp_path, before=NOBODY)
    fails(found["collectors"], f"{tmp_path}: Permission denied", "run doctor as root")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("192.0.2.9:1", "192.0.2.9", 1), ("[fd00::9]:65535", "fd00::9", 65535), ("a.b:5", "a.b", 5)],
)
def test_a_collector_is_named_by_host_and_port(text, host, port):
    parsed = doctor.parse_collector(text)
    assert (parsed.name, parsed.address, parsed.port) == (text, host, port)


@pytest.mark.parametrize(
    "text", ["", "a", "a:", ":5", "a:0", "a:65536", "a:-1", "a:b", "fd00::9:5"]
)
def test_what_is_no_host_and_port_is_wrong_usage(text, capsys):
    assert f"'{text}' is not HOST:PORT" in wrong_usage(capsys, f"--collector={text}")


# the address of the agent's HTTP server


@contextlib.contextmanager
def listening(content: bytes | None) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if content is None:
                self.wfile.write(b"220 this speaks another protocol\r\n")
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content if self.path == "/api/v1/topology" else b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_address_that_is_free_or_not_wanted_is_ok():
    port = free_port()
    is_ok(http_checks.address(("127.0.0.1", port)), f"127.0.0.1:{port} is free")
    is_ok(http_checks.address(None), "switched off")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_an_address_where_an_agent_answers_is_ok(host):
    port = free_port()
    fine = lambda: None  # noqa: E731
    document = lambda: topology.document("node-1", 1, attach.State())  # noqa: E731
    with agent_http.serve(
        (host, port), metrics=list, not_alive=fine, not_ready=fine, topology=document
    ):
        found = http_checks.address((host, port))
    is_ok(found, "the agent of node node-1 answers at", f":{port}")


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b"{}", b"\xff", None])
def test_an_address_that_another_program_has_is_a_failure(content):
    with listening(content) as port:
        found = http_checks.address(("0.0.0.0", port))
    fails(found, f"0.0.0.0:{port} is in use, and not by an agent", "HOSTINT_HTTP")


def test_an_address_that_is_not_of_this_host_is_a_failure():
    fails(http_checks.address(("192.0.2.77", 9464)), "Cannot assign requested address", "--http")
    fails(http_checks.address(("collector.invalid", 9464)), "collector.invalid:9464: ", "--http")


# the whole


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


_TOLD = [
    finding.ok("kernel", "Linux 6.18"),
    finding.warning("tcx", "none", "boot another"),
    finding.failure("drop tracepoint", "none", "boot yet another"),
    finding.failure("rings", "none", "boot"),
]


def test_the_text_has_a_line_each_and_what_to_do_on_a_second():
    assert doctor.as_text(_TOLD, colours=False).splitlines() == [
        "ok       kernel           Linux 6.18",
        "warning  tcx              none",
        "         do: boot another",
        "failure  drop tracepoint  none",
        "         do: boot yet another",
        "failure  rings            none",
        "         do: boot",
        "1 ok, 1 warning, 2 failures",
    ]
    assert doctor.as_text(_TOLD[:1], colours=False).splitlines()[-1] == "1 ok"


def test_colours_change_nothing_else():
    text = doctor.as_text(_TOLD, colours=True)
    for code in ("32", "33", "31"):
        assert f"\x1b[{code}m" in text
        text = text.replace(f"\x1b[{code}m", "")
    assert text.replace("\x1b[0m", "") == doctor.as_text(_TOLD, colours=False)


def test_json_is_an_array_of_objects_with_four_keys():
    told = json.loads(doctor.as_json(_TOLD))
    assert told[0] == {"check": "kernel", "result": "ok", "found": "Linux 6.18", "remedy": ""}
    assert [each["result"] for each in told] == ["ok", "warning", "failure", "failure"]


def on_a_terminal(*options: object, **variables: str) -> str:
    """What it prints on a terminal."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | variables
    process = subprocess.Popen(
        [*COMMAND, *map(str, options)], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 65536):
            printed += part
    os.close(ours)
    process.wait(60)
    return printed.decode()


@pytest.mark.parametrize(
    ("terminal", "variables", "wanted"),
    [(True, {}, True), (True, {"NO_COLOR": ""}, True), (True, {"NO_COLOR": "1"}, False), (False, {}, False)],
)  # fmt: skip
def test_colours_are_for_terminals_and_not_for_who_wants_none(terminal, variables, wanted):
    assert doctor.wants_colours(terminal, variables) is wanted


@pytest.mark.bpf
def test_a_terminal_gets_colours():
    assert "\x1b[32mok     \x1b[0m  kernel" in on_a_terminal("--bpf-dir", "/none")
    assert "\x1b" not in on_a_terminal("--bpf-dir", "/none", NO_COLOR="1")
    assert "\x1b" not in run("--bpf-dir", "/none").stdout


@pytest.mark.bpf
def test_warnings_end_with_0_and_a_failure_with_1(tmp_path):
    options = ("--state-dir", tmp_path, "--http", "none")
    ended = run(*options)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1].endswith(" ok, 1 warning")
    ended = run(*options, "--bpf-dir", tmp_path)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert ended.stdout.splitlines()[-1].endswith(" ok, 1 warning, 1 failure")


@pytest.mark.parametrize("option", ["--nonsense", "--attach=xdp", "--collector=x", "file"])
def test_wrong_usage_ends_with_2(option, capsys):
    assert "usage: hostint-agent" in wrong_usage(capsys, option)


@pytest.mark.lab
def test_any_name_of_an_interface_can_be_printed(near, pin_dir):
    name = b"e\xff\x1b[31m"
    command = [b"nsenter", f"--net={near.path}".encode()]
    subprocess.run([*command, b"ip", b"link", b"set", b"eth0", b"down"], check=True)
    subprocess.run([*command, b"ip", b"link", b"set", b"eth0", b"name", name], check=True)
    assert json.loads(run("--json", "--pin-dir", pin_dir, before=near.command()).stdout)
    ended = run("--pin-dir", pin_dir, before=near.command())
    assert "Traceback" not in ended.stderr
    assert r"1 to watch: e\udcff\x1b[31m (pod)" in ended.stdout


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
        near.inside(lambda: datapath_checks.attachments(interfaces.Patterns(), loaded))
        destination = doctor.parse_collector(f"{FAR}:1")
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


def test_an_agent_does_not_pay_for_the_checks_with_its_memory():
    code = "import sys; from hostint_agent import __main__; print('examination' in str([*sys.modules]))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"
