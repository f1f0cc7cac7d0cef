# SPDX-License-Identifier: Apache-2.0
"""The demo's database-like backend: one line in, one value out, over TCP port 5432."""

import socketserver

VALUE = "x" * 40_000


class Handler(socketserver.StreamRequestHandler):
    """Answers every line of a connection with a value of its key."""

    def handle(self) -> None:
        """Serve one connection."""
        for line in self.rfile:
            key = line.decode().strip()
            self.wfile.write(f"{key}={VALUE}\n".encode())


class Server(socketserver.ThreadingTCPServer):
    """One thread a connection."""

    allow_reuse_address = True
    daemon_threads = True


Server(("0.0.0.0", 5432), Handler).serve_forever()  # noqa: S104 (a pod's own address)
