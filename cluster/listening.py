"""Who listens at ``HOST:PORT``, found out before Ray joins there: it waits a minute, and may end the process then."""

from __future__ import annotations

import socket

_CONNECT_S = 5.0
_ANSWER_S = 30.0
"""Long for a job server that is busy. A GCS speaks first, as every HTTP/2 server, so nobody waits for one."""

_REQUEST = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def nobody_at(address: str) -> str:
    """Why nothing listens at HOST:PORT; empty where something does, and for addresses of another kind."""
    if (where := _where(address)) is None:
        return ""
    try:
        socket.create_connection(where, _CONNECT_S).close()
    except OSError as error:
        return str(error)
    return ""


def speaks_http(address: str) -> bool:
    """Whether what listens at HOST:PORT answers HTTP/1, as a job server does and no GCS: that speaks gRPC."""
    if (where := _where(address)) is None:
        return False
    try:
        with socket.create_connection(where, _CONNECT_S) as connection:
            connection.settimeout(_ANSWER_S)
            connection.sendall(_REQUEST)
            return connection.recv(6) == b"HTTP/1"
    except OSError:
        return False


def _where(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdigit():
        return None
    return host.strip("[]"), int(port)
