# SPDX-License-Identifier: Apache-2.0
"""Checks of the kernel, the rights, the bpffs and the compiler: each is seen to pass, and to fail for the reason that it names."""

import errno
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

import pytest

from hostint_agent import attach, bpf_calls, kernel, loader
from hostint_agent.doctor import examination, finding, node_checks, probes
from tests.agent.doctor.findings import examine, fails, is_ok, warns
from tests.agent.nobody import NOBODY

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
        (_BTF.replace(b"\0mac_header\0", b"\0mac_haeder\0"), ("struct sk_buff of this kernel has no mac_header",)),
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
    found = refused_bpf("programs", command=bpf_calls.PROG_LOAD)
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


# the bpffs


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
