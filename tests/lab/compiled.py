# SPDX-License-Identifier: Apache-2.0
"""Compile the C of the tests: BPF programs by bcc in a process of its own, which pins them; native programs by gcc."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hostint_agent import bpf_calls, loader

_PRELUDE = """
#define PINNED_MMAPABLE(name, leaf, n) BPF_F_TABLE("array:" PIN_DIRECTORY #name, u32, leaf, name, n, 1024)
#define PINNED_HASH(name, key, leaf, n) BPF_F_TABLE("hash:" PIN_DIRECTORY #name, key, leaf, name, n, 0)
"""


def bpf(source: Path, pins: Path, programs: Sequence[str], defines: Mapping[str, int]) -> None:
    """Load TC programs (cgroup_skb if `deliver` is in the name) and pin them, and their maps, below `pins`. Raises RuntimeError with what the compiler says."""
    command = [sys.executable, "-m", "tests.lab.compiled", str(source), str(pins), *programs]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name}: {done.stderr[-4000:]}")


def native(source: Path, output: Path, *flags: str) -> Path:
    """Compile with gcc. Raises RuntimeError with what the compiler says."""
    command = ["gcc", "-O2", "-Wall", "-Werror", *flags, "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{source.name}: {done.stderr}")
    return output


def _with_own_headers(source: Path) -> str:
    """The text with headers of its folder put in, as the loader does: bcc rewrites the main file only."""
    include = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)
    return include.sub(lambda match: (source.parent / match[1]).read_text(), source.read_text())


def _load(source: Path, pins: Path, words: Sequence[str]) -> None:
    headers = loader.default_bpf_dir() / "headers"
    os.environ["BCC_KERNEL_SOURCE"] = str(headers)
    import bcc

    defines = [word for word in words if word.startswith("-D")]
    flags = [*defines, f'-DPIN_DIRECTORY="{pins}/"', "-Wno-everything", "-I/usr/include"]
    flags.append(f"-I/usr/include/{platform.machine()}-linux-gnu")
    module = bcc.BPF(text=_PRELUDE + _with_own_headers(source), cflags=flags)
    for name in words:
        if name not in defines:
            kind = bcc.BPF.CGROUP_SKB if "deliver" in name else bcc.BPF.SCHED_CLS
            bpf_calls.obj_pin(module.load_func(name, kind).fd, pins / name)


if __name__ == "__main__":
    _load(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
