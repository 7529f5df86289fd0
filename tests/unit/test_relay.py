"""The relay that stands for a network: what passes, what does not, and what is lost, which is nothing."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
import trustme

from kfpytorch_ray.testing import Relay, wait_until

DEADLINE_S = 60.0
MOMENT_S = 0.2
"""How long nothing has to arrive to be taken for cut off."""


class Server:
    """Takes connections and hands them to the test."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(DEADLINE_S)
        self.port = self.listener.getsockname()[1]

    def accept(self) -> socket.socket:
        connection, _ = self.listener.accept()
        connection.settimeout(DEADLINE_S)
        return connection


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    with server.listener:
        yield server


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    with Relay("127.0.0.1", server.port) as relay:
        yield relay


@pytest.fixture
def sides(relay: Relay, server: Server) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Client and server of one connection."""
    with closing(connect(relay)) as client, closing(server.accept()) as served:
        yield client, served


def connect(relay: Relay) -> socket.socket:
    host, port = relay.address.split(":")
    return socket.create_connection((host, int(port)), DEADLINE_S)


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly as many bytes, or fewer at the end of the connection."""
    received = bytearray()
    while len(received) < size and (data := connection.recv(size - len(received))):
        received += data
    return bytes(received)


def is_silent(connection: socket.socket) -> bool:
    """Whether nothing arrives, not even an end."""
    connection.settimeout(MOMENT_S)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(DEADLINE_S)
    return False


def is_reset(connection: socket.socket) -> bool:
    try:
        connection.recv(1)
    except ConnectionResetError:
        return True
    return False


def test_both_ways_and_to_the_end(relay: Relay, sides: tuple[socket.socket, socket.socket]) -> None:
    """Bytes as they are; a half that is closed leaves the other open."""
    client, served = sides
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert receive(served, 100) == b"question"
    served.sendall(b"answer")
    served.close()
    assert receive(client, 100) == b"answer"
    wait_until(lambda: relay.connections == 0, "the end of the connection")
    assert relay.url == f"http://{relay.address}"


def test_many_at_once(relay: Relay, server: Server) -> None:
    """Each gets what is its own."""
    with ExitStack() as open_:
        pairs = [(open_.enter_context(connect(relay)), open_.enter_context(server.accept())) for _ in range(20)]
        assert relay.connections == 20
        for number, (client, _) in enumerate(pairs):
            client.sendall(bytes([number]))
        for number, (_, served) in enumerate(pairs):
            assert receive(served, 1) == bytes([number])


def test_who_sends_waits_for_who_reads(sides: tuple[socket.socket, socket.socket]) -> None:
    """The relay holds no more than a little, and passes on all of it."""
    client, served = sides
    client.setblocking(False)
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            taken += client.send(bytes(1 << 20))
            assert taken < 1 << 28
    client.settimeout(DEADLINE_S)
    client.shutdown(socket.SHUT_WR)
    left = taken
    while data := served.recv(1 << 20):
        left -= len(data)
    assert left == 0


def test_cut_and_healed_nothing_is_lost(relay: Relay, sides: tuple[socket.socket, socket.socket]) -> None:
    """However often, in the middle of a stream: every byte arrives once and in order."""
    client, served = sides
    data = random.Random(0).randbytes(32 << 20)
    received = hashlib.sha256()
    size = 0

    def read() -> None:
        nonlocal size
        while piece := served.recv(1 << 16):
            received.update(piece)
            size += len(piece)

    def write() -> None:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    threads = [threading.Thread(target=act) for act in (read, write)]
    for thread in threads:
        thread.start()
    for fraction in range(1, 5):
        wait_until(lambda fraction=fraction: size > fraction * len(data) // 6, "some of it")
        relay.cut()
        relay.heal()
    for thread in threads:
        thread.join()
    assert size == len(data)
    assert received.digest() == hashlib.sha256(data).digest()


def test_cut_nothing_passes(relay: Relay, server: Server, sides: tuple[socket.socket, socket.socket]) -> None:
    """Nor on connections that are made then, which are taken all the same; healed, all of it arrives."""
    client, served = sides
    relay.cut()
    client.sendall(b"old")
    served.sendall(b"back")
    with closing(connect(relay)) as late:
        late.sendall(b"new")
        assert is_silent(served)
        assert is_silent(client)
        assert is_silent(late)
        wait_until(lambda: relay.connections == 2, "the connection to be taken")
        relay.heal()
        with closing(server.accept()) as late_served:
            assert receive(late_served, 3) == b"new"
    assert receive(served, 3) == b"old"
    assert receive(client, 4) == b"back"


@pytest.mark.parametrize("reset", [False, True])
def test_who_ends_behind_a_cut_is_not_missed(
    reset: bool, relay: Relay, sides: tuple[socket.socket, socket.socket]
) -> None:
    """As long as it is cut: the other side learns of it when it is healed."""
    client, served = sides
    relay.cut()
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert is_silent(served)
    relay.heal()
    assert is_reset(served) if reset else receive(served, 1) == b""


def test_all_connections_are_dropped(relay: Relay, server: Server, sides: tuple[socket.socket, socket.socket]) -> None:
    """On both sides, those behind a cut as well; the next one is not."""
    relay.cut()
    with closing(connect(relay)) as waiting:
        wait_until(lambda: relay.connections == 2, "the connection to be taken")
        relay.drop()
        assert all(map(is_reset, (*sides, waiting)))
    assert relay.connections == 0
    relay.heal()
    with closing(connect(relay)) as client, closing(server.accept()) as served:
        client.sendall(b"x")
        assert receive(served, 1) == b"x"


def test_connections_are_refused(relay: Relay, server: Server, sides: tuple[socket.socket, socket.socket]) -> None:
    """At the same address they are taken again when it is healed; those that there are go on."""
    client, served = sides
    relay.refuse()
    relay.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(relay)
    client.sendall(b"x")
    assert receive(served, 1) == b"x"
    relay.heal()
    with closing(connect(relay)), closing(server.accept()):
        pass


def test_no_server(server: Server, relay: Relay) -> None:
    """The client sees an error, as it would without the relay."""
    server.listener.close()
    with pytest.raises(ConnectionResetError), closing(connect(relay)) as client:
        client.recv(1)


def test_tls_ends_here(server: Server) -> None:
    """For a client that trusts the certificate; one that does not, or speaks plainly, gets nothing through."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with Relay("127.0.0.1", server.port, tls=context) as relay:
        assert relay.url.startswith("https://127.0.0.1:")
        with trusting.wrap_socket(connect(relay), server_hostname="127.0.0.1") as client, server.accept() as served:
            client.sendall(b"question")
            assert receive(served, 8) == b"question"
            relay.cut()
            answer = random.Random(0).randbytes(8 << 20)
            sending = threading.Thread(target=served.sendall, args=[answer])
            sending.start()
            assert is_silent(client)
            relay.heal()
            assert receive(client, len(answer)) == answer
            sending.join()
            served.close()
            assert client.recv(1) == b""
        with pytest.raises(ssl.SSLCertVerificationError):
            ssl.create_default_context().wrap_socket(connect(relay), server_hostname="127.0.0.1")
        with closing(connect(relay)) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b"HTTP" not in receive(plain, 100)
