# SPDX-License-Identifier: Apache-2.0
"""Checks of `hostint-agent doctor` whether the agent's HTTP server can listen, or does."""

import contextlib
import errno
import http.client
import json
import os

from hostint_agent import http_server
from hostint_agent.doctor import finding
from hostint_agent.doctor.finding import Finding

_TIMEOUT_S = 2.0
_GO_ON = "; a running agent goes on without it, and tries again"


def address(listen: tuple[str, int] | None) -> Finding:
    """Check where metrics, topology and health are served."""
    if listen is None:
        return finding.ok("http", "switched off: no metrics, no topology")
    remedy = f"choose another address with --http HOST:PORT (env HOSTINT_HTTP){_GO_ON}"
    try:
        if _is_free(listen):
            return finding.ok("http", f"{http_server.shown(listen)} is free")
    except OSError as error:
        return finding.warning("http", f"{http_server.shown(listen)}: {error.strerror}", remedy)
    _, body = _ask(listen, "/api/v1/topology")
    where = http_server.shown(listen)
    try:
        node = str(json.loads(body)["node"])
    except (ValueError, KeyError, TypeError):
        return finding.warning("http", f"{where} is in use, and not by an agent", remedy)
    return finding.ok("http", f"the agent of node {node} answers at {where}")


def health(listen: tuple[str, int] | None) -> Finding:
    """Check where health alone is served, which the readiness probe asks for."""
    if listen is None:
        return finding.ok("health", "switched off: a readiness probe must ask at --http")
    remedy = (
        "choose another address with --health HOST:PORT (env HOSTINT_HEALTH), "
        f"and give it to the readiness probe{_GO_ON}, but its pod is not ready"
    )
    where = http_server.shown(listen)
    try:
        if _is_free(listen):
            return finding.ok("health", f"{where} is free")
    except OSError as error:
        return finding.failure("health", f"{where}: {error.strerror}", remedy)
    server, body = _ask(listen, "/readyz")
    if server != http_server.NAME:
        return finding.failure("health", f"{where} is in use, and not by an agent", remedy)
    words = body.decode(errors="replace").strip()
    return finding.ok("health", f"an agent answers at {where}: {words[:80]}")


def _is_free(listen: tuple[str, int]) -> bool:
    """Return whether an agent could listen there. Nothing listens meanwhile. Raises OSError."""
    try:
        http_server.bind(*listen).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        # the words of the system, without those that Python adds
        code = error.errno or 0
        raise OSError(code, os.strerror(code) if code > 0 else error.strerror) from None
    return True


def _ask(listen: tuple[str, int], path: str) -> tuple[str, bytes]:
    """Return what the server there calls itself, and a page; both empty if it speaks no HTTP."""
    host, port = listen
    # what listens everywhere is reached by the loopback
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
    asking = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        with contextlib.closing(asking):
            asking.request("GET", path)
            answer = asking.getresponse()
            return answer.headers.get("Server", ""), answer.read()
    except (OSError, http.client.HTTPException):
        return "", b""
