# SPDX-License-Identifier: Apache-2.0
"""The agent's settings: command line options, each with an environment variable, and their defaults."""

import argparse
import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

from hostint_agent import attach, interfaces, loader
from hostint_agent.http_server import Network

DEFAULT_PIN_DIR = "/sys/fs/bpf/hostint"
DEFAULT_STATE_DIR = "/var/lib/hostint"
DEFAULT_CGROUP_ROOT = "/sys/fs/cgroup"
# every address of both families
DEFAULT_HTTP = "[::]:9464"
DEFAULT_STANDALONE_HTTP = "127.0.0.1:9464"
# where no pod can reach it, and with a port of its own: a readiness probe must not depend on others
DEFAULT_HEALTH = "127.0.0.1:9465"
LogFormat = Literal["auto", "json", "console"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Settings:
    """What an agent process was told at its start."""

    node: str
    pin_dir: Path
    bpf_dir: Path
    state_dir: Path
    cgroup_root: Path
    http: tuple[str, int] | None
    patterns: interfaces.Patterns
    mode: attach.Mode
    log_level: str
    log_format: LogFormat
    kubeconfig: Path | None = None
    health: tuple[str, int] | None = None
    # who may read metrics and topology, besides processes of this host
    http_allow: tuple[Network, ...] = ()
    # that the cluster knows this node by
    node_addresses: tuple[str, ...] = ()


def parse_listen(text: str) -> tuple[str, int] | None:
    """HOST:PORT, or `none`. Raises ValueError."""
    if text == "none":
        return None
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"'{text}' is not HOST:PORT or none")
    return host.strip("[]") or "::", int(port)


def parse_networks(text: str) -> tuple[Network, ...]:
    """CIDRs and addresses with commas between. Raises ValueError."""
    return tuple(_network(part) for part in _names(text))


def parse_addresses(text: str) -> tuple[str, ...]:
    """IP addresses with commas between. Raises ValueError."""
    return tuple(str(ipaddress.ip_address(part)) for part in _names(text))


def _network(text: str) -> Network:
    length = text.partition("/")[2]
    try:
        # a netmask, which the standard library takes as well, is a slip more often than not
        if length and not length.isdecimal():
            raise ValueError
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(
            f"'{text}' is not a CIDR without host bits (10.244.0.0/16), or an address"
        ) from None


def as_argument(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """What argparse may call for `type`: it tells the words of an ArgumentTypeError, and not those of a ValueError."""

    def parsed(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Options of every subcommand that works with the datapath."""

    def option(flag: str, variable: str, default: str, help_text: str, **more: object) -> None:
        parser.add_argument(
            flag,
            default=environment.get(variable, default),
            help=f"{help_text} (env {variable}; default: {default or 'none'})",
            **more,  # type: ignore[arg-type]
        )

    option("--pin-dir", "HOSTINT_PIN_DIR", DEFAULT_PIN_DIR, "bpffs directory of ours", type=Path)
    option(
        "--bpf-dir",
        "HOSTINT_BPF_DIR",
        str(loader.default_bpf_dir()),
        "where the C sources are",
        type=Path,
    )
    option(
        "--cgroup-root",
        "HOSTINT_CGROUP_ROOT",
        DEFAULT_CGROUP_ROOT,
        "the host's cgroup v2 hierarchy, for packets that sockets take",
        type=Path,
    )
    option("--log-level", "HOSTINT_LOG_LEVEL", "info", "debug, info, warning or error")
    option(
        "--log-format",
        "HOSTINT_LOG_FORMAT",
        "auto",
        "json, console, or auto: console on a terminal",
        choices=get_args(LogFormat),
    )


def add_state_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Options of every subcommand that knows the last good configuration."""
    parser.add_argument(
        "--node",
        default=environment.get("NODE_NAME", socket.gethostname()),
        help="name of this node (env NODE_NAME; default: the host name)",
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=environment.get("HOSTINT_STATE_DIR", DEFAULT_STATE_DIR),
        help=f"where the last good configuration is kept (env HOSTINT_STATE_DIR; default: {DEFAULT_STATE_DIR})",
    )


def add_interface_options(parser: argparse.ArgumentParser, environment: Mapping[str, str]) -> None:
    """Options of every subcommand that knows which interfaces are to be watched."""
    for flag, words in (("include", "also watch"), ("exclude", "never watch")):
        parser.add_argument(
            f"--{flag}-interfaces",
            type=_names,
            default=environment.get(f"HOSTINT_{flag.upper()}_INTERFACES", ""),
            metavar="PATTERNS",
            help=f"{words} interfaces of these names, shell patterns with commas between "
            f"(env HOSTINT_{flag.upper()}_INTERFACES)",
        )
    parser.add_argument(
        "--node-addresses",
        type=as_argument(parse_addresses),
        default=environment.get("HOSTINT_NODE_ADDRESSES", ""),
        metavar="ADDRESSES",
        help="addresses that the cluster knows this node by, with commas between; their traffic "
        "must be seen (env HOSTINT_NODE_ADDRESSES; an IPv4 node id is always one)",
    )


def add_agent_options(
    parser: argparse.ArgumentParser,
    environment: Mapping[str, str],
    http: str = DEFAULT_HTTP,
    health: str = DEFAULT_HEALTH,
) -> None:
    """Options of `run` and `standalone`; `http` and `health` are the defaults."""
    add_options(parser, environment)
    add_state_options(parser, environment)
    _add_http_options(parser, environment, http, health)
    add_interface_options(parser, environment)
    parser.add_argument(
        "--attach",
        choices=get_args(attach.Mode),
        default=environment.get("HOSTINT_ATTACH", "auto"),
        help="tcx, clsact, or auto: clsact where the kernel has no tcx (env HOSTINT_ATTACH; default: auto)",
    )


def _add_http_options(
    parser: argparse.ArgumentParser, environment: Mapping[str, str], http: str, health: str
) -> None:
    for flag, default, words in (
        ("http", http, "metrics, topology and health"),
        ("health", health, "health alone, for the readiness probe"),
    ):
        variable = f"HOSTINT_{flag.upper()}"
        parser.add_argument(
            f"--{flag}",
            type=as_argument(parse_listen),
            default=environment.get(variable, default),
            metavar="HOST:PORT|none",
            help=f"{words} (env {variable}; default: {default})",
        )
    parser.add_argument(
        "--http-allow",
        type=as_argument(parse_networks),
        default=environment.get("HOSTINT_HTTP_ALLOW", ""),
        metavar="CIDRS",
        help="who may read metrics and topology, besides this host: CIDRs with commas between "
        "(env HOSTINT_HTTP_ALLOW)",
    )


def from_options(options: argparse.Namespace) -> Settings:
    """The settings that parsed options mean."""
    return Settings(
        node=options.node,
        pin_dir=options.pin_dir,
        bpf_dir=options.bpf_dir,
        state_dir=options.state_dir,
        cgroup_root=options.cgroup_root,
        http=options.http,
        patterns=interfaces.Patterns(options.include_interfaces, options.exclude_interfaces),
        mode=options.attach,
        log_level=options.log_level,
        log_format=options.log_format,
        kubeconfig=getattr(options, "kubeconfig", None),
        health=options.health,
        http_allow=options.http_allow,
        node_addresses=options.node_addresses,
    )


def environment() -> Mapping[str, str]:
    """The process's environment."""
    return os.environ


def wants_colours(is_terminal: bool, environment: Mapping[str, str]) -> bool:
    """Only on a terminal, and not with NO_COLOR (no-color.org: set, and not empty)."""
    return is_terminal and not environment.get("NO_COLOR")
