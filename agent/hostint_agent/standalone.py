# SPDX-License-Identifier: Apache-2.0
"""Configuration from files instead of the API server: the same objects, read again when a file changes."""

import asyncio
import ipaddress
import socket
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from hostint_agent import interfaces, yaml_objects
from hostint_api import (
    CollectorSpec,
    IgnoredDestination,
    NodeCollector,
    NodeConfigSpec,
    NodeRule,
    NodeWatchlist,
    WatchlistSpec,
    names,
    node_config,
)

POLL_S = 1.0

log = structlog.get_logger()

Resolve = Callable[[str], str]


class InvalidFiles(Exception):
    """The files do not make a configuration; one line a problem."""


def resolve(name: str) -> str:
    """First address of a host name. Raises OSError."""
    return str(socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)[0][4][0])


def _collector(path: Path, name: str, spec: CollectorSpec, resolve_name: Resolve) -> NodeCollector:
    if spec.address is None:
        raise InvalidFiles(
            f"{path}: IntCollector {name}: spec.service: needs Kubernetes; give an address instead"
        )
    try:
        address = ipaddress.ip_address(spec.address)
    except ValueError:
        try:
            address = ipaddress.ip_address(resolve_name(spec.address))
        except (OSError, ValueError) as error:
            words = getattr(error, "strerror", None) or str(error)
            raise InvalidFiles(
                f'{path}: IntCollector {name}: spec.address: Invalid value: "{spec.address}": {words}'
            ) from error
    return NodeCollector(
        name=name,
        address=address,
        port=spec.port or names.DEFAULT_PORT,
        format=spec.format,
        snap_length=spec.snap_length,
        dscp=spec.dscp,
        reports_per_second=spec.reports_per_second,
    )


def _node_watchlist(name: str, spec: WatchlistSpec) -> NodeWatchlist:
    report = spec.report
    return NodeWatchlist(
        name=name,
        generation=1,
        collector=spec.collector_name,
        events=report.events,
        interval_ns=report.interval_ns,
        latency_change_ns=report.latency_change_ns,
        congestion_latency_ns=report.congestion_latency_ns,
        sample=report.sample,
    )


def _rule_id(watchlist: str, rule: str) -> int:
    return zlib.crc32(f"{watchlist}/{rule}".encode()) or 1


def compile_files(
    paths: Sequence[Path], node_id: int, resolve_name: Resolve = resolve
) -> NodeConfigSpec:
    """The configuration that these files make. Every watchlist applies: a node selector has nothing to select among.

    Raises InvalidFiles with everything that is wrong.
    """
    objects, problems = yaml_objects.load_objects(paths)
    if problems:
        raise InvalidFiles("\n".join(str(problem) for problem in problems))
    collectors = [
        _collector(item.path, item.name, item.spec, resolve_name)
        for item in objects
        if isinstance(item.spec, CollectorSpec)
    ]
    known = {collector.name for collector in collectors}
    lists = [(o.name, o.spec, o.path) for o in objects if isinstance(o.spec, WatchlistSpec)]
    for name, spec, path in lists:
        if spec.collector_name not in known:
            raise InvalidFiles(
                f"{path}: IntWatchlist {name}: spec.collectorRef.name: Not found: "
                f'"{spec.collector_name}": no file has an IntCollector of that name'
            )
    lists.sort(key=lambda entry: (-entry[1].priority, entry[0]))
    config = NodeConfigSpec(
        node_id=node_id,
        collectors=tuple(collectors),
        ignored=tuple(IgnoredDestination(address=c.address, port=c.port) for c in collectors),
        watchlists=tuple(_node_watchlist(name, spec) for name, spec, _ in lists),
        rules=tuple(
            NodeRule(
                id=_rule_id(name, rule.name),
                watchlist=name,
                name=rule.name,
                action=rule.action,
                protocol=rule.protocol,
                source=rule.source,
                destination=rule.destination,
                bidirectional=rule.bidirectional,
            )
            for name, spec, _ in lists
            for rule in spec.rules
        ),
    )
    return config.model_copy(update={"digest": node_config.digest(config)})


def _stamps(paths: Sequence[Path]) -> list[tuple[int, int, int] | None]:
    """What tells that a file is another one now; None: it is not there."""
    stamps: list[tuple[int, int, int] | None] = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return stamps


async def follow(
    paths: Sequence[Path], node_id: int, apply: Callable[[NodeConfigSpec], object]
) -> None:
    """Hand over a new configuration whenever the files make one. Bad files are told, and what is live stays."""
    before = _stamps(paths)
    while True:
        await asyncio.sleep(POLL_S)
        now = _stamps(paths)
        if now == before:
            continue
        before = now
        try:
            spec = await asyncio.to_thread(compile_files, paths, node_id)
        except InvalidFiles as error:
            for line in str(error).splitlines():
                log.error("file not used, the last good configuration stays", error=line)
        else:
            apply(spec)


def parse_node_id(text: str) -> int:
    """A number of 32 bits, or an IPv4 address. Raises ValueError."""
    if text.isdecimal() and int(text) < 1 << 32:
        return int(text)
    try:
        return int(ipaddress.IPv4Address(text))
    except ValueError:
        raise ValueError(f"node id '{text}' is not 0..4294967295 or an IPv4 address") from None


def default_node_id(network: interfaces.Network) -> int:
    """The first IPv4 address, of an interface with a default route if there is one; 0 if there is none at all."""
    order = sorted(network.addresses, key=lambda index: (index not in network.default_route, index))
    for index in order:
        for address in network.addresses[index]:
            if ":" not in address:
                return int(ipaddress.IPv4Address(address))
    return 0
