# SPDX-License-Identifier: Apache-2.0
"""Check of `hostint-agent doctor` whether the agent's HTTP server can listen where it is told to, or does."""

import contextlib
import errno
import http.client
import json
import os
import socket

from hostint_agent.doctor import finding
from hostint_agent.doctor.finding import Finding

_TIMEOUT_S = 2.0
_ANOTHER = "choose another address with --http HOST:PORT (env HOSTINT_HTTP)"


def address(listen: tuple[str, int] | None) -> Finding:
    """An agent answers there, or the port is free. Nothing listens on it meanwhile: it is bound and let go."""
    if listen is None:
        return finding.ok("http", "switched off: no metrics, no health")
    host, port = listen
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return finding.failure("http", f"{where}: {error.strerror}", _ANOTHER)
    else:
        return finding.ok("http", f"{where} is free")
    node = _node(host, port)
    if node is None:
        return finding.failure("http", f"{where} is in use, and not by an agent", _ANOTHER)
    return finding.ok("http", f"the agent of node {node} answers at {where}")


def _bind(host: str, port: int) -> None:
    """Raises OSError."""
    listed = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = listed[0]
    with socket.socket(family, kind, protocol) as probe:
        # as the server does: connections of one that ended must not count
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0)) from None


def _node(host: str, port: int) -> str | None:
    """Which node's agent listens there; None if it is none of ours."""
    # what listens everywhere is reached by the loopback
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    asking = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        with contextlib.closing(asking):
            asking.request("GET", "/api/v1/topology")
            return str(json.load(asking.getresponse())["node"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None
