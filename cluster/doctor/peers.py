"""Which nodes can connect to which: in a worker on each, one listens and all others connect.

They find each other by the store of the round, on rank 0's node. Whoever cannot reach that says so, and the others
find out about each other without it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from kfpytorch_ray.cluster.doctor.clocks import round_trip
from kfpytorch_ray.cluster.doctor.report import Interval, Peer

_CONNECT_S = 5.0
_PATIENCE_S = 20.0
"""Ranks of a round begin together, but for what their machines make of it."""
_LOOK_S = 0.1
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class Place:
    """Where this node is, as other nodes see it.

    Attributes:
        address: Its own on the way to rank 0's node.
        interface: Which has the address; empty where it is not known.
    """

    address: str
    interface: str


def place(master: str) -> Place:
    """Find out by which address this node is on the way to another.

    Args:
        master: The other's address, or this one's.
    """
    address = master
    with contextlib.suppress(OSError):
        family, kind, protocol, _, target = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # Sends nothing: for UDP it only chooses the way.
            probe.connect(target)
            address = str(probe.getsockname()[0])
    return Place(address, _interface_of(address))


def connect_all(
    rank: int, world_size: int, master: tuple[str, int], here: Place, *, patience_s: float = _PATIENCE_S
) -> tuple[Peer, ...]:
    """Connect to every other rank, while they do the same. Returns when all are done, or have had their time.

    Args:
        rank: This one.
        world_size: How many there are.
        master: Address and port of the round's store.
        here: This node.
        patience_s: How long to wait for the others, to come and to be done.
    """
    if world_size == 1:
        return ()
    if refused := _refused(*master):
        return (Peer(0, refused),)
    try:
        whole = TCPStore(*master, is_master=False, timeout=timedelta(seconds=patience_s))
        store = PrefixStore("kfpytorch_ray/doctor/", whole)
        with _listening(here.address) as (port, token):
            store.set(f"at/{rank}", json.dumps([here.address, port, token]))
            others = [other for other in range(world_size) if other != rank]
            there = _await(store, "at", others, patience_s)
            places = {other: store.get(f"at/{other}") for other in there}
            with ThreadPoolExecutor(max_workers=16) as pool:
                found = tuple(pool.map(lambda other: _connect(other, places.get(other)), others))
            store.set(f"done/{rank}", "1")
            # Others may still connect to this one.
            _await(store, "done", there, patience_s)
    except (DistError, OSError) as error:
        return (Peer(0, f"the store of the round failed: {_first_line(error)}"),)
    return found


def _await(store: Store, what: str, ranks: list[int], patience_s: float) -> list[int]:
    """Wait until all ranks have said something, and return those that have."""
    pause = threading.Event()
    deadline = time.monotonic() + patience_s
    missing = list(ranks)
    # Asking does not block the store for others, as waiting for a key does.
    while (
        missing := [rank for rank in missing if not store.check([f"{what}/{rank}"])]
    ) and time.monotonic() < deadline:
        pause.wait(_LOOK_S)
    return [rank for rank in ranks if rank not in missing]


def _refused(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), _CONNECT_S).close()
    except OSError as error:
        return f"{address}:{port}: {error}"
    return ""


@contextlib.contextmanager
def _listening(address: str) -> Iterator[tuple[int, str]]:
    """Answer whoever connects with a token, by which it knows that it has come to the right place, and the time."""
    token = secrets.token_hex(8)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # All addresses: which of them others come by is their routers' business.
    with socket.create_server(("", 0), family=family, backlog=512) as server:
        thread = threading.Thread(target=_serve, args=(server, token), daemon=True)
        thread.start()
        yield server.getsockname()[1], token


def _serve(server: socket.socket, token: str) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_CONNECT_S)
            # What the other has sent is how it knows that its clock was read before ours.
            if connection.recv(1):
                connection.sendall(f"{token} {time.time()!r}\n".encode())


def _connect(other: int, said_at: bytes | None) -> Peer:
    if said_at is None:
        return Peer(other, "it did not say where it is in time")
    address, port, token = json.loads(said_at)
    try:
        with socket.create_connection((address, port), _CONNECT_S) as connection:
            asked_at = time.time()
            connection.sendall(b"?")
            said = connection.makefile("r").readline().split()
            answered_at = time.time()
    except OSError as error:
        return Peer(other, f"{address}:{port}: {error}")
    if len(said) != 2 or said[0] != token:
        return Peer(other, f"{address}:{port}: somebody else answers there")
    clock = float(said[1])
    return Peer(other, "", round_trip(asked_at, Interval(clock, clock), answered_at))


def _interface_of(address: str) -> str:
    if ":" in address:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
