# SPDX-License-Identifier: Apache-2.0
"""The agent process: brings the datapath up, makes configurations live, and knows how all of it is doing."""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import ipaddress
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import structlog
from prometheus_client import core

from hostint_agent import (
    attach,
    classifier,
    counters,
    exporter,
    http,
    kernel,
    last_good,
    loader,
    metrics,
    node_rules,
    own_sockets,
    senders,
    settings,
    succession,
    tables,
    topology,
)
from hostint_api import (
    CollectorState,
    NodeConfigSpec,
    NodeConfigStatus,
    NodeWatchlist,
    WatchlistState,
)

VERSION = importlib.metadata.version("hostint")
_CLOCK_INTERVAL_S = 1.0
# in seconds, which are looks at the clock
_DROP_FUNCTIONS_EVERY_S = 5
_MAX_MESSAGE = 256
# what is logged of dropped packets, by the kernel's name of the reason
_DROP_MESSAGES = {"NOT_SPECIFIED": "packets dropped, kernel gives no reason"}

log = structlog.get_logger()


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """A configuration to make live; `spec` None: there is none, nothing is watched."""

    spec: NodeConfigSpec | None
    generation: int


class Agent:
    """The datapath of one node, from load to status. Call `start` once, then `apply` as often as there is something new."""

    def __init__(self, chosen: settings.Settings, first: Wanted | None = None) -> None:
        """Nothing happens yet. `first`: what to begin with; None: the last good configuration, from disk.

        Raises kernel.KernelError.
        """
        self._settings = chosen
        self._first = first
        self._keeper = last_good.Keeper(chosen.state_dir, chosen.node)
        # called, in the event loop, whenever `status` may say something else
        self.on_status: Callable[[], None] = lambda: None
        self._serving: Callable[[], bool] = lambda: True
        self._loop = asyncio.get_running_loop()
        # places of watchlists and collectors must stay while what an older datapath has is taken over
        self._changing = threading.Lock()
        self._live: Wanted | None = None
        self._answered: Wanted | None = None
        self._refusal: str | None = None
        self._config_errors = 0
        self._program = node_rules.build(NodeConfigSpec(node_id=0))
        self._compiler = classifier.Compiler()
        self._names = kernel.drop_reason_names()
        self._logged_functions: set[tuple[str, str]] = set()

    def start(self) -> None:
        """Load, configure, attach. Blocks for a second or two when something must be compiled.

        Raises loader.LoadError, kernel.KernelError or OSError.
        """
        chosen = self._settings
        directory = loader.load(chosen.pin_dir, chosen.bpf_dir)
        maps = directory / "maps"
        self._tables = tables.Tables(maps)
        self._counters = counters.Counters(maps)
        sockets = senders.SendingSockets(own_sockets.OwnSockets(maps).replace)
        self._exporter = exporter.Exporter(maps, sockets=sockets)
        self._config = kernel.DatapathConfig(maps)
        self._attacher = attach.Attacher(
            chosen.pin_dir,
            directory,
            patterns=chosen.patterns,
            mode=chosen.mode,
            cgroup=chosen.cgroup_root,
            on_change=self._attachments_changed,
            on_look=self._go_on_with_upgrade,
            addresses=chosen.node_addresses,
        )
        good = last_good.load(chosen.state_dir, chosen.node)
        if good:
            places = (good.watchlists, good.collectors)
            self._program = dataclasses.replace(
                self._program, watchlist_indexes=places[0], collector_indexes=places[1]
            )
        self._config.configure()
        self._succession = succession.Succession(chosen.pin_dir, directory, self._exporter)
        # the exporter starts with the first configuration: reports that waited for this process need a destination
        first = self._first or (Wanted(good.spec, good.generation) if good and good.spec else None)
        if first:
            self._begin_with(first)
        self._config.set_enabled(True)
        self._attacher.start()

    def _begin_with(self, first: Wanted) -> None:
        try:
            self._commit(first)
        except classifier.LimitExceeded as error:
            # `apply` will tell; until then what another process made live stays so
            log.warning("first configuration refused", error=str(error))

    def stop(self) -> None:
        """Send what waits and let go; the datapath stays as it is."""
        self._attacher.stop()
        self._exporter.stop()

    async def apply(self, wanted: Wanted) -> bool:
        """Make a configuration live, or keep the one that is and remember why. True if it went live."""
        try:
            # else it is what `start` began with
            if wanted is not self._live:
                await asyncio.to_thread(self._commit, wanted)
        except classifier.LimitExceeded as error:
            self._config_errors += 1
            self._refusal = f"TooManyRules: {error}"
            log.error("configuration refused", generation=wanted.generation, error=str(error))
        else:
            self._refusal = None
            log.info(
                "rules replaced",
                generation=wanted.generation,
                rules=len(self._program.rules),
                watchlists=len(self._program.watchlist_indexes.names),
            )
        self._answered = wanted
        self.on_status()
        return self._refusal is None

    def _commit(self, wanted: Wanted) -> None:
        with self._changing:
            self._commit_alone(wanted)

    def _commit_alone(self, wanted: Wanted) -> None:
        before = self._program
        spec = wanted.spec or NodeConfigSpec(node_id=0)
        program = node_rules.build(
            spec, before.watchlist_indexes, before.collector_indexes, before.made
        )
        image = self._compiler.compile(program.rules)
        self._counters.reset(program.fresh_watchlists)
        self._succession.watchlists_changed(program.fresh_watchlists)
        if wanted.spec:
            self._config.set_node_id(spec.node_id)
            self._attacher.add_address(str(ipaddress.IPv4Address(spec.node_id)))
        # destinations first: no report may wait for a collector that is not known yet
        self._exporter.set_destinations(program.destinations)
        self._exporter.start()
        self._tables.commit(image, program.policies, program.collectors)
        self._program = program
        self._live = wanted
        good = last_good.LastGood(
            wanted.spec, wanted.generation, program.watchlist_indexes, program.collector_indexes
        )
        self._keeper.save(good)

    async def keep_time(self) -> None:
        """Follow the wall clock, collectors, and functions that drop packets.

        Raises RuntimeError if a thread has ended: an agent that does half of its work must not look
        like one that does it. Anything else that fails here is logged and tried again.
        """
        before: dict[str, senders.Health] = {}
        failure = ""
        for second in itertools.count():
            await asyncio.sleep(_CLOCK_INTERVAL_S)
            if reason := self.not_alive():
                raise RuntimeError(reason)
            # every second, because the wall clock may be set at any time
            self._config.refresh_wall_offset()
            try:
                before = await self._follow_collectors(before)
                if second % _DROP_FUNCTIONS_EVERY_S == 0:
                    self._log_drop_functions()
            except Exception as error:  # reports go on without it
                if str(error) != failure:
                    log.exception("health of collectors or drops not known, retrying")
                failure = str(error)
            else:
                failure = ""

    async def _follow_collectors(
        self, before: dict[str, senders.Health]
    ) -> dict[str, senders.Health]:
        """Log and announce what changed in the health of collectors, and return it."""
        # It may wait for what is being sent, which the event loop must not.
        await asyncio.to_thread(self._exporter.recheck)
        health = self._exporter.health()
        told = {name: (h.reachable, h.reason) for name, h in health.items()}
        if told != {name: (h.reachable, h.reason) for name, h in before.items()}:
            self._tell_collectors(before, health)
            self.on_status()
        return health

    def _log_drop_functions(self) -> None:
        """Log each function, once, that drops packets for a reason that does not say why."""
        for reason, functions in self._counters.drop_functions(self._names).items():
            for function, count in functions.items():
                if (reason, function) not in self._logged_functions:
                    self._logged_functions.add((reason, function))
                    event = _DROP_MESSAGES.get(reason, "packets dropped, reason has no code")
                    log.info(event, reason=reason, function=function, count=count)

    def _tell_collectors(
        self, before: dict[str, senders.Health], now: dict[str, senders.Health]
    ) -> None:
        for name, health in now.items():
            was = before.get(name)
            if not health.reachable and (was is None or was.reachable):
                log.warning("collector not reachable", collector=name, error=health.message)
            elif health.reachable and was is not None and not was.reachable:
                log.info("collector reachable again", collector=name)

    def _attachments_changed(self, _: attach.State) -> None:
        self._loop.call_soon_threadsafe(self._poke)

    def _go_on_with_upgrade(self, state: attach.State) -> bool:
        """Take the place of older programs as soon as it is known what is attached; True once there are none any more."""
        if self._succession.complete:
            return True
        # the older programs may still be attached anywhere
        if state.error or state.drops_unseen:
            return False
        with self._changing:
            done = self._succession.go_on(self._attacher.detach_others, self._program.destinations)
        self._loop.call_soon_threadsafe(self._poke)
        return done

    def _poke(self) -> None:
        self.on_status()

    def _trouble(self) -> tuple[str, str] | None:
        """(reason, words) of what keeps every watchlist from being ready on this node."""
        if self._refusal:
            reason, _, message = self._refusal.partition(": ")
            return reason, message
        state = self._attacher.state()
        if state.error:
            return "InterfacesUnknown", state.error
        if self._succession.hold:
            words = "reports are held back until older programs are gone"
            error = self._succession.error
            return "UpgradeIncomplete", f"{words}: {error}" if error else words
        if state.failed:
            first = state.failed[0]
            return "AttachFailed", f"interface {first.interface.name}: {first.error}"
        if state.failures:
            step, cause = next(iter(state.failures.items()))
            return "DatapathIncomplete", f"{step}: {cause}"
        if not state.attachments:
            return "NoInterfaces", "no interface of this node is watched"
        if state.unseen:
            return "UplinkNotWatched", str(state.unseen[0])
        return None

    def status(self) -> NodeConfigStatus | None:
        """What is to be said of the last configuration; None before there was one."""
        answered = self._answered
        if answered is None:
            return None
        trouble = self._trouble()
        asked = answered.spec.watchlists if answered.spec else ()
        states = tuple(self._watchlist_state(watchlist, trouble) for watchlist in asked)
        return NodeConfigStatus(
            observed_generation=answered.generation,
            observed_digest=answered.spec.digest if answered.spec else "",
            agent_version=VERSION,
            watchlists_ready=f"{sum(state.ready for state in states)}/{len(states)}",
            watchlists=states,
            collectors=tuple(
                CollectorState(
                    name=name,
                    reachable=health.reachable,
                    reason=health.reason if not health.reachable else "Reachable",
                    message="" if health.reachable else health.message[:_MAX_MESSAGE],
                )
                for name, health in sorted(self._exporter.health().items())
            ),
        )

    def _watchlist_state(
        self, watchlist: NodeWatchlist, trouble: tuple[str, str] | None
    ) -> WatchlistState:
        if trouble is None and watchlist.collector not in self._program.collector_indexes.names:
            words = f"collector '{watchlist.collector}' is not among this node's collectors"
            trouble = ("CollectorNotFound", words)
        reason, message = trouble or ("Programmed", "")
        # The kernel takes any bytes for the name of an interface.
        message = message.encode(errors="backslashreplace").decode()
        return WatchlistState(
            name=watchlist.name,
            generation=watchlist.generation,
            ready=trouble is None,
            reason=reason,
            message=message[:_MAX_MESSAGE],
        )

    def not_alive(self) -> str | None:
        """Why this process must be started anew, or None."""
        if not self._exporter.alive:
            return "the export thread has ended"
        if not self._attacher.alive:
            return self._attacher.end_cause
        return None if self._serving() else "the http thread has ended"

    def not_ready(self) -> str | None:
        """Why this agent is not ready, or None."""
        if self._answered is None and self._live is None:
            return "no configuration yet"
        state = self._attacher.state()
        return f"interfaces: {state.error}" if state.error else None

    def topology(self) -> dict[str, Any]:
        """Port ids and interfaces."""
        spec = self._live.spec if self._live else None
        node_id = spec.node_id if spec else 0
        return topology.document(self._settings.node, node_id, self._attacher.state())

    def metrics(self) -> Iterable[core.Metric]:
        """All metric families now."""
        state = self._attacher.state()
        exported = self._exporter.counters()
        collectors = self._program.collector_indexes.names
        return metrics.families(
            metrics.Snapshot(
                version=VERSION,
                watchlists={
                    name: self._counters.watchlist(index)
                    for name, index in self._program.watchlist_indexes.names.items()
                },
                datapath=self._counters.datapath(),
                drops=self._counters.drops(self._names),
                drop_functions=self._counters.drop_functions(self._names),
                drop_recursion_misses=self._attacher.drop_recursion_misses(),
                exported={name: exported.get(i, (0, 0)) for name, i in collectors.items()},
                rings=self._exporter.fill(),
                attached=len(state.attachments) - len(state.failed),
                not_attached=len(state.failed),
                hold=self._succession.hold,
                rules=len(self._program.rules),
                generation=self._tables.generation,
                config_errors=self._config_errors,
            )
        )

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """Serve HTTP until left."""
        with http.serve(
            self._settings.http,
            metrics=self.metrics,
            not_alive=self.not_alive,
            not_ready=self.not_ready,
            topology=self.topology,
            health=self._settings.health,
            allow=self._settings.http_allow,
        ) as serving:
            self._serving = serving
            yield
