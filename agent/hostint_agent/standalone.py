# SPDX-License-Identifier: Apache-2.0
"""Configuration from files instead of the API server, read again when a file changes.

Collectors may be given by name. One whose name has no address yet is left out: its watchlists are
not programmed until there is one.
"""

import asyncio
import ipaddress
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic
import structlog

from hostint_agent import interfaces, resolver, yaml_objects
from hostint_api import (
    CollectorSpec,
    IgnoredDestination,
    NodeCollector,
    NodeConfigSpec,
    NodeRule,
    NodeWatchlist,
    WatchlistSpec,
    model,
    names,
    node_config,
)

POLL_S = 1.0

log = structlog.get_logger()

# addresses by name, as far as they are known
Addresses = Mapping[str, str]


class InvalidFiles(Exception):
    """The files do not make a configuration; one line a problem."""


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _collector(name: str, spec: CollectorSpec, addresses: Addresses) -> NodeCollector | None:
    """Return a collector as the node needs it; None if its name has no address yet."""
    given = spec.address or ""
    known = given if _is_address(given) else addresses.get(given)
    if known is None:
        return None
    address = ipaddress.ip_address(known)
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


@dataclass(frozen=True, slots=True)
class Objects:
    """Valid objects from files, by name."""

    collectors: Mapping[str, CollectorSpec]
    watchlists: Mapping[str, WatchlistSpec]

    def names(self) -> set[str]:
        """Return the names of hosts that have to be looked up."""
        given = {spec.address for spec in self.collectors.values() if spec.address}
        return {text for text in given if not _is_address(text)}


def read_files(paths: Sequence[Path]) -> Objects:
    """Return what is in these files. Raises InvalidFiles with everything that is wrong."""
    objects, problems = yaml_objects.load_objects(paths)
    if problems:
        raise InvalidFiles("\n".join(str(problem) for problem in problems))
    collectors, watchlists = {}, {}
    for item in objects:
        if isinstance(item.spec, WatchlistSpec):
            watchlists[item.name] = item.spec
        else:
            collectors[item.name] = item.spec
    for item in objects:
        where = f"{item.path}: {item.kind} {item.name}"
        if isinstance(item.spec, WatchlistSpec):
            if item.spec.collector_name not in collectors:
                raise InvalidFiles(
                    f"{where}: spec.collectorRef.name: Not found: "
                    f'"{item.spec.collector_name}": no file has an IntCollector of that name'
                )
        elif item.spec.address is None:
            raise InvalidFiles(f"{where}: spec.service: needs Kubernetes; give an address instead")
    return Objects(collectors, watchlists)


def compile_objects(objects: Objects, node_id: int, addresses: Addresses) -> NodeConfigSpec:
    """Return the configuration that these objects make, with the addresses that are known now.

    Every watchlist applies: a node selector has nothing to select among. Raises InvalidFiles if
    they are more than a node takes.
    """
    made = (_collector(name, spec, addresses) for name, spec in objects.collectors.items())
    collectors = [collector for collector in made if collector]
    lists = list(objects.watchlists.items())
    lists.sort(key=lambda entry: (-entry[1].priority, entry[0]))
    try:
        config = _node_config(node_id, collectors, lists)
    except pydantic.ValidationError as error:
        raise InvalidFiles("\n".join(model.problems(error, "all files together"))) from error
    return config.model_copy(update={"digest": node_config.digest(config)})


def _node_config(
    node_id: int,
    collectors: Sequence[NodeCollector],
    lists: Sequence[tuple[str, WatchlistSpec]],
) -> NodeConfigSpec:
    """Raises pydantic.ValidationError."""
    return NodeConfigSpec(
        node_id=node_id,
        collectors=tuple(collectors),
        ignored=tuple(IgnoredDestination(address=c.address, port=c.port) for c in collectors),
        watchlists=tuple(_node_watchlist(name, spec) for name, spec in lists),
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
            for name, spec in lists
            for rule in spec.rules
        ),
    )


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


class Configuration:
    """What files and the resolver say: the last good objects, with the last known addresses."""

    def __init__(
        self, paths: Sequence[Path], node_id: int, names: resolver.Resolver | None = None
    ) -> None:
        """Read the files. Raises InvalidFiles."""
        self._paths = paths
        self._node_id = node_id
        self._resolver = names or resolver.Resolver()
        self._stamps = _stamps(paths)
        self._objects = read_files(paths)
        # now, while there is somebody to read what is wrong
        self.spec()

    def spec(self) -> NodeConfigSpec:
        """Return the configuration as it is now."""
        return compile_objects(self._objects, self._node_id, self._resolver.addresses)

    async def look_up(self) -> None:
        """Look up all names. DNS that does not answer takes some seconds, and no more."""
        await self._resolver.refresh(self._objects.names())

    async def follow(self, apply: Callable[[NodeConfigSpec], object]) -> None:
        """Hand over a new configuration whenever files or addresses make one.

        Bad files are logged, and what is live stays.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_files(apply))
            group.create_task(self._follow_names(apply))

    async def _follow_files(self, apply: Callable[[NodeConfigSpec], object]) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            now = _stamps(self._paths)
            if now == self._stamps:
                continue
            self._stamps = now
            try:
                objects = await asyncio.to_thread(read_files, self._paths)
                await self._resolver.refresh(objects.names() - self._objects.names())
                spec = compile_objects(objects, self._node_id, self._resolver.addresses)
            except InvalidFiles as error:
                _refuse(error)
                continue
            self._objects = objects
            self._resolver.forget_others(objects.names())
            apply(spec)

    async def _follow_names(self, apply: Callable[[NodeConfigSpec], object]) -> None:
        while True:
            if await self._resolver.refresh(self._objects.names()):
                try:
                    apply(self.spec())
                except InvalidFiles as error:  # with one more collector that has an address
                    _refuse(error)
            await asyncio.sleep(POLL_S)


def _refuse(error: InvalidFiles) -> None:
    for line in str(error).splitlines():
        log.error("file not used, the last good configuration stays", error=line)


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
