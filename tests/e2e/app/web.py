# SPDX-License-Identifier: Apache-2.0
"""The demo's web service: HTTP on port 8080, asks the backend for every page."""

import http.server
import os
import socket

BACKEND = (os.environ["BACKEND_SERVICE_HOST"], int(os.environ["BACKEND_SERVICE_PORT"]))
TIMEOUT_S = 2.0


def ask_backend(key: str) -> bytes:
    """One value from the backend. Raises OSError."""
    with socket.create_connection(BACKEND, timeout=TIMEOUT_S) as connection:
        connection.sendall(f"{key}\n".encode())
        return connection.makefile("rb").readline()


class Handler(http.server.BaseHTTPRequestHandler):
    """A page is a value of the backend; no backend, no page."""

    def do_GET(self) -> None:
        """Answer one request."""
        try:
            status, body = 200, ask_backend(self.path)
        except OSError as error:
            status, body = 502, f"backend: {error}\n".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: the client tells what it got."""


http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Handler).serve_forever()  # noqa: S104
