# SPDX-License-Identifier: Apache-2.0
"""Checks of `hostint-agent doctor` that concern the kernel, the process's rights and the machine. Each returns what it found."""

import errno
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hostint_agent import attach, bpf_calls, bpf_filesystem, kernel, loader
from hostint_agent.doctor import finding, probes
from hostint_agent.doctor.finding import Finding

_OLDEST_KERNEL = (6, 1)
_DROP_REASON_ARGUMENT = 2
# bits of CapEff in linux/capability.h; CAP_SYS_ADMIN stands for those that were once part of it
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_PERFMON": 38, "CAP_BPF": 39}
_SYS_ADMIN, _PART_OF_SYS_ADMIN = 21, frozenset({"CAP_PERFMON", "CAP_BPF"})
# PROC_USER_INIT_INO of linux/proc_ns.h: where bpf(2) looks for capabilities
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD
_INCLUDE = re.compile(r"^\s*#\s*include\s+<.*>", re.MULTILINE)
_COMPILE = (
    "import sys, bcc; bcc.BPF(text=sys.stdin.read(), cflags=sys.argv[1:]); print(bcc.__version__)"
)
_COMPILE_TIMEOUT_S = 60
# what reading BTF may raise where bytes of it are missing or are others
_BAD_BTF = (OSError, kernel.KernelError, struct.error, IndexError, ValueError, RecursionError)


def release(text: str) -> Finding:
    """Judge a kernel release as uname tells it."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    oldest = ".".join(map(str, _OLDEST_KERNEL))
    if version < _OLDEST_KERNEL:
        return finding.failure(
            "kernel", f"Linux {text} is older than {oldest}", f"boot Linux {oldest} or newer"
        )
    return finding.ok("kernel", f"Linux {text}, needed is {oldest} or newer")


def btf() -> Finding:
    """The kernel's type information has every struct member that the drop program reads, and the drop reasons' names."""
    try:
        offsets = kernel.offsets()
        names = kernel.drop_reason_names()
    except kernel.KernelError as error:
        return finding.failure(
            "btf", str(error), "boot a kernel of the distribution, with CONFIG_DEBUG_INFO_BTF=y"
        )
    except _BAD_BTF as error:
        return finding.failure(
            "btf",
            f"{kernel.VMLINUX_BTF} cannot be understood: {error}",
            "boot a kernel of the distribution; if this is one, report it with its release",
        )
    if not names:
        return finding.failure(
            "btf", "this kernel has no enum skb_drop_reason", "boot Linux 6.1 or newer"
        )
    members = len(type(offsets).__dataclass_fields__)
    return finding.ok(
        "btf", f"{kernel.VMLINUX_BTF}: all {members} struct members, {len(names)} drop reasons"
    )


def programs() -> Finding:
    """A program of each kind that the datapath has can be loaded; the drop program reads kernel memory."""
    try:
        probes.load("TC")
        probes.load("cgroup")
        probes.load("raw tracepoint")
    except bpf_calls.BpfError as error:
        remedy = (
            finding.RIGHTS
            if error.errno == errno.EPERM
            else "needed are CONFIG_BPF_SYSCALL, CONFIG_NET_CLS_BPF, CONFIG_CGROUP_BPF and CONFIG_BPF_EVENTS, and no lockdown=confidentiality"
        )
        return finding.failure("programs", _told(error), remedy)
    return finding.ok("programs", "TC, cgroup and raw tracepoint programs can be loaded")


def jit(machine_code: Callable[[probes.Kind], int] = probes.load) -> Finding:
    """Programs become machine code. `machine_code` loads one and says how many bytes that were."""
    try:
        size = machine_code("TC")
    except bpf_calls.BpfError as error:
        return finding.failure("bpf jit", _told(error), finding.RIGHTS)
    if not size:
        return finding.warning(
            "bpf jit",
            "programs are interpreted, which costs several times as much a packet",
            "sysctl -w net.core.bpf_jit_enable=1; the agent's programs have to be loaded again then",
        )
    return finding.ok("bpf jit", "programs become machine code")


def drop_tracepoint() -> Finding:
    """The raw tracepoint of drops exists and carries the reason."""
    check, name = "drop tracepoint", attach.DROP_TRACEPOINT
    newer = "boot Linux 6.1 or newer with CONFIG_TRACEPOINTS and CONFIG_BPF_EVENTS"
    try:
        probes.tracepoint(name, _DROP_REASON_ARGUMENT)
    except bpf_calls.BpfError as error:
        if error.errno == errno.EPERM:
            return finding.failure(check, _told(error), finding.RIGHTS)
        if error.errno == errno.ENOENT:
            return finding.failure(check, f"this kernel has no raw tracepoint {name}", newer)
        words = f"raw tracepoint {name} carries no drop reason ({error.strerror})"
        return finding.failure(check, words, newer)
    except _BAD_BTF as error:
        return finding.failure(check, f"not found without BTF: {error}", "see the check btf")
    return finding.ok(check, f"raw tracepoint {name} is there and carries a reason")


def tcx(mode: attach.Mode) -> Finding:
    """How programs are attached here: by TCX, or by clsact where the kernel has none."""
    try:
        kernel.ask_for_tcx()
    except OSError as error:
        if error.errno == errno.EPERM:
            return finding.failure("tcx", _told(error), finding.RIGHTS)
        if mode == "tcx":
            remedy = "choose --attach auto, or boot Linux 6.6 or newer"
            return finding.failure("tcx", "this kernel has no TCX, which --attach asks for", remedy)
        return finding.warning(
            "tcx",
            "this kernel has no TCX: programs are attached by clsact",
            "boot Linux 6.6 or newer, so that ours stay first and attaching never stops a device for a moment",
        )
    if mode == "clsact":
        return finding.ok("tcx", "this kernel has it, clsact is used as --attach says")
    return finding.ok("tcx", "this kernel has it, programs are attached by it")


def shared_memory(probe: Callable[[], None] = probes.shared_memory) -> Finding:
    """Rings can be mapped into the agent."""
    try:
        probe()
    except OSError as error:
        remedy = finding.RIGHTS if error.errno == errno.EPERM else "boot Linux 6.1 or newer"
        return finding.failure("rings", _told(error), remedy)
    return finding.ok("rings", "maps can be mapped into the agent's memory")


def bpffs(pin_dir: Path) -> Finding:
    """The pin directory is, or would be made, in a bpffs that can be written."""
    try:
        base = bpf_filesystem.existing(pin_dir.absolute())
        is_bpffs = bpf_filesystem.holds(base)
    except OSError as error:
        return finding.failure("bpffs", f"{pin_dir}: {error.strerror}", finding.RIGHTS)
    if not is_bpffs and bpf_filesystem.MOUNT_POINT in (pin_dir, *pin_dir.parents):
        return finding.failure(
            "bpffs",
            f"no bpffs is mounted at {bpf_filesystem.MOUNT_POINT}",
            f"mount -t bpf bpf {bpf_filesystem.MOUNT_POINT}; in a container, mount the host's {bpf_filesystem.MOUNT_POINT}",
        )
    if not is_bpffs:
        remedy = f"choose a --pin-dir below {bpf_filesystem.MOUNT_POINT}"
        return finding.failure("bpffs", f"{pin_dir} is not in a bpffs", remedy)
    if not os.access(base, os.W_OK | os.X_OK, effective_ids=True):
        remedy = "run doctor as root; in a container, mount it writable"
        return finding.failure("bpffs", f"{base} cannot be written", remedy)
    return finding.ok("bpffs", f"{pin_dir} is in one" if base == pin_dir else f"{base} is one")


def capabilities(status: str, user_namespace: int) -> Finding:
    """Judge /proc/self/status and the inode number of /proc/self/ns/user."""
    line = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    bits = int(line[1], 16) if line else 0
    has_admin = bits >> _SYS_ADMIN & 1
    missing = [
        name
        for name, bit in _CAPABILITIES.items()
        if not bits >> bit & 1 and not (has_admin and name in _PART_OF_SYS_ADMIN)
    ]
    if missing:
        remedy = "run as root, or give the container (or the service) these capabilities"
        return finding.failure("capabilities", f"not effective: {', '.join(missing)}", remedy)
    if user_namespace != _INITIAL_USER_NAMESPACE:
        return finding.failure(
            "capabilities",
            "this is a user namespace of its own, whose capabilities do not count for bpf(2)",
            "run it in the host's user namespace (not rootless, without user namespace remapping)",
        )
    return finding.ok("capabilities", f"{', '.join(_CAPABILITIES)} are effective")


def own_capabilities() -> Finding:
    """Look at this process. Raises OSError."""
    status = Path("/proc/self/status").read_text()
    return capabilities(status, Path("/proc/self/ns/user").stat().st_ino)


def compiler(bpf_dir: Path) -> Finding:
    """bcc compiles all headers that the sources include, in a child process: this one never maps LLVM."""
    headers = bpf_dir / "headers"
    choose = "choose the directory of the sources with --bpf-dir (env HOSTINT_BPF_DIR)"
    try:
        text = "\n".join(_INCLUDE.findall(loader.read_source(bpf_dir).text))
    except loader.LoadError as error:
        return finding.failure("compiler", str(error), choose)
    if not headers.is_dir():
        # bcc would look for a kernel's, and load a module to find them
        return finding.failure("compiler", f"bpf sources: {headers} is missing", choose)
    try:
        child = subprocess.run(  # noqa: S603 (our own program)
            [sys.executable, "-c", _COMPILE, *loader.header_flags(bpf_dir)],
            input=text + "\n",
            capture_output=True,
            text=True,
            timeout=_COMPILE_TIMEOUT_S,
            check=False,
            env={**os.environ, "BCC_KERNEL_SOURCE": str(headers)},
        )
    except subprocess.TimeoutExpired:
        words = f"bcc did not finish within {_COMPILE_TIMEOUT_S} s"
        return finding.failure("compiler", words, "give this machine (or container) more CPU")
    if child.returncode:
        return compiler_trouble(child.stderr, child.returncode)
    return finding.ok("compiler", f"bcc {child.stdout.strip()} finds all headers")


def compiler_trouble(said: str, status: int) -> Finding:
    """What the compiler's standard error means."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line] or lines[-1:] or [f"ended with {status}"]
    if "No module named 'bcc" in told[0]:
        remedy = "install python3-bpfcc; a virtual environment is made with --system-site-packages"
    elif "file not found" in told[0]:
        remedy = "install linux-libc-dev, for headers of the kernel below /usr/include"
    else:
        remedy = "install the distribution's python3-bpfcc and linux-libc-dev again"
    return finding.failure("compiler", f"bcc: {told[0]}", remedy)


def grace_period() -> Finding:
    """The agent can wait for running programs to end, which it does before it writes a table again. Raises OSError."""
    bpf_calls.wait_for_programs()
    return finding.ok("grace period", "running programs can be waited for")


def _told(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
