# SPDX-License-Identifier: Apache-2.0
"""Compile the datapath with bcc, load it, pin it, exit. The only module that knows bcc; it runs as two processes of its own.

Pins: `PIN/<build>/maps/<map>`, `PIN/<build>/programs/<program>`. Attaching is `attach`'s business. A build is made and removed under
another name, `PIN/<build>-partial`: whoever is killed at whatever moment, `PIN/<build>` is whole or not there.

The first half of a build's name says what its maps are like. Where a build is pinned whose half is the same, the programs of another
one are loaded with its maps, which are then pinned in both places: nothing that is in them is lost by an upgrade, or by the way back.
"""

import argparse
import ctypes
import dataclasses
import errno
import functools
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path

from hostint_agent import bpf_calls

PROGRAMS = ("ingress", "egress", "deliver", "local_in", "drop")
_ACCEPT = bpf_calls.return_instructions(1)
# (type, attach type) of enum bpf_prog_type and enum bpf_attach_type; TC programs are all others
_TC_KIND, _KINDS = (3, -1), {"drop": (17, -1), "deliver": (8, 0), "local_in": (32, 45)}
MAIN_SOURCE = "int_host.c"
_BUILD = re.compile(r"[0-9a-f]{16}")
_LAYOUT_DIGITS = 8
_PARTIAL = "-partial"
_MAP = re.compile(r"^PINNED_\w+\((\w+),", re.MULTILINE)
# a text of at most 7 characters, which the loader puts into the map before it freezes it
_CONSTANT = re.compile(r'^PINNED_CONSTANT\((\w+), "(.{1,7})"\);$', re.MULTILINE)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([\w.]+)"\s*$')
_MAX_RING_RECORDS = 16384
_MIN_RING_RECORDS = 512
_RING_RECORDS_TOTAL = 65536
_LOAD_TIMEOUT_S = 120
_PR_SET_PDEATHSIG = 1

# bcc rewrites map access by these declarations, and makes the maps; those that another build's stand in for are made small
_PRELUDE = """
/*
 * bcc puts bpf_probe_read in its place where /proc/kallsyms does not show it, as to a process without CAP_SYSLOG, and
 * cgroup programs may not call that.
 */
#undef bpf_probe_read_kernel
#ifdef MAPS_ARE_THERE
#define ENTRIES(n) 1
#else
#define ENTRIES(n) n
#endif
#define PINNED_ARRAY(name, leaf, n) BPF_F_TABLE("array", u32, leaf, name, ENTRIES(n), 0)
#define PINNED_MMAPABLE(name, leaf, n) BPF_F_TABLE("array", u32, leaf, name, ENTRIES(n), 1024)
#define PINNED_PERCPU_ARRAY(name, leaf, n) BPF_F_TABLE("percpu_array", u32, leaf, name, ENTRIES(n), 0)
#define PINNED_HASH(name, key, leaf, n) BPF_F_TABLE("hash", key, leaf, name, ENTRIES(n), 0)
#define PINNED_PERCPU_HASH(name, key, leaf, n) \\
	BPF_F_TABLE("percpu_hash", key, leaf, name, ENTRIES(n), 0)
#define PINNED_CONSTANT(name, text) BPF_F_TABLE("array", u32, u64, name, 1, BPF_F_RDONLY_PROG)
#define PINNED_RINGBUF(name, pages) BPF_RINGBUF_OUTPUT(name, pages)
"""
# in the style of our sources: the body of a function is between a line that is "{" and one that is "}"
_FUNCTION = re.compile(r"^\w[^#;{}]*\)\n\{\n.*?^\}$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|^#line [^\n]*", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True, slots=True)
class _Programs:
    """Some of the programs, and the define that leaves out the others."""

    programs: tuple[str, ...]
    define: str


# compiled side by side; the first makes the maps, and is ready sooner
_HALVES = (
    _Programs(("drop", "deliver", "local_in"), "-DWITHOUT_TC"),
    _Programs(("egress", "ingress"), "-DWITHOUT_OTHERS"),
)


class LoadError(Exception):
    """The datapath could not be compiled, loaded or pinned; the text says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """The program text with our own headers inlined, and what identifies it."""

    text: str
    defines: tuple[str, ...]
    build: str

    @property
    def maps(self) -> frozenset[str]:
        """Names of the maps that it declares."""
        return frozenset(_MAP.findall(self.text))

    @property
    def constants(self) -> dict[str, bytes]:
        """Contents of the maps that never change, by name."""
        return {name: text.encode().ljust(8, b"\0") for name, text in _CONSTANT.findall(self.text)}


def default_bpf_dir() -> Path:
    """Where the C sources are: beside the package in a checkout, else where the image keeps them."""
    checkout = Path(__file__).resolve().parents[2] / "bpf"
    return checkout if (checkout / MAIN_SOURCE).exists() else Path("/usr/share/hostint/bpf")


def _inline(path: Path, seen: set[Path]) -> list[str]:
    if path in seen:
        return []
    seen.add(path)
    lines = [f'#line 1 "{path.name}"']
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        include = _INCLUDE.match(line)
        if include:
            lines += _inline(path.parent / include[1], seen)
            lines.append(f'#line {number + 1} "{path.name}"')
        elif line.strip() != "#pragma once":
            lines.append(line)
    return lines


def ring_records(cpus: int) -> int:
    """Records of one ring: a power of two, so that all rings together stay near 65,536."""
    share = max(_MIN_RING_RECORDS, min(_MAX_RING_RECORDS, _RING_RECORDS_TOTAL // cpus))
    return 1 << (share.bit_length() - 1)


def read_source(bpf_dir: Path, cpus: int | None = None) -> Source:
    """Read the C sources. bcc rewrites map access in one buffer only, so our own headers become part of it.

    Raises LoadError when a file is missing.
    """
    cpus = cpus or bpf_calls.possible_cpus()
    rings = 2 * cpus
    records = ring_records(cpus)
    defines = (
        f"-DNR_CPUS={1 << (cpus - 1).bit_length()}",
        f"-DNR_RINGS={rings}",
        f"-DRING_RECORDS={records}",
        f"-DNR_RECORDS={rings * records}",
        *(("-DSTORES_ARE_ORDERED",) if platform.machine() == "x86_64" else ()),
    )
    try:
        text = "\n".join(_inline(bpf_dir / MAIN_SOURCE, set()))
    except OSError as error:
        raise LoadError(f"bpf sources: {error.filename}: {error.strerror}") from error
    made_with = [*defines, _PRELUDE]
    layout = _digest(" ".join(_FUNCTION.sub("", _COMMENT.sub("", text)).split()), *made_with)
    build = layout[:_LAYOUT_DIGITS] + _digest(text, *made_with)[_LAYOUT_DIGITS:]
    return Source(text=text, defines=defines, build=build)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def have_same_maps(one: Path, other: Path) -> bool:
    """True if the maps of two builds are alike; both pin the same ones then."""
    return one.name[:_LAYOUT_DIGITS] == other.name[:_LAYOUT_DIGITS]


def _to_take_over(pin_dir: Path, directory: Path, source: Source) -> Path | None:
    """The pinned maps that a new build goes on with, if another one left all that it needs."""
    for other in builds(pin_dir):
        maps = other / "maps"
        if have_same_maps(other, directory) and all((maps / n).exists() for n in source.maps):
            return maps
    return None


def current(pin_dir: Path, bpf_dir: Path | None = None) -> Path:
    """The pin directory of these sources: `PIN/<build>`. It exists once `load` has returned."""
    return pin_dir / read_source(bpf_dir or default_bpf_dir()).build


def _is_loaded(directory: Path, source: Source) -> bool:
    """True if `directory` holds every program and map: somebody may have removed some of them by hand."""
    return all((directory / "programs" / name).exists() for name in programs()) and all(
        (directory / "maps" / name).exists() for name in source.maps
    )


@functools.cache
def programs() -> tuple[str, ...]:
    """Names of the programs that this kernel can load: netfilter programs came with Linux 6.4."""
    kind, attach_type = _KINDS["local_in"]
    try:
        os.close(bpf_calls.prog_load(kind, _ACCEPT, "load a netfilter program", attach_type))
    except bpf_calls.BpfError as error:
        if error.errno == errno.EINVAL:
            return tuple(name for name in PROGRAMS if name != "local_in")
    return PROGRAMS


def builds(pin_dir: Path) -> list[Path]:
    """Directories of pinned programs and maps that are ours: a pin directory may hold what is somebody else's."""
    if not pin_dir.is_dir():
        return []
    return sorted(
        path for path in pin_dir.iterdir() if _BUILD.fullmatch(path.name) and path.is_dir()
    )


def remove(build: Path) -> None:
    """Unpin a build. Raises OSError."""
    remains = _partial(build)
    shutil.rmtree(remains, ignore_errors=True)
    build.rename(remains)
    shutil.rmtree(remains)


def remove_remains(pin_dir: Path) -> list[Path]:
    """Remove what a process that was killed had begun to pin or to unpin; what there was. Raises OSError."""
    if not pin_dir.is_dir():
        return []
    found = [
        path
        for path in sorted(pin_dir.iterdir())
        if path.name.endswith(_PARTIAL) and _BUILD.fullmatch(path.name.removesuffix(_PARTIAL))
    ]
    for path in found:
        shutil.rmtree(path)
    return found


def _partial(build: Path) -> Path:
    return build.with_name(build.name + _PARTIAL)


def load(pin_dir: Path, bpf_dir: Path | None = None) -> Path:
    """Make sure that the programs of these sources are pinned; returns `PIN/<build>`.

    Does nothing if they are. Otherwise a child process compiles and loads them, so that this process never maps LLVM.
    Raises LoadError.
    """
    bpf_dir = bpf_dir or default_bpf_dir()
    source = read_source(bpf_dir)
    directory = pin_dir / source.build
    remove_remains(pin_dir)
    if _is_loaded(directory, source):
        return directory
    if directory.exists():
        remove(directory)  # some of it is missing
    command = [sys.executable, "-m", "hostint_agent.loader"]
    command += ["--pin-dir", str(pin_dir), "--bpf-dir", str(bpf_dir), "--parent", str(os.getpid())]
    try:
        child = subprocess.run(  # noqa: S603 (our own module, our own arguments)
            command,
            capture_output=True,
            text=True,
            timeout=_LOAD_TIMEOUT_S,
            check=False,
            close_fds=False,  # it takes part in the lock of the pin directory
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"the loader did not finish within {_LOAD_TIMEOUT_S} s") from error
    if child.returncode:
        tail = "\n".join(child.stderr.strip().splitlines()[-15:])
        raise LoadError(tail or f"the loader ended with status {child.returncode}")
    return directory


def header_flags(bpf_dir: Path) -> list[str]:
    """Where the compiler looks for headers."""
    machine = platform.machine()
    return ["-I/usr/include", f"-I/usr/include/{machine}-linux-gnu", f"-I{bpf_dir}"]


def compile_and_pin(pin_dir: Path, bpf_dir: Path) -> None:
    """Compile, load and pin, in this process and one beside it. Raises LoadError, or whatever bcc raises."""
    source = read_source(bpf_dir)
    directory = pin_dir / source.build
    partial = _partial(directory)
    for kind in ("maps", "programs"):
        (partial / kind).mkdir(parents=True)
    there = _to_take_over(pin_dir, directory, source)
    own, other = _HALVES
    maps_are_pinned, pinned = os.pipe()
    parent = os.getpid()
    child = os.fork()  # before there is a thread, or anything of bcc
    if not child:
        os.close(pinned)
        _die_with(parent)
        os._exit(_exit_status(lambda: _load_other_half(bpf_dir, other, partial, maps_are_pinned)))
    os.close(maps_are_pinned)
    try:
        half = _Half(bpf_dir, source, own, make_maps=not there)
        half.pin_maps(partial, there)
        os.write(pinned, b"\n")
        half.load(partial)
    finally:
        os.close(pinned)  # the other one gives up if it has not been told yet
        _, status = os.waitpid(child, 0)
    if status:
        raise LoadError("the programs " + " and ".join(other.programs) + " could not be loaded")
    partial.rename(directory)


def _load_other_half(bpf_dir: Path, half: _Programs, partial: Path, maps_are_pinned: int) -> None:
    compiled = _Half(bpf_dir, read_source(bpf_dir), half, make_maps=False)
    if os.read(maps_are_pinned, 1):
        compiled.use_maps(partial / "maps")
        compiled.load(partial)


class _Half:
    """Programs that one compiler has compiled. Making one takes a second; raises whatever bcc raises."""

    def __init__(self, bpf_dir: Path, source: Source, half: _Programs, *, make_maps: bool) -> None:
        # read when bcc is imported: our stand-in for a kernel tree
        os.environ["BCC_KERNEL_SOURCE"] = str(bpf_dir / "headers")
        import bcc

        # no debug information: it is a fifth of the compiler's work, and bcc would not keep it
        flags = [*source.defines, half.define, "-g0", "-Wno-everything", *header_flags(bpf_dir)]
        flags += [] if make_maps else ["-DMAPS_ARE_THERE"]
        self._bcc = bcc
        self._programs = half.programs
        self._maps = sorted(source.maps)
        self._constants = source.constants
        self._module = bcc.BPF(text=_PRELUDE + source.text, cflags=flags)

    def pin_maps(self, partial: Path, there: Path | None) -> None:
        """Pin all maps: those that were made, or another build's that are `there` instead. Raises OSError."""
        if there:
            self.use_maps(there)
        else:
            self._fill_constants()
        for name in self._maps:
            bpf_calls.obj_pin(self._map(name), partial / "maps" / name)

    def _fill_constants(self) -> None:
        """Write and freeze the maps that the verifier is to take for constants."""
        for name, value in self._constants.items():
            constant = bpf_calls.Map(os.dup(self._map(name)))
            constant.update(bytes(4), value)
            constant.freeze()
            constant.close()

    def use_maps(self, there: Path) -> None:
        """Have the programs work on what is pinned `there`: they know maps by descriptor until the kernel has loaded them."""
        for name in self._maps:
            with bpf_calls.opened(there / name) as pinned:
                os.dup2(pinned, self._map(name), inheritable=False)

    def _map(self, name: str) -> int:
        descriptor: int = self._bcc.lib.bpf_table_fd(self._module.module, name.encode())
        return descriptor

    def load(self, partial: Path) -> None:
        """Load and pin the programs, side by side: verifying takes the kernel a third of all the time."""

        def verify(name: str) -> None:
            kind, attach_type = _KINDS.get(name, _TC_KIND)
            loaded = self._module.load_func(name, kind, attach_type=attach_type)
            bpf_calls.obj_pin(loaded.fd, partial / "programs" / name)

        names = [name for name in self._programs if name in programs()]
        with futures.ThreadPoolExecutor(len(names)) as threads:
            list(threads.map(verify, names))


def _die_with(parent: int) -> None:
    """Have the kernel kill us when the process that wants to know ends: nobody would take up what we pin."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the process that started the loader is gone")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the loader process; its standard error is read by `load`."""
    parser = argparse.ArgumentParser(prog="hostint-agent-loader", description=__doc__)
    parser.add_argument("--pin-dir", type=Path, required=True)
    parser.add_argument("--bpf-dir", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    _die_with(options.parent)
    return _exit_status(lambda: compile_and_pin(options.pin_dir, options.bpf_dir))


def _exit_status(work: Callable[[], None]) -> int:
    try:
        work()
    except Exception as error:  # noqa: BLE001 (bcc raises bare Exception)
        print(f"datapath: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
