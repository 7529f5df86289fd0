"""A TCP relay in a thread: puts a network between a client and a server on this machine, which can be broken.

It needs no rights, unlike kfpytorch_ray.testing.Laptop, and breaks one way to a server while others stay. With a
certificate it is what a TLS proxy in front of Ray's job server is.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, final

_CHUNK_BYTES = 64 * 1024
_BACKLOG = 128
_CALL_TIMEOUT_S = 30.0
_AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER for no time: a socket that is closed resets its connection."""

_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@final
class Relay:
    """A TCP relay to a server, for as long as a ``with`` block runs.

    Bytes are passed on as fast as the other side takes them, with a few times 64 KiB held at most, and none is lost or
    passed twice, whatever is cut and healed. What was on its way to a side's kernel before a cut may be read there.

        with Relay("127.0.0.1", 8265, tls=context) as relay:
            client = JobSubmissionClient(relay.url, verify="ca.pem")
            relay.cut()

    Args:
        target_host: Where the server is.
        target_port: Its port.
        tls: End TLS here with this context's certificate; the server is spoken to in plain. A client that closes its
            half of the connection closes all of it then.
        host: Address to listen on.
    """

    def __init__(
        self, target_host: str, target_port: int, tls: ssl.SSLContext | None = None, *, host: str = "127.0.0.1"
    ) -> None:
        self._target = (target_host, target_port)
        self._tls = tls
        self._host = host
        self._undo = contextlib.ExitStack()
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._accepting: asyncio.Task[None] | None = None
        self._serving: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Relay:
        with contextlib.ExitStack() as undo:
            # Bound and not listening, it keeps the port while connections are refused.
            keeper = undo.enter_context(self._bind())
            self._port = keeper.getsockname()[1]
            undo.callback(self._loop.close)
            thread = threading.Thread(target=self._loop.run_forever, name="relay", daemon=True)
            thread.start()
            undo.callback(thread.join)
            undo.callback(self._loop.call_soon_threadsafe, self._loop.stop)
            undo.callback(self._call, self._close)
            self._call(self._open)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._undo.close()

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return f"{self._host}:{self._port}"

    @property
    def url(self) -> str:
        """``http://HOST:PORT``, or ``https://`` with a certificate."""
        return f"{'https' if self._tls else 'http'}://{self.address}"

    @property
    def connections(self) -> int:
        """How many there are now, those that a cut has stopped included."""
        return len(self._serving)

    def cut(self) -> None:
        """Let nothing pass any more, ends of connections included; new connections are taken, but go nowhere."""
        self._call(self._cut)

    def refuse(self) -> None:
        """Refuse new connections, as where nobody listens; those that there are stay."""
        self._call(self._refuse)

    def drop(self) -> None:
        """Reset all connections that there are, on both sides; new ones are taken as before."""
        self._call(self._drop)

    def heal(self) -> None:
        """Undo ``cut`` and ``refuse``."""
        self._call(self._open)

    def _call(self, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        asyncio.run_coroutine_threadsafe(act(), self._loop).result(_CALL_TIMEOUT_S)

    def _bind(self) -> socket.socket:
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((self._host, self._port))
        return bound

    async def _open(self) -> None:
        self._flowing.set()
        if self._accepting is None:
            listener = self._bind()
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            self._accepting = self._loop.create_task(self._accept(listener))

    async def _cut(self) -> None:
        self._flowing.clear()

    async def _refuse(self) -> None:
        if self._accepting is not None:
            await _end([self._accepting])
            self._accepting = None

    async def _drop(self) -> None:
        await _end(list(self._serving))

    async def _close(self) -> None:
        await self._refuse()
        await self._drop()

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                client, _ = await self._loop.sock_accept(listener)
                task = self._loop.create_task(self._serve(client))
                self._serving.add(task)
                task.add_done_callback(self._serving.discard)

    async def _serve(self, client: socket.socket) -> None:
        sockets = [client]
        ends: list[asyncio.StreamWriter] = []
        try:
            await self._flows()
            to_server = await asyncio.open_connection(*self._target, limit=_CHUNK_BYTES)
            ends.append(to_server[1])
            sockets.append(to_server[1].get_extra_info("socket"))
            to_client = await self._take(client)
            ends.append(to_client[1])
            await self._pass_on(to_client, to_server)
            for end in ends:
                end.close()
                await end.wait_closed()
        except OSError:
            # One side is gone. Where the link is cut, the other does not know yet.
            await self._flows()
        finally:
            # Those that are closed stay so; the others' sides see an error.
            for one in sockets:
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            for end in ends:
                end.transport.abort()
            client.close()

    async def _take(self, client: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader = asyncio.StreamReader(_CHUNK_BYTES, self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, client, ssl=self._tls)
        return reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)

    async def _pass_on(self, one: _Stream, other: _Stream) -> None:
        ways = [
            self._loop.create_task(self._pump(one[0], other[1])),
            self._loop.create_task(self._pump(other[0], one[1])),
        ]
        try:
            await asyncio.gather(*ways)
        finally:
            await _end(ways)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        # No more than one piece is between the check and the kernel when the link is cut. With 0, asyncio's TLS pauses
        # and resumes in turn whatever is held, and may not resume.
        sink.transport.set_write_buffer_limits(high=1, low=0)
        while data := await source.read(_CHUNK_BYTES):
            await self._flows()
            sink.write(data)
            await sink.drain()
        await self._flows()
        if sink.can_write_eof():
            sink.write_eof()
        else:
            sink.close()

    async def _flows(self) -> None:
        # It may be cut again before this goes on.
        while not self._flowing.is_set():
            await self._flowing.wait()


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
