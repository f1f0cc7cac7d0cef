# SPDX-License-Identifier: Apache-2.0
"""Whether a path is, or would be made, in a bpffs: pins are nowhere else. Only looks."""

import ctypes
import os
import struct
from pathlib import Path

MOUNT_POINT = Path("/sys/fs/bpf")
# BPF_FS_MAGIC of linux/magic.h
_MAGIC = 0xCAFE4A11
_LIBC = ctypes.CDLL(None, use_errno=True)


def existing(path: Path) -> Path:
    """The deepest part of the path that exists. Raises OSError where that may not be looked at."""
    while True:
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        else:
            return path


def holds(path: Path) -> bool:
    """Whether what exists at this path is in a bpffs: f_type of statfs(2), its first word. Raises OSError."""
    buffer = ctypes.create_string_buffer(256)
    if _LIBC.statfs(os.fsencode(path), buffer) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    return int(struct.unpack_from("=Q", buffer)[0]) == _MAGIC
