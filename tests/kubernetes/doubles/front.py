"""What stands between a client and the API server, as `kubectl proxy` does: it counts, changes, holds up and refuses.

It speaks plain HTTP on loopback and asks the API server in its own name, or in another one's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, final
from urllib.parse import parse_qsl, urlencode, urlsplit

import yaml
from kubernetes import client
from urllib3.exceptions import HTTPError

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_PASSED_ON = ("Accept", "Content-Type")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request.

    Attributes:
        verb: As Kubernetes calls it: get, list, watch, create, delete, ...
        resource: In plural, with its subresource.
        name: Of one of them; empty for all.
        path: Of the URL.
        query: Of the URL.
    """

    verb: str
    resource: str
    name: str
    path: str
    query: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return " ".join(filter(None, (self.verb, self.resource, self.name)))

    def with_query(self, **values: str) -> Asked:
        """The same with other values in its query."""
        return replace(self, query=tuple({**dict(self.query), **values}.items()))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that a test has broken."""
        logger.debug("A connection broke: %s", client_address)


@final
class Front:
    """Serves for as long as a ``with`` block runs.

    Args:
        connection: To the API server.
        user: In whose name it is asked; empty: the connection's. Has no rights but those that it is given.

    Attributes:
        asked: All requests, in order.
        change: Makes another request of one before it is passed on, or the status by which it is refused.
        held: While it is set, nothing of a watch's answer is passed on.
    """

    def __init__(self, connection: client.ApiClient, user: str = "") -> None:
        self.asked: list[Asked] = []
        self.change: Callable[[Asked], Asked | int] = lambda asked: asked
        self.held = threading.Event()
        self._connection = connection
        self._user = user
        self._over = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="front", daemon=True)

    def __enter__(self) -> Front:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        """On 127.0.0.1."""
        return int(self._server.server_address[1])

    def kubeconfig(self, path: Path, address: str = "") -> str:
        """Write a kubeconfig that leads here, or to a relay's ``HOST:PORT`` that leads here."""
        url = f"http://{address or f'127.0.0.1:{self.port}'}"
        settings = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "front", "cluster": {"server": url}}],
            "users": [{"name": "anybody", "user": {}}],
            "contexts": [{"name": "front", "context": {"cluster": "front", "user": "anybody"}}],
            "current-context": "front",
        }
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    def counted(self, request: str) -> int:
        """How often something like ``watch pods`` was asked, its end left out or not."""
        return sum(f"{asked} ".startswith(f"{request} ") for asked in list(self.asked))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                front._serve(self)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 - http.server calls them so

            def log_message(self, *_words: Any) -> None:
                """Nothing: a test's output is not the place."""

        return Handler

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        asked = _read(handler.command, handler.path)
        self.asked.append(asked)
        changed = self.change(asked)
        if isinstance(changed, int):
            said = json.dumps({"kind": "Status", "code": changed, "message": "the front refuses"}).encode()
            _answer(handler, changed, said)
            return
        headers = {name: handler.headers[name] for name in _PASSED_ON if name in handler.headers}
        if self._user:
            headers["Impersonate-User"] = self._user
        path = f"{changed.path}?{urlencode(changed.query)}"
        _, url, sent, *_ = self._connection.param_serialize(
            handler.command, path, header_params=headers, auth_settings=["BearerToken"]
        )
        pool = self._connection.rest_client.pool_manager
        answer = pool.request(handler.command, url, headers=sent, body=body or None, preload_content=False)
        with contextlib.closing(answer), contextlib.suppress(OSError, HTTPError):
            if changed.verb == "watch" and answer.status == 200:
                self._pass_on(handler, answer)
            else:
                _answer(handler, answer.status, answer.read())

    def _pass_on(self, handler: BaseHTTPRequestHandler, answer: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for part in answer.stream(amt=None):
            while self.held.is_set() and not self._over.wait(_POLL_S):
                pass
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        handler.wfile.write(b"0\r\n\r\n")


def _answer(handler: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


def _read(method: str, target: str) -> Asked:
    url = urlsplit(target)
    query = tuple(parse_qsl(url.query))
    # /api/v1/namespaces/NAMESPACE/RESOURCE[/NAME[/SUBRESOURCE]], or /apis/GROUP/VERSION/...
    parts = url.path.strip("/").split("/")
    rest = parts[2 if parts[0] == "api" else 3 :]
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        rest = rest[2:]
    resource, name, *below = [*rest, "", ""][: max(2, len(rest))]
    watched = dict(query).get("watch") in ("true", "True", "1")
    verb = _VERBS.get(method) or ("watch" if watched else "get" if name else "list")
    return Asked(verb, "/".join([resource, *below]), name, url.path, query)
