"""The kubelet's endpoint for logs over HTTPS, which the API server asks when somebody reads a Pod's log."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trustme

from doubles.container import Container

Find = Callable[[str, str, str], "Container | None"]
"""Gives a container by namespace, Pod and name."""

HOST = "127.0.0.1"
_POLL_S = 0.05


@contextlib.contextmanager
def log_server(find: Find, over: threading.Event) -> Iterator[int]:
    """Serve ``GET /containerLogs/NAMESPACE/POD/CONTAINER?follow=&tailLines=&previous=``; gives the port.

    Args:
        find: Gives the container.
        over: Set when those who follow have to be let go.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            asked = {name: values[0] for name, values in parse_qs(url.query).items()}
            parts = url.path.strip("/").split("/")
            container = find(*parts[1:]) if parts[0] == "containerLogs" and len(parts) == 4 else None
            log = None
            if container is not None:
                log = container.previous_log if asked.get("previous") == "true" else container.log
            if container is None or log is None or not log.exists():
                self.send_error(404, "the container has no log")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with contextlib.suppress(OSError):
                for part in _output(log, container, asked, over):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, *_words: Any) -> None:
            """Nothing: a test's output is not the place."""

    server = ThreadingHTTPServer((HOST, 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert(HOST).configure_cert(context)
    # The handshake belongs in the thread of the request.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_S,), name="kubelet's logs", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.socket.close()


def _output(log: Path, container: Container, asked: dict[str, str], over: threading.Event) -> Iterator[bytes]:
    with open(log, "rb") as file:
        if "tailLines" in asked:
            wanted = int(asked["tailLines"])
            lines = file.readlines()
            yield from _parts(b"".join(lines[len(lines) - min(wanted, len(lines)) :]))
        while True:
            # Asked first: what it writes until it ends is read after that.
            goes_on = asked.get("follow") == "true" and container.log == log and container.running
            yield from _parts(file.read())
            if not goes_on or over.is_set():
                return
            time.sleep(_POLL_S)


def _parts(data: bytes) -> list[bytes]:
    return [data] if data else []
