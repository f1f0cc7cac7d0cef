# SPDX-License-Identifier: Apache-2.0
"""What is pinned in a pin directory, and whether an agent works with it. Only looks; `loader` and `unload` pin and unpin."""

import contextlib
import ctypes
import fcntl
import os
from pathlib import Path

from hostint_agent import attach, bpf_calls, bpf_types, loader

_LOCKS = Path("/proc/locks")


def loaded_build(pin_dir: Path, bpf_dir: Path) -> Path | None:
    """The build whose drop program is attached; if none is, that of these sources, or any. Raises OSError."""
    found = loader.builds(pin_dir)
    sources = sources_build(bpf_dir)
    found.sort(key=lambda build: build.name != sources)
    attached = drop_program_attached(pin_dir)
    for build in found:
        # what has no drop program is just being removed, or somebody has
        if (build / "programs" / "drop").exists() and program(build, "drop").id == attached:
            return build
    return found[0] if found else None


def sources_build(bpf_dir: Path) -> str | None:
    """The build that these sources would make; None if there are none."""
    with contextlib.suppress(loader.LoadError):
        return loader.read_source(bpf_dir).build
    return None


def drop_program_attached(pin_dir: Path) -> int | None:
    """Kernel id of the drop program that is attached; None if there is none. Raises OSError."""
    pin = pin_dir / "links" / attach.DROP_TRACEPOINT
    if not pin.exists():
        return None
    with bpf_calls.opened(pin) as link:
        return bpf_calls.tcx_link_target(link)[0]


def program(build: Path, name: str) -> bpf_calls.ProgramInfo:
    """What the kernel tells of a pinned program. Raises bpf_calls.BpfError."""
    with bpf_calls.opened(build / "programs" / name) as fd:
        return bpf_calls.program_info(fd)


def config(build: Path) -> bpf_types.Config:
    """A copy of a build's settings. Raises bpf_calls.BpfError."""
    data = bpf_calls.Map.open(build / "maps" / "config").lookup(bytes(4))
    # another version's may be shorter
    return bpf_types.Config.from_buffer_copy(data.ljust(ctypes.sizeof(bpf_types.Config), b"\0"))


def agent(pin_dir: Path) -> tuple[bool, int | None]:
    """(whether an agent works with these pins, its process id if that can be seen). Raises OSError."""
    directory = os.open(pin_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # shared, without waiting, and let go at once: an agent that starts in this moment tries again
        fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True, _lock_holder(os.fstat(directory))
    finally:
        os.close(directory)
    return False, None


def pins_lost(pin_dir: Path) -> str | None:
    """Return what is wrong with a pin directory that has no datapath, if an agent works with it.

    Raises OSError.
    """
    with contextlib.suppress(FileNotFoundError):
        is_running, _ = agent(pin_dir)
        if is_running:
            return f"an agent works with {pin_dir}, but no datapath is pinned there"
    return None


def _lock_holder(locked: os.stat_result) -> int | None:
    wanted = f"{os.major(locked.st_dev):02x}:{os.minor(locked.st_dev):02x}:{locked.st_ino}"
    for line in _LOCKS.read_text().splitlines():
        # 1: FLOCK  ADVISORY  WRITE 4242 00:1c:1234 0 EOF
        _, kind, _, access, pid, what, *_ = line.replace("-> ", "").split()
        if (kind, access, what) == ("FLOCK", "WRITE", wanted):
            return int(pid)
    return None
