# SPDX-License-Identifier: Apache-2.0
"""The address of the agent's HTTP server: free, an agent's, or somebody else's."""

import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from hostint_agent import attach, topology
from hostint_agent import http as agent_http
from hostint_agent.doctor import http_checks
from tests.agent.doctor.findings import fails, is_ok, warns


@contextlib.contextmanager
def listening(content: bytes | None) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if content is None:
                self.wfile.write(b"220 this speaks another protocol\r\n")
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content if self.path == "/api/v1/topology" else b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_address_that_is_free_or_not_wanted_is_ok():
    port = free_port()
    is_ok(http_checks.address(("127.0.0.1", port)), f"127.0.0.1:{port} is free")
    is_ok(http_checks.address(None), "switched off")
    is_ok(http_checks.health(("127.0.0.1", port)), f"127.0.0.1:{port} is free")
    is_ok(http_checks.health(None), "switched off")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_an_address_where_an_agent_answers_is_ok(host):
    port, health = free_port(), free_port()
    fine = lambda: None  # noqa: E731
    document = lambda: topology.document("node-1", 1, attach.State())  # noqa: E731
    with agent_http.serve(
        (host, port),
        metrics=list,
        not_alive=fine,
        not_ready=lambda: "no configuration yet",
        topology=document,
        health=("127.0.0.1", health),
    ):
        found = http_checks.address((host, port))
        is_ok(found, "the agent of node node-1 answers at", f":{port}")
        found = http_checks.health(("127.0.0.1", health))
        is_ok(found, f"an agent answers at 127.0.0.1:{health}: no configuration yet")


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b"{}", b"\xff", None])
def test_an_address_that_another_program_has_is_told(content):
    with listening(content) as port:
        found = http_checks.address(("0.0.0.0", port))
        warns(found, f"0.0.0.0:{port} is in use, and not by an agent", "HOSTINT_HTTP")
        found = http_checks.health(("127.0.0.1", port))
        fails(found, f"127.0.0.1:{port} is in use, and not by an agent", "HOSTINT_HEALTH")


def test_an_address_that_is_not_of_this_host_is_told():
    elsewhere, unknown = ("192.0.2.77", 9464), ("collector.invalid", 9464)
    warns(http_checks.address(elsewhere), "Cannot assign requested address", "--http")
    warns(http_checks.address(unknown), "collector.invalid:9464: ", "--http")
    fails(http_checks.health(elsewhere), "Cannot assign requested address", "--health")
