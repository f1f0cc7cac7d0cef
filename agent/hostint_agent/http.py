# SPDX-License-Identifier: Apache-2.0
"""The agent's pages: /metrics, /healthz, /readyz and /api/v1/topology.

Health is for everyone. Metrics and topology name watchlists, interfaces and addresses of the node:
they are for processes of this host, and for the networks that were allowed.
"""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import prometheus_client
from prometheus_client import core

from hostint_agent import http_server
from hostint_agent.http_server import Answer, Client, Network, Page

_JSON = "application/json; charset=utf-8"


class Collector:
    """Asks for the metrics at every scrape."""

    def __init__(self, collect: Callable[[], Iterable[core.Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[core.Metric]:
        """All metric families now."""
        return self._collect()


def _health(problem: Callable[[], str | None]) -> Page:
    def page(_: Client) -> Answer:
        found = problem()
        return http_server.text(503 if found else 200, found or "ok")

    return page


def _restricted(allow: Sequence[Network], content: Callable[[], tuple[str, bytes]]) -> Page:
    def page(client: Client) -> Answer:
        # an address is in no network of the other family
        if client.is_here or any(client.address in network for network in allow):
            return Answer(200, *content())
        return http_server.text(
            403, f"{client.address} may not read this; the agent's --http-allow lists who may"
        )

    return page


@contextlib.contextmanager
def serve(
    listen: tuple[str, int] | None,
    *,
    metrics: Callable[[], Iterable[core.Metric]],
    not_alive: Callable[[], str | None],
    not_ready: Callable[[], str | None],
    topology: Callable[[], dict[str, Any]],
    health: tuple[str, int] | None = None,
    allow: Sequence[Network] = (),
) -> Iterator[Callable[[], bool]]:
    """Serve, in a thread, until left; yields whether it still does.

    `listen` is where all pages are, `health` where /healthz and /readyz are alone; None: nowhere.
    `not_alive` and `not_ready` return why not, or None. `allow` lists who may read the
    rest, besides processes of this host.
    """
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(metrics))
    latest = prometheus_client.CONTENT_TYPE_LATEST
    probes = {"/healthz": _health(not_alive), "/readyz": _health(not_ready)}
    pages = {
        "/metrics": _restricted(
            allow, lambda: (latest, prometheus_client.generate_latest(registry))
        ),
        **probes,
        "/api/v1/topology": _restricted(allow, lambda: (_JSON, json.dumps(topology()).encode())),
    }
    # health first: it has a port to itself so that whatever happens to the other one is no matter
    sites = [http_server.Site("health", health, probes)] if health else []
    sites += [http_server.Site("metrics", listen, pages)] if listen else []
    if not sites:
        yield lambda: True
        return
    wake = os.eventfd(0)
    server = http_server.Server(sites, wake)
    thread = threading.Thread(target=server.run, name="http", daemon=True)
    thread.start()
    try:
        yield thread.is_alive
    finally:
        os.eventfd_write(wake, 1)
        thread.join()
        os.close(wake)
