# SPDX-License-Identifier: Apache-2.0
"""The process: command line, start, stop and exit code. What it does is in the other modules."""

import argparse
import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import kopf
import structlog
from prometheus_client import core

from hostint_api import names
from hostint_operator import desired_state, http, intake, logs, observe, reconcile, resolver
from hostint_operator.kube import client, lease

log = structlog.get_logger()

LEASE = "hostint-operator"
SERVICE_ACCOUNT_NAMESPACE = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
SWEEP_S = 15.0
# What a collector refers to and is not looked up by then is reported instead of waited for.
SYNC_PATIENCE_S = 10.0
# A sweep or a write that takes longer than this is stuck.
STUCK_S = 120.0


class LeadershipLostError(Exception):
    """Another replica may be writing now; this process has to start over."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The command line."""

    namespace: str
    log_level: str
    http_host: str
    http_port: int
    identity: str
    leader_election: bool
    kubeconfig: pathlib.Path | None


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Read the command line; what it leaves out comes from HOSTINT_* in the environment."""

    def default(name: str, otherwise: str) -> str:
        return environment.get(f"HOSTINT_{name}") or otherwise

    parser = argparse.ArgumentParser(
        prog="hostint-operator",
        description="Turns IntWatchlists and IntCollectors into one IntNodeConfig per node.",
        epilog="Every option can be given as HOSTINT_<NAME> in the environment.",
    )
    parser.add_argument(
        "--namespace",
        default=default("NAMESPACE", _own_namespace()),
        help="where the agent pods and the lease are (default: %(default)s)",
    )
    parser.add_argument(
        "--log-level",
        default=default("LOG_LEVEL", "info"),
        choices=["debug", "info", "warning", "error"],
    )
    parser.add_argument(
        "--http",
        metavar="HOST:PORT",
        default=default("HTTP", "0.0.0.0:8080"),  # the kubelet probes from outside the pod
        help="/healthz, /readyz and /metrics (default: %(default)s)",
    )
    parser.add_argument(
        "--identity",
        default=default("IDENTITY", f"{socket.gethostname()}-{os.getpid()}"),
        help="name of this replica in the lease (default: %(default)s)",
    )
    parser.add_argument(
        "--leader-election",
        action=argparse.BooleanOptionalAction,
        default=_flag(default("LEADER_ELECTION", "true")),
        help="write only while holding the lease (default: %(default)s)",
    )
    parser.add_argument(
        "--kubeconfig",
        type=pathlib.Path,
        default=environment.get("HOSTINT_KUBECONFIG") or None,
        help="outside a cluster; inside, the pod's service account is used",
    )
    version = metadata.version("hostint")
    parser.add_argument("--version", action="version", version=f"hostint-operator {version}")
    read = parser.parse_args(arguments)
    host, colon, port = read.http.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        parser.error(f"--http '{read.http}' is not HOST:PORT with a port in 0..65535")
    return Settings(
        namespace=read.namespace,
        log_level=read.log_level,
        http_host=host.strip("[]") or "0.0.0.0",  # noqa: S104
        http_port=int(port),
        identity=read.identity,
        leader_election=read.leader_election,
        kubeconfig=read.kubeconfig,
    )


def _flag(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on")


def _own_namespace() -> str:
    try:
        return SERVICE_ACCOUNT_NAMESPACE.read_text().strip()
    except OSError:
        return names.NAMESPACE


class Operator:
    """Everything that runs, wired together."""

    def __init__(
        self, api: client.Api, settings: Settings, *, patience_s: float = SYNC_PATIENCE_S
    ) -> None:
        self._api = api
        self._patience_s = patience_s
        self._settings = settings
        self._swept_at = time.monotonic()
        self._compiling = False
        self._swept = asyncio.Event()
        self._kopf_ready = asyncio.Event()
        self.metrics = http.Metrics()
        self.state = desired_state.State()
        self.lease = lease.Lease(api, settings.namespace, LEASE, settings.identity)
        self.reconciler = reconcile.Reconciler(
            api, self.state, self.metrics, may_write=self._may_write
        )
        self.resolver = resolver.Resolver(self.state.dns, self.reconciler.inputs_changed)
        self.observers = observe.Observers(
            api,
            self.state,
            settings.namespace,
            self.reconciler.inputs_changed,
            self.reconciler.node_changed,
        )
        self.reconciler.attach(self.observers, self.resolver)
        self.intake = intake.Intake(self.state, self.reconciler.object_changed)
        self.metrics.read_on_demand(self._gauges)

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set; raise LeadershipLostError if another replica took over."""
        health = http.Health(self._dead, self._not_ready)
        kopf_stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            front_door = group.create_task(self._front_door(stop, kopf_stop))
            front_door.add_done_callback(lambda _: stop.set())
            async with http.serve(
                self._settings.http_host, self._settings.http_port, health, self.metrics
            ) as port:
                log.info("serving http", host=self._settings.http_host, port=port)
                services = [group.create_task(service) for service in self._services(stop)]
                await stop.wait()
                log.info("stopping")
                self.observers.follow_services([])
                self.resolver.follow([])
                for service in services:
                    service.cancel()
                await asyncio.gather(*services, return_exceptions=True)
            # Last, since kopf waits five seconds for every task that is not its own.
            kopf_stop.set()

    def _services(self, stop: asyncio.Event) -> Iterable[Coroutine[None, None, None]]:
        yield self._lead()
        yield self._work()
        yield self._sweep_for_ever()
        yield self._take_signals_back(stop)
        for mirror in self.observers.reflectors.values():
            yield mirror.run()

    async def _front_door(self, stop: asyncio.Event, kopf_stop: asyncio.Event) -> None:
        """Let kopf tell of the users' objects, once their kinds are served."""
        if await self._first_sweep(stop):
            await kopf.operator(
                registry=intake.register(self.intake, self._credentials),
                settings=intake.settings(),
                standalone=True,
                clusterwide=True,
                stop_flag=kopf_stop,
                ready_flag=self._kopf_ready,
            )

    async def _take_signals_back(self, stop: asyncio.Event) -> None:
        """Let a signal stop all of us in order; kopf takes it for itself when it starts."""
        await self._kopf_ready.wait()
        stop_on_signals(stop)

    async def _credentials(self) -> client.Credentials:
        return await client.credentials(self._settings.kubeconfig)

    async def _first_sweep(self, stop: asyncio.Event) -> bool:
        """Read all objects of the users; False if we were stopped before that worked."""
        told = False
        while not stop.is_set():
            try:
                await self._sweep()
            except client.ApiError as error:
                if not told:
                    log.warning("waiting for the custom resources", error=str(error))
                told = True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await stop.wait()
            else:
                self._swept.set()
                return True
        return False

    async def _sweep(self) -> None:
        for kind in intake.PLURALS:
            await self.intake.sweep(self._api, kind)
        self._swept_at = time.monotonic()

    async def _sweep_for_ever(self) -> None:
        await self._swept.wait()
        failing = False
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._sweep()
                failing = False
            except client.ApiError as error:
                self._swept_at = time.monotonic()  # it did not hang; the API server is to blame
                if not failing:
                    log.warning("sweep failed, retrying", error=str(error))
                failing = True

    async def _work(self) -> None:
        """Compile and write, but never before everything that is compiled from is known."""
        await self._swept.wait()
        await self.observers.synced()
        self.reconciler.plan()  # names what has to be looked up
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s):
                await self.observers.synced()
                await self.resolver.first_answers()
        self.reconciler.plan()
        self._compiling = True
        log.info("all inputs known", nodes=len(self.state.nodes))
        if self._settings.leader_election:
            await self.lease.leading.wait()
        await self.reconciler.run()

    async def _lead(self) -> None:
        if not self._settings.leader_election:
            return
        await self.lease.hold()
        raise LeadershipLostError

    def _may_write(self) -> bool:
        return not self._settings.leader_election or self.lease.may_write()

    def _dead(self) -> list[str]:
        now = time.monotonic()
        problems = [
            f"{key.kind} {key.name} is being worked on for {now - since:.0f} s"
            for key, since in self.reconciler.busy_since.items()
            if now - since > STUCK_S
        ]
        if self._swept.is_set() and now - self._swept_at > STUCK_S:
            problems.append(f"no sweep for {now - self._swept_at:.0f} s")
        return problems

    def _not_ready(self) -> list[str]:
        problems = [
            f"{name} not listed yet"
            for name, r in self.observers.all().items()
            if not r.synced.is_set()
        ]
        if not self._swept.is_set():
            problems.append("the custom resources are not served yet")
        elif not self._compiling:
            problems.append("not everything that is compiled from is known yet")
        elif not self._kopf_ready.is_set():
            problems.append("the watch of the custom resources has not started")
        return problems

    def _gauges(self) -> Iterable[core.Metric]:
        prefix = "hostint_operator_"
        queue = core.GaugeMetricFamily(f"{prefix}queue_depth", "Keys that wait or are worked on")
        queue.add_metric([], len(self.reconciler.queue))
        yield queue
        leader = core.GaugeMetricFamily(f"{prefix}leader", "1 while this replica may write")
        leader.add_metric([], float(self._may_write()))
        yield leader
        objects = core.GaugeMetricFamily(
            f"{prefix}objects", "Objects known, by kind", labels=["kind"]
        )
        objects.add_metric(["watchlists"], len(self.state.watchlists))
        objects.add_metric(["collectors"], len(self.state.collectors))
        relists = core.CounterMetricFamily(
            f"{prefix}relists", "Lists of a watched collection", labels=["collection"]
        )
        age = core.GaugeMetricFamily(
            f"{prefix}last_event_age_seconds", "Since a watch was last heard", labels=["collection"]
        )
        now = asyncio.get_running_loop().time()
        for name, mirror in self.observers.all().items():
            objects.add_metric([name], len(mirror.store))
            relists.add_metric([name], mirror.relists)
            if mirror.heard_at is not None:
                age.add_metric([name], now - mirror.heard_at)
        yield objects
        yield relists
        yield age


def stop_on_signals(stop: asyncio.Event) -> None:
    """Set `stop` on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


async def serve(settings: Settings) -> int:
    """Run the operator until a signal; return the exit code."""
    stop = asyncio.Event()
    stop_on_signals(stop)
    version = metadata.version("hostint")
    log.info("operator starting", version=version, namespace=settings.namespace)
    code = 1
    try:
        async with client.connect(settings.kubeconfig) as api:
            await Operator(api, settings).run(stop)
        code = 0
    except* LeadershipLostError:
        log.error("leadership lost, exiting so that nothing is written by two")
        code = 1
    log.info("operator stopped", code=code)
    return code


def main() -> None:
    """Run the command line program."""
    settings = parse(sys.argv[1:], os.environ)
    logs.configure(settings.log_level)
    try:
        code = asyncio.run(serve(settings))
    except client.SetupError as error:
        log.error("no way to the API server", error=str(error))
        code = 2
    except Exception:
        # Whatever it is goes into the log; the kubelet starts us over.
        log.critical("operator failed", exc_info=True)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
