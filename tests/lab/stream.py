# SPDX-License-Identifier: Apache-2.0
"""A steady stream of numbered datagrams between two pods, of which every one must arrive."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator

from tests.lab import traffic
from tests.lab.topology import Pod

_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 32 << 20


class Stream:
    """Sends while it is open; `lost` counts what has not arrived of what was sent."""

    def __init__(self, source: Pod, target: Pod, port: int, per_second: int) -> None:
        self._address = (target.address, port)
        self._pause_s = 1 / per_second
        self._sender = source.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sender.bind((source.address, 0))
        self._receiver = target.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._receiver.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._receiver.bind(self._address)
        self._receiver.settimeout(0.1)
        self.source_port: int = self._sender.getsockname()[1]
        self.sent = 0
        self._numbers: set[int] = set()
        self.duplicates = 0
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=f) for f in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._stopping.wait(self._pause_s):
            self._sender.sendto(traffic.payload(self.sent), self._address)
            self.sent += 1

    def _receive(self) -> None:
        while True:
            try:
                datagram = self._receiver.recv(2048)
            except TimeoutError:
                if self._stopping.is_set():
                    return
                continue
            number = struct.unpack_from("!I", datagram, len(traffic.PAYLOAD_TAG))[0]
            self.duplicates += number in self._numbers
            self._numbers.add(number)

    @property
    def received(self) -> int:
        """How many different datagrams have arrived."""
        return len(self._numbers)

    def stop(self) -> None:
        """End it, once everything had time to arrive."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._sender.close()
        self._receiver.close()

    def lost(self, settle_s: float = 2.0) -> int:
        """Of those sent until now, how many do not arrive."""
        sent, deadline = self.sent, time.monotonic() + settle_s
        while True:
            missing = sum(number not in self._numbers for number in range(sent))
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.02)


@contextlib.contextmanager
def flowing(source: Pod, target: Pod, port: int, per_second: int = 1000) -> Iterator[Stream]:
    """A stream from one pod to another, in one direction, for as long as this is entered."""
    stream = Stream(source, target, port, per_second)
    try:
        yield stream
    finally:
        stream.stop()
