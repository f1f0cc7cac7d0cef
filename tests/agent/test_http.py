# SPDX-License-Identifier: Apache-2.0
"""The agent's pages say what the agent says, to those who may know it."""

import contextlib
import http.client
import ipaddress
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent import futures

import pytest
import structlog

from hostint_agent import http as server
from hostint_agent import metrics
from tests.agent.cable import FAR, FAR6, cable
from tests.agent.snapshots import DATAPATH, NOW, WATCHLIST
from tests.lab.namespace import Namespace

SAID = {
    "metrics": lambda: metrics.families(NOW),
    "not_alive": lambda: None,
    "not_ready": lambda: None,
    "topology": lambda: {"links": []},
}


def free_port(host: str) -> int:
    """A port of this address that nobody has."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def serving(host: str = "127.0.0.1", **pages: object) -> Iterator[tuple[str, int]]:
    """A server on a free port, with what the agent would say."""
    port = free_port(host)
    with server.serve((host, port), **(SAID | pages)):
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


def test_a_page_that_is_not_there_or_fails_says_so_and_the_others_stay():
    def broken() -> None:
        raise ValueError("nobody knows")

    with serving(topology=broken) as address, structlog.testing.capture_logs() as logs:
        assert get(address, "/nothing")[::2] == (
            404,
            "no such page; there are /metrics, /healthz, /readyz, /api/v1/topology\n",
        )
        assert get(address, "/api/v1/topology")[0] == 500
        assert get(address, "/healthz")[0] == 200
    assert [(entry["event"], entry["path"]) for entry in logs] == [
        ("page failed", "/api/v1/topology")
    ]


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


def test_health_has_a_place_of_its_own():
    port = free_port("127.0.0.1")
    with serving(health=("127.0.0.1", port)) as address:
        for at in (address, ("127.0.0.1", port)):
            assert get(at, "/healthz")[::2] == (200, "ok\n")
            assert get(at, "/readyz")[::2] == (200, "ok\n")
        assert get(("127.0.0.1", port), "/metrics")[::2] == (
            404,
            "no such page; there are /healthz, /readyz\n",
        )


def test_nothing_is_served_where_nothing_is_wanted():
    before = threading.active_count()
    with server.serve(None, **SAID):
        assert threading.active_count() == before


NETWORKS = {FAR: "10.98.0.0/24", FAR6: "fd98::/64"}
SECRET = ("/metrics", "/api/v1/topology")
OPEN = ("/healthz", "/readyz")


def statuses(end: Namespace, address: str, port: int, paths: Iterable[str]) -> list[int]:
    """What an end of the cable is answered."""
    return [end.inside(lambda path=path: get((address, port), path))[0] for path in paths]


@pytest.mark.bpf
@pytest.mark.parametrize("far_address", [FAR, FAR6])
def test_metrics_and_topology_are_for_this_host_and_who_is_allowed(far_address):
    """The agent is at the far end of the cable, and listens at every address."""
    everywhere = ("::", 9464)

    def agent(*allow: str) -> contextlib.AbstractContextManager[object]:
        networks = [ipaddress.ip_network(text) for text in allow]
        return server.serve(everywhere, **SAID, allow=networks)

    def entered(context: contextlib.AbstractContextManager[object]) -> None:
        far.inside(lambda: stack.enter_context(context))

    with cable() as (near, far):
        loopback = "::1" if ":" in far_address else "127.0.0.1"
        other = "fd97::/64" if ":" in far_address else "10.97.0.0/16"
        for allow, expected in (((), 403), ((other,), 403), ((NETWORKS[far_address],), 200)):
            with contextlib.ExitStack() as stack:
                entered(agent(*allow))
                assert statuses(near, far_address, 9464, SECRET) == [expected] * 2
                assert statuses(near, far_address, 9464, OPEN) == [200, 200]
                # its own host: by the loopback, and by its own address
                for address in (loopback, far_address):
                    assert statuses(far, address, 9464, (*SECRET, *OPEN)) == [200] * 4


@pytest.mark.bpf
def test_refused_client_is_told_why():
    with cable() as (near, far), contextlib.ExitStack() as stack:
        far.inside(lambda: stack.enter_context(server.serve(("::", 9464), **SAID)))
        status, _, words = near.inside(lambda: get((FAR, 9464), "/metrics"))
        assert (status, words) == (
            403,
            "10.98.0.1 may not read this; the agent's --http-allow lists who may\n",
        )
