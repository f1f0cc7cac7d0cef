# SPDX-License-Identifier: Apache-2.0
"""`hostint-agent status`: gather and print, once or again and again."""

import argparse
import dataclasses
import errno
import json
import sys
import time

from hostint_agent import interfaces, settings
from hostint_agent.status import look, text

_NEEDS = "status needs CAP_BPF and CAP_NET_ADMIN: run it as root, or in the agent's container"
_CLEAR = "\x1b[H\x1b[2J"
# between two looks that take no time themselves
_PAUSE_S = 1.0


def run(options: argparse.Namespace) -> int:
    """Print; 0, or 1 where there is nothing to print, or not for us to see."""
    where = look.Where(
        options.pin_dir,
        options.bpf_dir,
        options.state_dir,
        options.node,
        interfaces.Patterns(options.include_interfaces, options.exclude_interfaces),
        options.node_addresses,
    )
    try:
        _write(_text(look.gather(where, options.interval), options), options)
        while options.watch:
            _write(_look_again(where, options), options)
    except look.NoStatus as error:
        words = str(error)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES):
            raise
        words = f"{error.filename}: {error.strerror}; {_NEEDS}"
    else:
        return 0
    print(f"hostint-agent: {words}", file=sys.stderr)  # noqa: T201
    return 1


def _look_again(where: look.Where, options: argparse.Namespace) -> str:
    if not options.interval:
        time.sleep(_PAUSE_S)
    try:
        return _text(look.gather(where, options.interval), options)
    except look.NoStatus as error:
        # an upgrade puts another datapath in the place of this one: what comes next is worth waiting for
        time.sleep(_PAUSE_S)
        return json.dumps({"error": str(error)}) if options.json else str(error)


def _text(told: look.Status, options: argparse.Namespace) -> str:
    if options.json:
        return json.dumps(dataclasses.asdict(told), indent=None if options.watch else 2)
    colours = settings.wants_colours(sys.stdout.isatty(), settings.environment())
    return text.render(told, colours=colours)


def _write(text: str, options: argparse.Namespace) -> None:
    if options.watch and sys.stdout.isatty():
        text = f"{_CLEAR}{text}"
    elif options.watch and not options.json:
        text = f"{text}\n"
    print(text, flush=True)  # noqa: T201
