# SPDX-License-Identifier: Apache-2.0
"""BPF_PROG_TEST_RUN for millions of packets: a TC program with its buffers and its attributes made once."""

import ctypes
import os
import platform
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)
_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280}[platform.machine()]
_PROG_TEST_RUN = 10
_ATTR_BYTES = 160
_SIZES_AT, _SIZES = 8, struct.Struct("=II")
_VERDICT_AT, _VERDICT = 4, struct.Struct("=i")
_UINT = struct.Struct("=I")

# struct __sk_buff of linux/bpf.h: the fields that a test run lets in and tells afterwards
CONTEXT_BYTES = 192
MARK, PRIORITY, INGRESS_IFINDEX, IFINDEX = 8, 32, 36, 40
CONTROL_BLOCK, TIMESTAMP, WIRE_LENGTH, GSO_SEGMENTS, GSO_SIZE = 48, 152, 160, 164, 176
LOOPBACK = 1
# a page less the room that the kernel keeps before and behind the packet
MAX_FRAME_BYTES = 3712
_SHORTEST = {b"\x08\x00": 34, b"\x86\xdd": 54}


def is_accepted(frame: bytes) -> bool:
    """Whether the kernel runs a program on this: it wants a whole Ethernet header, and behind it a whole IP header."""
    return _SHORTEST.get(frame[12:14], 14) <= len(frame) <= MAX_FRAME_BYTES


def context(**fields: int) -> bytes:
    """A struct __sk_buff; `fields` are names of this module in lower case, `control_block` fills all five words."""
    words = bytearray(CONTEXT_BYTES)
    for name, value in fields.items():
        if name == "control_block":
            words[CONTROL_BLOCK : CONTROL_BLOCK + 20] = struct.pack("=I", value) * 5
        elif name == "timestamp":
            struct.pack_into("=Q", words, TIMESTAMP, value)
        else:
            _UINT.pack_into(words, globals()[name.upper()], value)
    return bytes(words)


def _address(buffer: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


class Runner:
    """Runs one program; `output` and `output_context` hold what the last run left."""

    def __init__(self, program: int) -> None:
        self._input = bytearray(MAX_FRAME_BYTES)
        self.output = bytearray(MAX_FRAME_BYTES)
        self._context = bytearray(CONTEXT_BYTES)
        self.output_context = bytearray(CONTEXT_BYTES)
        self._attr = bytearray(_ATTR_BYTES)
        struct.pack_into(
            "=IIIIQQIIIIQQ",
            self._attr,
            0,
            program,
            0,
            0,
            0,
            _address(self._input),
            _address(self.output),
            1,
            0,
            CONTEXT_BYTES,
            CONTEXT_BYTES,
            _address(self._context),
            _address(self.output_context),
        )
        arguments = (_BPF, _PROG_TEST_RUN, _address(self._attr), _ATTR_BYTES)
        self._arguments = tuple(ctypes.c_long(argument) for argument in arguments)

    def run(self, frame: bytes, given: bytes) -> int:
        """The verdict on a frame with this context. Raises OSError."""
        size = len(frame)
        self._input[:size] = frame
        # what the kernel does not write must not look as if it had
        self.output[:size] = bytes(size)
        self._context[:] = given
        _SIZES.pack_into(self._attr, _SIZES_AT, size, MAX_FRAME_BYTES)
        if _LIBC.syscall(*self._arguments) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), f"test run of {size} bytes: {frame.hex()}")
        return int(_VERDICT.unpack_from(self._attr, _VERDICT_AT)[0])

    def left_alone(self, frame: bytes, given: bytes) -> bool:
        """Whether the last run left this frame and this context as they were."""
        size = len(frame)
        if self.output[:size] != frame or _SIZES.unpack_from(self._attr, _SIZES_AT)[1] != size:
            return False
        if self.output_context == given:
            return True
        # what was not given is told as the kernel fills it in
        expected = bytearray(given)
        for at, value in ((IFINDEX, LOOPBACK), (WIRE_LENGTH, size)):
            if not _UINT.unpack_from(expected, at)[0]:
                _UINT.pack_into(expected, at, value)
        return self.output_context == expected
