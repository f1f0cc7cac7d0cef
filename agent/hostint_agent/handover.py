# SPDX-License-Identifier: Apache-2.0
"""Give what an older build had counted to another one, exactly once, whoever is killed at whatever moment.

`PIN/<build>/carry/<map>` holds what that map of the build is to hold, as one element. None of it counts until the older build has
been moved there too, as `carry/build`: that is one rename, and from then on nobody finds the older build any more. Whoever comes
next writes what is in `carry`, as often as it takes: it says what is to be, not what is to be added.
"""

import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from hostint_agent import bpf_calls

_CARRY, _OLDER = "carry", "build"


def hand_over(older: Path, directory: Path, wanted: Mapping[str, Sequence[bytes]]) -> None:
    """Unpin an older build and have maps of the one in `directory` hold these elements. Raises OSError."""
    finish(directory)
    carry = directory / _CARRY
    carry.mkdir()
    for name, elements in wanted.items():
        value = b"".join(elements)
        made = bpf_calls.make_array(len(value))
        made.update(bytes(4), value)
        bpf_calls.obj_pin(made.fd, carry / name)
        made.close()
    older.rename(carry / _OLDER)
    finish(directory)


def finish(directory: Path) -> None:
    """Complete what was begun, or undo it if nothing of it counts yet; most often there is nothing. Raises OSError."""
    carry = directory / _CARRY
    if (carry / _OLDER).exists():
        for pin in sorted(carry.iterdir()):
            if pin.name != _OLDER:
                _write(pin, directory / "maps" / pin.name)
    # whatever of this is left by whoever is killed now says what has been written, or nothing
    if carry.exists():
        shutil.rmtree(carry)


def _write(pin: Path, target: Path) -> None:
    """Have the elements of an array be those that are kept as one."""
    kept, opened = bpf_calls.Map.open(pin), bpf_calls.Map.open(target)
    wanted = kept.lookup(bytes(4))
    for index, now in enumerate(opened.elements()):
        value = wanted[index * len(now) : (index + 1) * len(now)]
        if now != value:
            opened.update(struct.pack("=I", index), value)
