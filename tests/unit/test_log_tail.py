"""Following a log over connections that break; over real websockets, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from kfpytorch_ray.cluster.remote.client import JobClient
from kfpytorch_ray.cluster.remote.tail import LogTail
from kfpytorch_ray.testing import wait_until


class JobServer:
    """Sends a log from its beginning to whoever asks, as Ray's does, and breaks connections after so many chunks.

    Args:
        chunks: The log.
        breaks: For each connection, after how many chunks it breaks; those that follow are whole.
    """

    def __init__(self, chunks: list[str], breaks: list[int]) -> None:
        self.chunks = chunks
        self.breaks = [*breaks]
        self.connections = 0
        self.headers: dict[str, str] = {}

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        self.connections += 1
        self.headers = dict(request.headers)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        limit = self.breaks.pop(0) if self.breaks else len(self.chunks)
        for chunk in self.chunks[:limit]:
            await socket.send_str(chunk)
        if limit < len(self.chunks) and request.transport is not None:
            request.transport.abort()
        return socket


@contextmanager
def serving(server: JobServer) -> Iterator[str]:
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_get("/api/jobs/{job}/logs/tail", server.tail)
    runner = web.AppRunner(app)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def followed(server: JobServer, address: str) -> str:
    """All that a tail has delivered by the time that the whole log has come."""
    whole = "".join(server.chunks)
    got: list[str] = []

    def complete() -> bool:
        got.append(tail.next(0.05))
        return len("".join(got)) >= len(whole)

    with LogTail(JobClient(address), "kfr-one") as tail:
        wait_until(complete, "the whole log")
    assert tail.rest(whole + "later\n") == (whole + "later\n")[len("".join(got)) :]
    return "".join(got)


@pytest.mark.parametrize("breaks", [[], [0], [1, 1], [2, 1, 3], [0, 0, 2]])
def test_nothing_twice_and_nothing_left_out(breaks: list[int]) -> None:
    """However often the connection breaks, also when it brings less than the one before."""
    server = JobServer(["one\n", "two\nthree\n", "fo", "ur\n"], breaks)
    with serving(server) as address:
        assert followed(server, address) == "one\ntwo\nthree\nfour\n"
    assert server.connections >= len(breaks) + 1


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text("ab\nü", min_size=1, max_size=5), min_size=1, max_size=6), st.data())
def test_any_log_and_any_break(chunks: list[str], data: st.DataObject) -> None:
    """One break anywhere, in any log, with characters of several bytes."""
    server = JobServer(chunks, [data.draw(st.integers(0, len(chunks)))])
    with serving(server) as address:
        assert followed(server, address) == "".join(chunks)


def test_headers_are_sent_on_this_way_too() -> None:
    """A token that the requests carry, the stream carries."""
    server = JobServer(["one\n"], [])
    with serving(server) as address, LogTail(JobClient(address, {"X-Proxy": "key"}), "kfr-one") as tail:
        wait_until(lambda: tail.next(0.05), "the log")
    assert server.headers["X-Proxy"] == "key"


def test_it_ends_when_it_is_told_to_though_nobody_answers() -> None:
    """Stopping does not wait for a connection, nor for the next try."""
    with serving(JobServer([], [])) as address:
        pass
    others = set(threading.enumerate())
    with LogTail(JobClient(address), "kfr-one") as tail:
        assert tail.next(0.05) == ""
    left = set(threading.enumerate()) - others
    assert "kfpytorch-ray-log" not in {thread.name for thread in left}
    # asyncio tells the thread that read the environment's proxies to end, and does not wait for it.
    wait_until(lambda: not any(thread.is_alive() for thread in left), "threads of its loop to end")
