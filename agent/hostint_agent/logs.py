# SPDX-License-Identifier: Apache-2.0
"""Logs to standard error: JSON lines for machines, words and colours for a terminal."""

import logging
import sys
import threading

import structlog

from hostint_agent.settings import LogFormat


def configure(level: str, log_format: LogFormat) -> None:
    """Set up structlog for the process. Raises ValueError for an unknown level."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"log level '{level}' is not debug, info, warning or error")
    on_terminal = sys.stderr.isatty()
    as_json = log_format == "json" or (log_format == "auto" and not on_terminal)
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=on_terminal)
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    threading.excepthook = _tell


def _tell(ended: threading.ExceptHookArgs) -> None:
    """What ends a thread is told like everything else."""
    name = ended.thread.name if ended.thread else "unknown"
    structlog.get_logger().error(
        "thread ended", thread=name, error=str(ended.exc_value), exc_info=ended.exc_value
    )
