# SPDX-License-Identifier: Apache-2.0
"""The options of every subcommand of `hostint-agent`. What doctor and status need beyond theirs is memory that no agent needs."""

import argparse
import contextlib
from collections.abc import Mapping
from pathlib import Path

from hostint_agent import agent, settings, standalone
from hostint_agent.node_rules import Destination

# an interval of `status`
_MOST_S = 3600


def parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """All subcommands; the chosen one is in `command`."""
    made = argparse.ArgumentParser(
        prog="hostint-agent",
        description="Report what this node does to watched packets, as INT telemetry reports.",
    )
    made.add_argument("--version", action="version", version=f"hostint-agent {agent.VERSION}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="follow this node's IntNodeConfig (in a cluster)")
    settings.add_agent_options(run, environment)
    run.add_argument(
        "--kubeconfig", type=Path, help="default: the pod's own service account", metavar="FILE"
    )

    alone = commands.add_parser("standalone", help="the same objects from files, no Kubernetes")
    _add_standalone_options(alone, environment)

    checked = commands.add_parser("check", help="validate objects as the API server would")
    checked.add_argument("files", nargs="+", type=Path, metavar="FILE")

    examined = commands.add_parser("doctor", help="look at this node, and say what is wrong")
    _add_doctor_options(examined, environment)

    told = commands.add_parser("status", help="print what the datapath of this node is like now")
    _add_status_options(told, environment)

    for name, words in (
        ("unload", "remove every program, map and link of ours, and nothing else"),
        ("counters", "print the datapath's counters as JSON"),
    ):
        settings.add_options(commands.add_parser(name, help=words), environment)
    return made


def _add_standalone_options(
    parser: argparse.ArgumentParser, environment: Mapping[str, str]
) -> None:
    settings.add_agent_options(parser, environment, settings.DEFAULT_STANDALONE_HTTP, "none")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="YAML, read again on change"
    )
    parser.add_argument(
        "--node-id",
        type=settings.as_argument(standalone.parse_node_id),
        metavar="ID",
        help="node id of the reports, a number or IPv4 address (default: the node's first IPv4 address)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the datapath loaded at the end (default: unload)"
    )


def _add_doctor_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Those of the agent, which say what to look at, and its own."""
    settings.add_agent_options(parser, environment)
    parser.add_argument(
        "--collector",
        type=settings.as_argument(parse_collector),
        action="append",
        default=[],
        dest="collectors",
        metavar="HOST:PORT",
        help="look at this collector, and not at those of the last configuration; may be given more than once",
    )
    parser.add_argument("--json", action="store_true", help="print an array of objects")


def _add_status_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Where to look, and how to tell."""
    settings.add_options(parser, environment)
    settings.add_state_options(parser, environment)
    settings.add_interface_options(parser, environment)
    parser.add_argument(
        "--interval",
        type=settings.as_argument(_seconds),
        default=1.0,
        metavar="SECONDS",
        help="how long to count, to tell rates; 0: tell none (default: 1)",
    )
    parser.add_argument("--watch", action="store_true", help="tell again and again, until Ctrl-C")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object; with --watch one a line"
    )


def parse_collector(text: str) -> Destination:
    """HOST:PORT, an IPv6 address in brackets. Raises ValueError."""
    host, separator, port = text.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"'{text}' is not HOST:PORT, with a port of 1..65535")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"'{text}' is not HOST:PORT: an IPv6 address is written in brackets")
    return Destination(text, host.strip("[]"), int(port), 0)


def _seconds(text: str) -> float:
    """Raises ValueError."""
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 <= seconds <= _MOST_S:
            return seconds
    raise ValueError(f"'{text}' is not 0..{_MOST_S} seconds")
