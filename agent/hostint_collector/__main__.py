# SPDX-License-Identifier: Apache-2.0
"""The command `hostint-collector`: one line a report, a summary at the end."""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from hostint_collector import receive, show, summary
from hostint_collector import record as records

DEFAULT_LISTEN = "0.0.0.0:32766"
_POLL_S = 0.2


class _Stop:
    """Set by SIGINT and SIGTERM."""

    def __init__(self) -> None:
        self.wanted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._set)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.wanted = True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hostint-collector",
        description="Receive INT telemetry reports (v0.5) and show one line a report.",
    )
    parser.add_argument(
        "--listen", default=DEFAULT_LISTEN, metavar="HOST:PORT", help="default: %(default)s"
    )
    parser.add_argument(
        "--output",
        choices=("table", "json", "none"),
        default="table",
        help="table for people, json for programs, none to count only; default: %(default)s",
    )
    parser.add_argument("--count", type=int, metavar="N", help="end after N reports")
    parser.add_argument("--duration", type=float, metavar="SECONDS", help="end after this time")
    parser.add_argument("--quiet", action="store_true", help="no summary at the end")
    return parser


def collect(
    receiver: receive.Receiver, options: argparse.Namespace, stop: _Stop
) -> summary.Summary:
    """Receive and show until told to stop, or until enough was seen."""
    seen = summary.Summary()
    show_record = show.printer(options.output, sys.stdout)
    ends = time.monotonic() + options.duration if options.duration else None
    sys.stdout.flush()
    while not stop.wanted:
        if ends is not None and time.monotonic() >= ends:
            break
        if not receiver.wait(_POLL_S):
            continue
        for data, source in receiver.burst():
            record = records.from_datagram(data, source, time.time_ns())
            lost = seen.add(record)
            show_record(record)
            if lost > 0 and options.output == "table":
                print(f"-- {lost} reports lost before this one")  # noqa: T201
        # a reader of the pipe sees a burst at once
        sys.stdout.flush()
        if options.count and sum(seen.kinds.values()) >= options.count:
            break
    return seen


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit status 0, 1 if the socket could not be had, 2 for wrong usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        host, port = receive.parse_endpoint(options.listen)
    except ValueError as error:
        parser.error(f"--listen: {error}")
    try:
        receiver = receive.Receiver(host, port)
    except OSError as error:
        print(f"hostint-collector: {options.listen}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 1
    stop = _Stop()
    try:
        seen = collect(receiver, options, stop)
    except BrokenPipeError:
        return 0
    if not options.quiet:
        print(*seen.lines(receiver.kernel_drops), sep="\n", file=sys.stderr)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
