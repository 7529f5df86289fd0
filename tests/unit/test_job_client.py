"""What a person is told by whatever answers where a job API was expected; over real sockets, without Ray."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kfpytorch_ray import AuthenticationError, ClusterError, ClusterUnreachableError, ConfigError
from kfpytorch_ray.cluster.listening import nobody_at, speaks_http
from kfpytorch_ray.cluster.remote import client as client_module
from kfpytorch_ray.cluster.remote.client import JobClient

VERSION = {"version": "4", "ray_version": "2.60.0", "session_name": "session_1"}


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"  # type: ignore[index]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def answering(status: int, body: str, seen: list[dict[str, str]] | None = None) -> Iterator[str]:
    """An HTTP server that says the same to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if seen is not None:
                seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_line: object) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield f"http://{address}"


@contextmanager
def saying(said: bytes) -> Iterator[str]:
    """A server that does not speak HTTP."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(said)

    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as address:
        yield f"http://{address}"


@contextmanager
def listing(returns: int) -> Iterator[tuple[str, list[str]]]:
    """A job server whose one job comes back as often as said when it is removed, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            job = {"type": "SUBMISSION", "submission_id": "kfr-one", "status": "FAILED", "entrypoint": "?"}
            self.answer(job if asked.count("DELETE") <= returns else None)

        def do_DELETE(self) -> None:
            self.answer({"deleted": True} if asked.count("DELETE") <= returns else None)
            asked.append("DELETE")

        def answer(self, body: dict[str, object] | None) -> None:
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_line: object) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield f"http://{address}", asked


def timers() -> list[threading.Timer]:
    return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_job_that_comes_back_is_forgotten_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's watch over jobs writes one anew that is removed before its last look."""
    monkeypatch.setattr(client_module, "_FORGET_S", [0.0] * len(client_module._FORGET_S))
    with listing(returns=1) as (address, asked):
        client = JobClient(address)
        client.forget("kfr-one")
        for timer in timers():
            timer.join()
        assert client.job("kfr-one") is None
        assert asked.count("DELETE") >= 2


@pytest.mark.parametrize("thoroughly", [False, True])
def test_who_waits_for_a_job_to_be_forgotten(thoroughly: bool) -> None:
    """A process that only launches ends after the first try."""
    others = set(timers())
    JobClient("http://127.0.0.1:1").forget("kfr-one", thoroughly=thoroughly)
    tries = sorted(set(timers()) - others, key=lambda timer: timer.interval)
    for timer in tries:
        timer.cancel()
        timer.join()
    assert [timer.daemon for timer in tries] == [False, *[not thoroughly] * (len(tries) - 1)]
    assert len(tries) > 1


def test_the_version() -> None:
    """What a job server says of itself is handed on."""
    with answering(200, json.dumps(VERSION)) as address:
        assert JobClient(address).version() == VERSION


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_environment_does_not_override_the_address(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """An address that was given is the one that is asked, also where Ray's own client would ask another."""
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with answering(200, json.dumps(VERSION)) as address:
        assert JobClient(address).version() == VERSION


@pytest.mark.parametrize("body", ["", "<html>", "[]", "{}", "null"])
def test_somebody_elses_server(body: str) -> None:
    """A server that answers, but not as a Ray does, is no cluster."""
    with answering(200, body) as address, pytest.raises(ClusterUnreachableError, match="not as Ray's job API"):
        JobClient(address).version()


@pytest.mark.parametrize("status", [401, 403])
def test_who_is_refused_is_told_what_to_give(status: int) -> None:
    """And no token is repeated."""
    with answering(status, "no") as address:
        client = JobClient(address, {"Authorization": "Bearer s3cret"})
        with pytest.raises(AuthenticationError, match=rf"(?s)\({status}\).*RAY_AUTH_TOKEN") as caught:
            client.version()
    assert "s3cret" not in str(caught.value) + repr(caught.value) + repr(client)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_without_a_head(status: int) -> None:
    """It is as if nobody answered: worth another try."""
    with (
        answering(status, "bad gateway") as address,
        pytest.raises(ClusterUnreachableError, match=str(status)) as caught,
    ):
        JobClient(address).job("kfr-one")
    assert caught.value.retryable


def test_a_request_that_fails_on_the_cluster() -> None:
    """The last line of its answer, which is a traceback of Ray's, says why."""
    said = "Traceback\n  File\nValueError: no such thing"
    with answering(500, said) as address, pytest.raises(ClusterError, match="ValueError: no such thing") as caught:
        JobClient(address).job("kfr-one")
    assert not isinstance(caught.value, ClusterUnreachableError)


def test_a_job_that_nobody_knows() -> None:
    """None, and no error."""
    with answering(404, "Job kfr-one does not exist") as address:
        assert JobClient(address).job("kfr-one") is None


def test_headers_are_sent() -> None:
    """What a proxy of the user's own asks for."""
    seen: list[dict[str, str]] = []
    with answering(200, json.dumps(VERSION), seen) as address:
        JobClient(address, {"X-Proxy": "key"}).version()
    assert seen[0]["x-proxy"] == "key"


def test_nobody_listens() -> None:
    """The address and what the system said are named."""
    with answering(200, "") as address:
        pass
    with pytest.raises(ClusterUnreachableError, match="refused") as caught:
        JobClient(address).version()
    assert address in str(caught.value)


def test_a_port_that_does_not_speak_http() -> None:
    """Ray's own ports answer in binary, which is not shown to anybody."""
    said = b"\x00\x00\x12\x04\xff\n"
    with saying(said) as address, pytest.raises(ClusterUnreachableError, match="does not speak HTTP") as caught:
        JobClient(address).version()
    assert all(line.isprintable() for line in str(caught.value).splitlines())


def test_https_where_http_is_served() -> None:
    """The scheme is named as what is wrong."""
    with answering(200, "") as address, pytest.raises(ClusterUnreachableError, match="https:// was asked"):
        JobClient(address.replace("http://", "https://")).version()


@pytest.mark.parametrize(("port", "name"), [(6379, "GCS"), (10001, "Ray Client")])
def test_well_known_wrong_ports(port: int, name: str) -> None:
    """Whose port that is, and which one is right."""
    with pytest.raises(ClusterUnreachableError, match=f"{name}.*8265"):
        JobClient(f"http://127.0.0.2:{port}").version()


def test_certificates_that_are_not_there(tmp_path: Path) -> None:
    """A wrong path is the user's mistake, found before anything is asked."""
    with pytest.raises(ConfigError, match="verify"):
        JobClient("https://127.0.0.1:1", verify=str(tmp_path / "ca.pem"))


@pytest.mark.parametrize(
    "body",
    ["The plain HTTP request was sent to HTTPS port", "Client sent an HTTP request to an HTTPS server.\n"],
    ids=["nginx", "Go"],
)
def test_http_where_a_proxy_serves_https(body: str) -> None:
    """Proxies say so in words of their own."""
    with answering(400, body) as address, pytest.raises(ClusterUnreachableError, match="serves https://"):
        JobClient(address).version()


def test_http_where_a_tls_server_answers_with_an_alert() -> None:
    """As OpenSSL does for those that do not close at once."""
    with saying(b"\x15\x03\x01\x00\x02\x02\x46") as address, pytest.raises(ClusterUnreachableError, match="https://"):
        JobClient(address).version()


def test_who_listens(tmp_path: Path) -> None:
    """A job server speaks HTTP/1, also where it asks for a token; a GCS, which speaks gRPC, does not."""
    with answering(401, "") as address:
        assert speaks_http(address.removeprefix("http://"))
    with saying(b"\x00\x00\x06\x04\x00\x00\x00\x00\x00") as address:
        where = address.removeprefix("http://")
        assert not speaks_http(where)
        assert nobody_at(where) == ""
    assert "refused" in nobody_at("127.0.0.1:1")
    assert not speaks_http("127.0.0.1:1")
    assert nobody_at("auto") == nobody_at("http://127.0.0.1:1") == ""
