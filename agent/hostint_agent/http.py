# SPDX-License-Identifier: Apache-2.0
"""The agent's HTTP server: /metrics, /healthz, /readyz and /api/v1/topology.

The standard library's, as in prometheus_client: four small pages, asked for a few times a minute, are not worth the memory of a
framework on every node.
"""

import contextlib
import http.server
import json
import os
import select
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import prometheus_client
import structlog
from prometheus_client import core

# of one request; who is slower than that holds a thread for no good reason
_TIMEOUT_S = 10
_MOST_AT_ONCE = 64
_TEXT, _JSON = "text/plain; charset=utf-8", "application/json; charset=utf-8"

log = structlog.get_logger()

# status, content type, body
Answer = tuple[int, str, bytes]
Page = Callable[[], Answer]


class HttpError(Exception):
    """The server could not listen; says where and why."""


class Collector:
    """Asks for the metrics at every scrape."""

    def __init__(self, collect: Callable[[], Iterable[core.Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[core.Metric]:
        """All metric families now."""
        return self._collect()


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout: ClassVar[int] = _TIMEOUT_S
    server: "_Server"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        status, kind, body = self._page(path)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _page(self, path: str) -> Answer:
        page = self.server.pages.get(path)
        if page is None:
            return 404, _TEXT, f"no such page; there are {', '.join(self.server.pages)}\n".encode()
        try:
            return page()
        except Exception:  # whoever asks is told, and so is who reads the log
            log.exception("page failed", path=path)
            return 500, _TEXT, b"failed; the agent's log says why\n"

    def version_string(self) -> str:
        return "hostint-agent"

    def log_message(self, *_: object) -> None:
        """Nothing: health is asked for every few seconds."""


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = _MOST_AT_ONCE

    def __init__(self, listen: tuple[str, int], pages: dict[str, Page]) -> None:
        family, *_, address = socket.getaddrinfo(
            *listen, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self.address_family = family
        self.pages = pages
        self._room = threading.BoundedSemaphore(_MOST_AT_ONCE)
        super().__init__(address[:2], _Handler)  # type: ignore[arg-type]

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, *_: object) -> None:
        """Nothing: who asked went away."""


def _health(trouble: str | None) -> Answer:
    return 503 if trouble else 200, _TEXT, f"{trouble or 'ok'}\n".encode()


def _run(server: _Server, wake: int) -> None:
    """Serve until `wake` is readable, without waking up meanwhile."""
    bell = select.poll()
    for descriptor in (server.fileno(), wake):
        bell.register(descriptor, select.POLLIN)
    # a connection that has gone before it is accepted must not have us wait for the next one
    server.timeout = 0
    while wake not in (ready := [descriptor for descriptor, _ in bell.poll()]):
        if ready:
            server.handle_request()


@contextlib.contextmanager
def serve(
    listen: tuple[str, int] | None,
    *,
    metrics: Callable[[], Iterable[core.Metric]],
    not_alive: Callable[[], str | None],
    not_ready: Callable[[], str | None],
    topology: Callable[[], dict[str, Any]],
) -> Iterator[None]:
    """Serve, in threads, until left; `not_alive` and `not_ready` say why not, or None. Raises HttpError."""
    if listen is None:
        yield
        return
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(metrics))
    latest = prometheus_client.CONTENT_TYPE_LATEST
    pages: dict[str, Page] = {
        "/metrics": lambda: (200, latest, prometheus_client.generate_latest(registry)),
        "/healthz": lambda: _health(not_alive()),
        "/readyz": lambda: _health(not_ready()),
        "/api/v1/topology": lambda: (200, _JSON, json.dumps(topology()).encode()),
    }
    try:
        server = _Server(listen, pages)
    except OSError as error:
        raise HttpError(f"http {listen[0]}:{listen[1]}: {error.strerror}") from error
    wake = os.eventfd(0)
    thread = threading.Thread(target=_run, args=(server, wake), name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(wake, 1)
        thread.join()
        server.server_close()
        os.close(wake)
