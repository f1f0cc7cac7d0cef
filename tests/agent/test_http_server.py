# SPDX-License-Identifier: Apache-2.0
"""What clients do to the HTTP server costs nobody else anything, and neither does a port that is taken."""

import contextlib
import http.client
import os
import resource
import select
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest
import structlog

from hostint_agent import http_server
from hostint_agent.http_server import Answer, Client, Server, Site
from tests.agent.cable import FAR, cable
from tests.agent.exports import Clock
from tests.agent.rings import eventually

LARGE = b"x" * 400_000
PAGES = {
    "/ok": lambda _: http_server.text(200, "ok"),
    "/large": lambda _: Answer(200, http_server.TEXT, LARGE),
    "/who": lambda client: http_server.text(200, f"{client.address} {client.is_here}"),
}
CLIENTS = 1000


def free_port(host: str = "127.0.0.1") -> int:
    with http_server.bind(host, 0) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def serving(*sites: Site) -> Iterator[Server]:
    """A server in a thread of its own."""
    wake = os.eventfd(0)
    server = Server(sites, wake)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        os.eventfd_write(wake, 1)
        thread.join()
        os.close(wake)


@contextlib.contextmanager
def one_site(host: str = "127.0.0.1") -> Iterator[tuple[str, int]]:
    """The address of a server with PAGES."""
    address = (host, free_port(host))
    with serving(Site("pages", address, PAGES)):
        yield address


def get(address: tuple[str, int], path: str = "/ok", method: str = "GET") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address, timeout=5)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()


def raw(address: tuple[str, int], request: bytes) -> bytes:
    """Everything that comes back for these bytes."""
    with socket.create_connection(address, 5) as opened:
        opened.sendall(request)
        found = b""
        while data := opened.recv(65536):
            found += data
        return found


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for a thousand connections with both ends in this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 8192), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def say_nothing(_: socket.socket) -> None:
    pass


def say_a_byte(opened: socket.socket) -> None:
    opened.send(b"G")


def never_read(opened: socket.socket) -> None:
    opened.send(b"GET /large HTTP/1.1\r\n\r\n")


HABITS = {"silent": say_nothing, "slow": say_a_byte, "not reading": never_read}


@contextlib.contextmanager
def clients(address: tuple[str, int], count: int, habits: list) -> Iterator[list[socket.socket]]:
    """So many that have just connected, and behave by turns."""
    with contextlib.ExitStack() as stack:
        opened = []
        for number in range(count):
            one = stack.enter_context(socket.create_connection(address, 5))
            opened.append(one)
            with contextlib.suppress(OSError):
                habits[number % len(habits)](one)
        yield opened


@pytest.mark.parametrize("habits", [*([h] for h in HABITS.values()), [*HABITS.values()]])
def test_probe_is_answered_at_once_beside_1000_slow_clients(many_files, habits):
    with one_site() as address, clients(address, CLIENTS, habits) as opened:
        for _ in range(5):
            begun = time.monotonic()
            assert get(address) == (200, b"ok\n")
            assert time.monotonic() - begun < 1
            for one in opened:
                # a byte now and then
                with contextlib.suppress(OSError):
                    one.send(b"x")


def test_probe_is_answered_while_clients_come_again_and_again(many_files):
    """As fast as they can, each as soon as it has lost its connection."""
    stop = threading.Event()

    def attack() -> None:
        kept: list[socket.socket] = []
        while not stop.is_set():
            with contextlib.suppress(OSError):
                kept.append(socket.create_connection(address, 5))
                kept[-1].send(b"GET /ok HT")
            if len(kept) > 300:
                kept.pop(0).close()
        for one in kept:
            one.close()

    with one_site() as address:
        attacking = threading.Thread(target=attack)
        attacking.start()
        try:
            for _ in range(20):
                begun = time.monotonic()
                assert get(address) == (200, b"ok\n")
                assert time.monotonic() - begun < 1
                time.sleep(0.05)
        finally:
            stop.set()
            attacking.join()


def test_places_are_few_and_the_client_that_has_most_loses_them(many_files):
    site = Site("pages", ("127.0.0.1", free_port()), PAGES)
    with serving(site) as server:
        (listener,) = server._listeners
        with contextlib.ExitStack() as stack:

            def connect(source: str) -> socket.socket:
                return stack.enter_context(
                    socket.create_connection(site.listen, 5, source_address=(source, 0))
                )

            modest = [connect("127.0.0.2") for _ in range(10)]
            greedy = [connect("127.0.0.3") for _ in range(CLIENTS)]
            surplus = CLIENTS + len(modest) - http_server.MAX_CONNECTIONS
            eventually(lambda: sum(map(is_closed, greedy)) == surplus)
            assert len(listener.connections) == http_server.MAX_CONNECTIONS
            assert not any(is_closed(one) for one in modest)
            # the latest are those that stay
            assert not is_closed(greedy[-1])
            for one in modest:
                one.sendall(b"GET /ok HTTP/1.1\r\n\r\n")
                assert one.recv(100).startswith(b"HTTP/1.1 200 OK")


def is_closed(opened: socket.socket) -> bool:
    """Whether the other end has."""
    asked = select.poll()
    asked.register(opened, select.POLLRDHUP)
    return bool(asked.poll(0))


@pytest.mark.parametrize("habit", HABITS.values())
def test_time_is_for_the_whole_request_and_not_for_a_byte(monkeypatch, habit):
    monkeypatch.setattr(http_server, "DEADLINE_S", 0.5)
    with one_site() as address, clients(address, 1, [habit]) as (one,):
        begun = time.monotonic()
        one.setblocking(False)
        while time.monotonic() - begun < 0.3:
            time.sleep(0.02)
            with contextlib.suppress(OSError):
                one.send(b"x")
        # that of `never_read` has its answer, as far as it takes it
        assert habit is never_read or not is_closed(one)
        one.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while one.recv(65536):
                pass
        assert time.monotonic() - begun < 1.5


def test_what_is_not_read_is_bounded(monkeypatch, many_files):
    site = Site("pages", ("127.0.0.1", free_port()), PAGES)
    with serving(site) as server, clients(site.listen, 100, [never_read]):
        (listener,) = server._listeners
        unread = lambda: sum(len(each.unread) for each in list(listener.connections))  # noqa: E731
        eventually(lambda: unread() > http_server._MAX_UNREAD_BYTES // 2)
        assert get(site.listen, "/large") == (200, LARGE)
        assert unread() <= http_server._MAX_UNREAD_BYTES


def test_client_that_sends_without_end_is_cut_off():
    with one_site() as address, socket.create_connection(address, 5) as opened:
        opened.sendall(b"GET /ok HTTP/1.1\r\n\r\n")
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 64 << 20:
                sent += opened.send(bytes(1 << 16))
        assert sent < 8 << 20


def test_idle_server_does_not_wake_up():
    wake = os.eventfd(0)
    server = Server([Site("pages", ("127.0.0.1", free_port()), PAGES)], wake)
    assert server._timeout_s() is None
    os.eventfd_write(wake, 1)
    server.run()
    os.close(wake)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /ok HTTP/1.1\r\n\r\n", 200),
        (b"GET /ok HTTP/1.0\r\n\r\n", 200),
        (b"GET /ok?a=b HTTP/1.1\nHost: x\n\n", 200),
        (b"GET /no HTTP/1.1\r\n\r\n", 404),
        (b"POST /ok HTTP/1.1\r\n\r\n", 405),
        (b"POST /ok HTTP/1.1\r\nContent-Length: 200000\r\n\r\n" + bytes(200_000), 405),
        (b"GET /ok\r\n\r\n", 400),
        (b"GET /ok HTTP/2\r\n\r\n", 400),
        (b"\x16\x03\x01\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /ok HTTP/1.1\r\nA: " + b"a" * 8200, 431),
        (b"G" * 200_000, 431),
    ],
)
def test_every_request_has_one_answer(request_, status):
    with one_site() as address:
        answer = raw(address, request_)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert f"Content-Length: {len(body)}".encode() in head
        assert b"Connection: close" in head
        assert get(address) == (200, b"ok\n")


def test_request_may_come_byte_by_byte():
    with one_site() as address, socket.create_connection(address, 5) as opened:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"GET /ok HTTP/1.1\r\nHost: x\r\n\r\n":
            opened.send(bytes([byte]))
            time.sleep(0.002)
        assert opened.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_head_has_the_length_and_no_body():
    with one_site() as address:
        head, _, body = raw(address, b"HEAD /large HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
        assert f"Content-Length: {len(LARGE)}".encode() in head
        assert body == b""


def test_large_answer_arrives_whole_at_a_slow_reader():
    with one_site() as address, socket.create_connection(address, 5) as opened:
        opened.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        found = b""
        while data := opened.recv(20_000):
            found += data
            time.sleep(0.005)
        assert found.partition(b"\r\n\r\n")[2] == LARGE


@pytest.mark.parametrize(
    ("host", "by", "seen"),
    [
        ("::", "127.0.0.1", "127.0.0.1"),
        ("::", "::1", "::1"),
        ("0.0.0.0", "127.0.0.1", "127.0.0.1"),
        ("::1", "::1", "::1"),
    ],
)
def test_everywhere_is_both_families(host, by, seen):
    port = free_port(host)
    with serving(Site("pages", (host, port), PAGES)):
        assert get((by, port), "/who") == (200, f"{seen} True\n".encode())


@pytest.mark.bpf
def test_host_without_ipv6_listens_all_the_same():
    with cable() as (near, far), contextlib.ExitStack() as stack:
        far.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
        far.inside(lambda: stack.enter_context(serving(Site("pages", ("::", 9464), PAGES))))
        assert near.inside(lambda: get((FAR, 9464), "/who")) == (200, b"10.98.0.1 False\n")


def test_port_in_use_is_logged_once_and_taken_when_free(monkeypatch):
    monkeypatch.setattr(http_server, "_FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(http_server, "_LAST_RETRY_S", 0.1)
    taken, free = free_port(), free_port()
    with structlog.testing.capture_logs() as logs, contextlib.ExitStack() as stack:
        other = socket.create_server(("127.0.0.1", taken))
        sites = [Site("metrics", ("127.0.0.1", taken), PAGES)]
        sites += [Site("health", ("127.0.0.1", free), PAGES)]
        stack.enter_context(serving(*sites))
        time.sleep(0.5)
        assert get(("127.0.0.1", free)) == (200, b"ok\n"), "the other site does not care"
        other.close()

        def is_served() -> bool:
            with contextlib.suppress(OSError):
                return get(("127.0.0.1", taken)) == (200, b"ok\n")
            return False

        eventually(is_served)
    where = f"127.0.0.1:{taken}"
    assert [(e["event"], e["pages"], e["address"], e.get("error")) for e in logs] == [
        ("http port not served, retrying", "metrics", where, "Address already in use"),
        ("http port served again", "metrics", where, None),
    ]


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        (("192.0.2.77", 9464), "Cannot assign requested address"),
        (("collector.invalid", 9464), ""),
    ],
)
def test_address_that_is_not_there_yet_is_tried_again(listen, words):
    clock = Clock()
    wake = os.eventfd(0)
    with structlog.testing.capture_logs() as logs:
        server = Server([Site("metrics", listen, PAGES)], wake, clock)
        waits = []
        for _ in range(8):
            waits.append(server._timeout_s())
            clock.now += waits[-1]
            server._keep_time()
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30]
    assert [entry["event"] for entry in logs] == ["http port not served, retrying"]
    assert words in logs[0]["error"]
    os.eventfd_write(wake, 1)
    server.run()
    os.close(wake)


NO_FILES = """
    import os, resource, socket, sys, threading, time
    from hostint_agent.http_server import Server, Site, text
    site = Site("pages", ("127.0.0.1", int(sys.argv[1])), {"/ok": lambda _: text(200, "ok")})
    server = Server([site], os.eventfd(0))
    threading.Thread(target=server.run, daemon=True).start()
    files = [os.dup(0) for _ in range(20)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[-1] + 1, files[-1] + 1))
    print("full", flush=True)
    sys.stdin.readline()
    before = time.process_time()
    time.sleep(1)
    print(time.process_time() - before, flush=True)
    for file in files:
        os.close(file)
    time.sleep(30)
"""


def test_process_without_free_descriptors_neither_spins_nor_stays_deaf():
    port = free_port()
    command = [sys.executable, "-c", textwrap.dedent(NO_FILES), str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as child:
        try:
            assert child.stdout.readline() == "full\n"
            with socket.create_connection(("127.0.0.1", port), 5):
                child.stdin.write("\n")
                child.stdin.flush()
                assert float(child.stdout.readline()) < 0.3
            assert get(("127.0.0.1", port)) == (200, b"ok\n")
        finally:
            child.kill()


def test_client_that_resets_costs_nobody_anything():
    with one_site() as address:
        for _ in range(50):
            opened = socket.create_connection(address, 5)
            opened.send(b"GET /large HTTP/1.1\r\n\r\n")
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
            opened.close()
        assert get(address) == (200, b"ok\n")


def test_client_of_this_host_is_known_by_its_address():
    assert Client(http_server._address(("::ffff:10.0.0.1", 1)), False).address.version == 4
    assert str(http_server._address(("fe80::1%eth0", 1))) == "fe80::1"
