# SPDX-License-Identifier: Apache-2.0
"""How the programs wake the exporter: a ring buffer whose records say nothing but that there is something in another ring."""

import ctypes
import mmap
import os
import weakref
from pathlib import Path

from hostint_agent import bpf_calls


class Bell:
    """The pinned map `bell`; its descriptor is readable once a program has rung."""

    def __init__(self, maps: Path) -> None:
        """Open it, silent. Raises bpf_calls.BpfError."""
        self._fd = bpf_calls.obj_get(maps / "bell")
        weakref.finalize(self, os.close, self._fd)
        # Documentation/bpf/ringbuf.rst: a page with the consumer's position, then one with the producer's
        page = mmap.PAGESIZE
        self._consumer = mmap.mmap(self._fd, page)
        self._producer = mmap.mmap(self._fd, page, prot=mmap.PROT_READ, offset=page)
        self._consumed = ctypes.c_uint64.from_buffer(self._consumer)
        self.hush()

    def fileno(self) -> int:
        """What to poll."""
        return self._fd

    def hush(self) -> None:
        """Forget that it was rung."""
        self._consumed.value = int.from_bytes(self._producer[:8], "little")
