# SPDX-License-Identifier: Apache-2.0
"""A collector inside a program: receives in a thread, keeps the records, lets others wait for them."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self

from hostint_collector import receive, record, summary

_POLL_S = 0.05


class CollectorThread:
    """Listens on `host` in the network namespace of the thread that makes it; keeps the last `keep` records."""

    def __init__(self, host: str, port: int = 0, *, keep: int = 200_000) -> None:
        """Bind and start. Raises OSError."""
        self._receiver = receive.Receiver(host, port)
        self.port = self._receiver.port
        self._records: deque[record.Record] = deque(maxlen=keep)
        self._summary = summary.Summary()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="collector", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop receiving."""
        self._stopping = True
        self._thread.join()
        self._receiver.close()

    def _run(self) -> None:
        while not self._stopping:
            if not self._receiver.wait(_POLL_S):
                continue
            with self._changed:
                for data, source in self._receiver.burst():
                    received = record.from_datagram(data, source, time.time_ns())
                    self._summary.add(received)
                    self._records.append(received)
                self._changed.notify_all()

    def records(self, kind: str | None = None) -> list[record.Record]:
        """Records so far, of one kind or all."""
        with self._changed:
            return [r for r in self._records if kind is None or r["kind"] == kind]

    def clear(self) -> None:
        """Forget the records (not the sequence numbers)."""
        with self._changed:
            self._records.clear()

    @property
    def lost(self) -> int:
        """Reports missing by sequence number."""
        with self._changed:
            return self._summary.lost

    def gaps(self) -> dict[tuple[str, int, int], dict[str, int]]:
        """Sequence accounting by (source, node id, hw id), of those where anything was odd."""
        with self._changed:
            return {
                key: {
                    "lost": t.lost,
                    "duplicates": t.duplicates,
                    "reordered": t.reordered,
                    "restarts": t.restarts,
                }
                for key, t in self._summary.trackers.items()
                if t.lost or t.duplicates or t.restarts
            }

    @property
    def total(self) -> int:
        """Reports received since the start, malformed ones not counted."""
        with self._changed:
            kinds = self._summary.kinds
            return sum(kinds.values()) - kinds["malformed"]

    @property
    def malformed(self) -> int:
        """Datagrams that were no report."""
        with self._changed:
            return self._summary.kinds["malformed"]

    @property
    def kernel_drops(self) -> int:
        """Datagrams that did not fit the socket's buffer."""
        return self._receiver.kernel_drops

    def wait_for(
        self, wanted: Callable[[record.Record], bool], timeout_s: float = 10.0
    ) -> record.Record:
        """The first record that `wanted` accepts. Raises TimeoutError saying what came instead."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for candidate in self._records:
                    if wanted(candidate):
                        return candidate
                left = deadline - time.monotonic()
                if left <= 0:
                    seen = list(self._records)[-5:]
                    raise TimeoutError(
                        f"no such report within {timeout_s} s; {len(self._records)} others, last: {seen}"
                    )
                self._changed.wait(min(left, 0.2))
