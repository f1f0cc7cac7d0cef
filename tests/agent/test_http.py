# SPDX-License-Identifier: Apache-2.0
"""The HTTP server says what the agent says, and why it cannot listen."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import pytest

from hostint_agent import http as server
from hostint_agent import metrics
from tests.agent.snapshots import DATAPATH, NOW, WATCHLIST


@contextlib.contextmanager
def serving(host: str = "127.0.0.1", **pages: Callable[[], object]) -> Iterator[tuple[str, int]]:
    """A server on a free port, with what the agent would say."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    said = {
        "metrics": lambda: metrics.families(NOW),
        "not_alive": lambda: None,
        "not_ready": lambda: None,
        "topology": lambda: {"links": []},
    }
    with server.serve((host, port), **(said | pages)):
        yield host, port


def get(address: tuple[str, int], path: str, method: str = "GET") -> tuple[int, str, str]:
    """(status, content type, body)."""
    connection = http.client.HTTPConnection(*address, timeout=5)
    connection.request(method, path)
    answer = connection.getresponse()
    with contextlib.closing(connection):
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


def test_metrics_have_a_value_and_help_for_every_counter():
    with serving() as address:
        status, kind, text = get(address, "/metrics?name[]=any")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    for field, count in WATCHLIST.items():
        assert f'hostint_{field}_total{{watchlist="web"}} {count}.0\n' in text
        assert f"# HELP hostint_{field}_total " in text
    for counter, count in DATAPATH.items():
        assert f"hostint_{counter}_total {count}.0\n" in text
    for line in (
        'hostint_drops_by_reason_total{reason="NO_SOCKET"} 3000.0',
        'hostint_reports_sent_total{collector="default"} 3002.0',
        'hostint_reports_failed_total{collector="default"} 3003.0',
        'hostint_ring_records{ring="1"} 3005.0',
        "hostint_interfaces_attached 3006.0",
        "hostint_interfaces_failed 3007.0",
        "hostint_hold 1.0",
        'hostint_build_info{version="1.2.3"} 1.0',
    ):
        assert line in text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_health_is_ok_while_nothing_is_wrong(host):
    with serving(host) as address:
        assert get(address, "/healthz")[::2] == (200, "ok\n")
        assert get(address, "/readyz")[::2] == (200, "ok\n")
        status, kind, text = get(address, "/api/v1/topology")
        assert (status, kind.split(";")[0], json.loads(text)) == (
            200,
            "application/json",
            {"links": []},
        )
        assert get(address, "/healthz", "HEAD")[::2] == (200, "")


def test_health_says_what_is_wrong():
    with serving(not_alive=lambda: "dead", not_ready=lambda: "late") as address:
        assert get(address, "/healthz")[::2] == (503, "dead\n")
        assert get(address, "/readyz")[::2] == (503, "late\n")


def test_a_page_that_is_not_there_or_fails_says_so_and_the_others_stay(caplog):
    def broken() -> None:
        raise ValueError("nobody knows")

    with serving(topology=broken) as address:
        assert get(address, "/nothing")[::2] == (
            404,
            "no such page; there are /metrics, /healthz, /readyz, /api/v1/topology\n",
        )
        assert get(address, "/api/v1/topology")[0] == 500
        assert get(address, "/healthz", "DELETE")[0] == 501
        assert get(address, "/healthz")[0] == 200


def test_who_asks_and_says_nothing_more_keeps_nobody_waiting_and_has_no_end_of_threads():
    with serving() as address, contextlib.ExitStack() as stack:
        before = threading.active_count()
        for _ in range(40):
            stack.enter_context(socket.create_connection(address))
        assert get(address, "/healthz")[0] == 200
        for _ in range(200):
            stack.enter_context(socket.create_connection(address))
        time.sleep(0.2)
        assert threading.active_count() - before <= server._MOST_AT_ONCE
        stack.close()
        deadline = time.monotonic() + 5
        while threading.active_count() > before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert get(address, "/healthz")[0] == 200


def test_many_may_ask_at_once():
    with serving() as address, futures.ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: get(address, "/metrics"), range(200)))
    assert {status for status, _, _ in answers} == {200}
    assert len({text for _, _, text in answers}) == 1


def test_it_ends_at_once_and_lets_go_of_the_port():
    for _ in range(2):
        with serving() as address:
            begun = time.monotonic()
        assert time.monotonic() - begun < 0.3
        with pytest.raises(ConnectionRefusedError):
            get(address, "/healthz")


def test_a_port_in_use_is_told_with_the_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(server.HttpError, match=rf"http 127\.0\.0\.1:{port}: Address already"),
            server.serve(
                ("127.0.0.1", port),
                metrics=list,
                not_alive=lambda: None,
                not_ready=lambda: None,
                topology=dict,
            ),
        ):
            pass
