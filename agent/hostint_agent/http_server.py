# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server whose cost is bounded whatever its clients do.

With the host's network every pod reaches the agent's ports, and may open a thousand connections
that say nothing, a byte a second, or never read the answer. http.server takes a thread for each and
limits the time per byte; asyncio and aiohttp limit neither connections nor the time of a request.
Here one thread serves each listener at most MAX_CONNECTIONS connections, each for one answer and
for DEADLINE_S in all. When one more comes, the client that has the most loses its oldest.

A listener that cannot be opened is logged and tried again: a port that another program has must
cost nothing but the pages on it.
"""

import errno
import http
import ipaddress
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

MAX_CONNECTIONS = 128
DEADLINE_S = 10.0
# of one request, and of all answers that a listener's clients have not read yet
_MAX_REQUEST_BYTES = 8 << 10
_MAX_UNREAD_BYTES = 8 << 20
# of one client, after its request
_MAX_SURPLUS_BYTES = 1 << 20
# The kernel's share of what one connection takes.
_BUFFER_BYTES = 64 << 10
# A connection that finds no room in the queue is tried again by its client a second later.
_BACKLOG = 1024
# at a time, so that one listener does not keep the other waiting
_MAX_ACCEPTS = 8
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 30.0
_NO_ROOM = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_NO_ROOM_PAUSE_S = 0.2
_NO_IPV6 = frozenset((errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL))

NAME = "hostint-agent"
TEXT = "text/plain; charset=utf-8"

log = structlog.get_logger()

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Client:
    """The other end of a connection."""

    address: Address
    # a process of this host: it comes from the loopback, or from the very address that it goes to
    is_here: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back."""

    status: int
    content_type: str
    body: bytes


Page = Callable[[Client], Answer]


@dataclass(frozen=True, slots=True)
class Site:
    """Where to listen (host, port), and the pages there by path."""

    name: str
    listen: tuple[str, int]
    pages: Mapping[str, Page]


class _BadRequest(Exception):
    """A request that has no page as answer: (status, words)."""


def text(status: int, words: str) -> Answer:
    """Return a page of one line."""
    return Answer(status, TEXT, f"{words}\n".encode())


def bind(host: str, port: int) -> socket.socket:
    """Return a bound TCP socket, as every listener here is. Raises OSError.

    `::` is every address of both families, or of IPv4 on a host without IPv6.
    """
    if host != "::":
        return _bound(host, port)
    try:
        return _bound(host, port)
    except OSError as error:
        if error.errno not in _NO_IPV6:
            raise
    return _bound("0.0.0.0", port)  # noqa: S104 (what was asked for)


def _bound(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    made = socket.socket(family, kind, protocol)
    try:
        # connections of a process that ended must not keep the address
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def shown(listen: tuple[str, int]) -> str:
    """Return HOST:PORT."""
    host, port = listen
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _address(of: tuple[str, int]) -> Address:
    address = ipaddress.ip_address(of[0].partition("%")[0])
    # that of an IPv4 client of a listener for both families
    return getattr(address, "ipv4_mapped", None) or address


def parse(request: bytes) -> tuple[str, str]:
    """Return method and path of a request's head. Raises _BadRequest."""
    line = request.partition(b"\n")[0].decode("latin-1").strip()
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _BadRequest(400, "not an HTTP/1 request")
    method, target, _ = words
    if method not in ("GET", "HEAD"):
        raise _BadRequest(405, f"{method[:20]} is not possible; GET and HEAD are")
    return method, target.partition("?")[0]


def _head(answer: Answer) -> bytes:
    phrase = http.HTTPStatus(answer.status).phrase
    lines = [
        f"HTTP/1.1 {answer.status} {phrase}",
        f"Server: {NAME}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Connection: close",
    ]
    if answer.status == 405:
        lines.append("Allow: GET, HEAD")
    return "\r\n".join([*lines, "", ""]).encode()


@dataclass(eq=False, slots=True)
class _Connection:
    socket: socket.socket
    client: Client
    listener: "_Listener"
    # when it is closed, whatever state it is in
    ends: float
    received: bytearray = field(default_factory=bytearray)
    # what the client has not taken yet of its answer
    unread: memoryview = field(default_factory=lambda: memoryview(b""))
    answered: bool = False
    # what came after the request
    surplus_bytes: int = 0


class _Listener:
    """One listening socket, or the wish for it, and its connections in order of arrival."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.socket: socket.socket | None = None
        self.connections: dict[_Connection, None] = {}
        self._by_client: dict[Address, dict[_Connection, None]] = {}
        # while it is not open, or has no room for connections: when to try again
        self.retry_at = -1.0
        self._delay_s = _FIRST_RETRY_S
        self._failing = False

    def open(self, now: float) -> None:
        """Try to listen."""
        where = self.site.listen
        try:
            opened = bind(*where)
            try:
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    opened.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
                opened.listen(_BACKLOG)
            except OSError:
                opened.close()
                raise
        except OSError as error:
            self._failed(error, now)
            return
        opened.setblocking(False)
        self.socket = opened
        if self._failing:
            log.info("http port served again", pages=self.site.name, address=shown(where))
        self._failing, self._delay_s = False, _FIRST_RETRY_S

    def _failed(self, error: OSError, now: float) -> None:
        if not self._failing:
            log.warning(
                "http port not served, retrying",
                pages=self.site.name,
                address=shown(self.site.listen),
                error=error.strerror or str(error),
            )
        self._failing = True
        self.retry_at = now + self._delay_s
        self._delay_s = min(2 * self._delay_s, _LAST_RETRY_S)

    def add(self, connection: _Connection) -> None:
        """Take a connection in, which is the latest."""
        self.connections[connection] = None
        self._by_client.setdefault(connection.client.address, {})[connection] = None

    def remove(self, connection: _Connection) -> None:
        """Forget a connection."""
        del self.connections[connection]
        address = connection.client.address
        del self._by_client[address][connection]
        if not self._by_client[address]:
            del self._by_client[address]

    def surplus(self) -> _Connection:
        """Return the oldest connection of the client that has the most."""
        most: dict[_Connection, None] = max(self._by_client.values(), key=len)
        return next(iter(most))


class Server:
    """Serves its sites in the thread that calls `run`."""

    def __init__(
        self, sites: Sequence[Site], wake: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Listen, where that is possible now. `run` ends once the descriptor `wake` is readable."""
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._selector.register(wake, selectors.EVENT_READ, None)
        self._listeners = [_Listener(site) for site in sites]
        for listener in self._listeners:
            self._open(listener)

    def run(self) -> None:
        """Serve until woken, and close everything."""
        try:
            while self._turn():
                pass
        finally:
            for listener in self._listeners:
                for connection in list(listener.connections):
                    self._close(connection)
                if listener.socket:
                    listener.socket.close()
            self._selector.close()

    def _turn(self) -> bool:
        """Wait for something to do, and do it; return False once woken."""
        for key, _ in self._selector.select(self._timeout_s()):
            if key.data is None:
                return False
            if isinstance(key.data, _Listener):
                self._accept(key.data)
            # an event of this turn may have closed it
            elif key.data in key.data.listener.connections:
                self._go_on(key.data)
        self._keep_time()
        return True

    def _timeout_s(self) -> float | None:
        """Return how long nothing has to be done unless a client does something."""
        times = [next(iter(each.connections)).ends for each in self._listeners if each.connections]
        times += [each.retry_at for each in self._listeners if each.retry_at >= 0]
        return max(0.0, min(times) - self._clock()) if times else None

    def _keep_time(self) -> None:
        now = self._clock()
        for listener in self._listeners:
            # in order of arrival, and each has the same time
            for connection in list(listener.connections):
                if connection.ends > now:
                    break
                self._close(connection)
            if 0 <= listener.retry_at <= now:
                listener.retry_at = -1.0
                self._open(listener)

    def _open(self, listener: _Listener) -> None:
        if listener.socket is None:
            listener.open(self._clock())
        if listener.socket:
            self._selector.register(listener.socket, selectors.EVENT_READ, listener)

    def _accept(self, listener: _Listener) -> None:
        assert listener.socket  # noqa: S101 (else it had no event)
        for _ in range(_MAX_ACCEPTS):
            try:
                accepted, peer = listener.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._make_room(listener)
                    return
                # the client has gone already
                continue
            if len(listener.connections) >= MAX_CONNECTIONS:
                self._close(listener.surplus())
            self._begin(listener, accepted, peer)

    def _make_room(self, listener: _Listener) -> None:
        """Leave new connections where they are for a moment, and close those there are."""
        assert listener.socket  # noqa: S101
        for connection in list(listener.connections):
            self._close(connection)
        self._selector.unregister(listener.socket)
        listener.retry_at = self._clock() + _NO_ROOM_PAUSE_S

    def _begin(self, listener: _Listener, accepted: socket.socket, peer: tuple[str, int]) -> None:
        accepted.setblocking(False)
        try:
            here, there = _address(accepted.getsockname()), _address(peer)
        except OSError:
            accepted.close()
            return
        client = Client(there, there.is_loopback or there == here)
        made = _Connection(accepted, client, listener, self._clock() + DEADLINE_S)
        listener.add(made)
        self._selector.register(accepted, selectors.EVENT_READ, made)
        # most clients have sent their request by now
        self._go_on(made)

    def _close(self, connection: _Connection) -> None:
        connection.listener.remove(connection)
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _go_on(self, connection: _Connection) -> None:
        try:
            if connection.unread:
                self._send(connection)
            else:
                self._receive(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection)

    def _receive(self, connection: _Connection) -> None:
        data = connection.socket.recv(_MAX_REQUEST_BYTES)
        if not data:
            self._close(connection)
            return
        # What comes after a request is read and left alone: closing with unread bytes resets the
        # connection, and the client may lose its answer.
        if connection.answered:
            connection.surplus_bytes += len(data)
            if connection.surplus_bytes > _MAX_SURPLUS_BYTES:
                self._close(connection)
            return
        connection.received += data
        if answer := self._answer(connection):
            connection.answered = True
            self._start_sending(connection, answer)

    def _answer(self, connection: _Connection) -> bytes | None:
        """Return the bytes of the answer; None while the request is not complete."""
        received = connection.received
        complete = b"\r\n\r\n" in received or b"\n\n" in received
        if not complete and len(received) <= _MAX_REQUEST_BYTES:
            return None
        method = "GET"
        try:
            if not complete:
                raise _BadRequest(431, f"more than {_MAX_REQUEST_BYTES} bytes of headers")
            method, path = parse(bytes(received))
            answer = _page(connection.listener.site.pages, path, connection.client)
        except _BadRequest as error:
            answer = text(*error.args)
        connection.received.clear()
        return _head(answer) + (b"" if method == "HEAD" else answer.body)

    def _start_sending(self, connection: _Connection, answer: bytes) -> None:
        listener = connection.listener
        unread = [each for each in listener.connections if each.unread]
        total = len(answer) + sum(len(each.unread) for each in unread)
        for slow in unread:
            if total <= _MAX_UNREAD_BYTES:
                break
            total -= len(slow.unread)
            self._close(slow)
        connection.unread = memoryview(answer)
        self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
        self._send(connection)

    def _send(self, connection: _Connection) -> None:
        sent = connection.socket.send(connection.unread)
        connection.unread = connection.unread[sent:]
        if not connection.unread:
            connection.socket.shutdown(socket.SHUT_WR)
            self._selector.modify(connection.socket, selectors.EVENT_READ, connection)


def _page(pages: Mapping[str, Page], path: str, client: Client) -> Answer:
    page = pages.get(path)
    if page is None:
        return text(404, f"no such page; there are {', '.join(pages)}")
    try:
        return page(client)
    except Exception:  # the client is told, and the log says why
        log.exception("page failed", path=path)
        return text(500, "failed; the agent's log says why")
