"""The log of a Ray job as it grows, over a connection that may break: nothing twice, nothing left out.

The job server sends a log from its beginning to whoever asks; what was delivered before a connection broke is passed
over. A cut link says nothing, so the connection is pinged. Ends only when it is told to: whether the job is over, the
caller knows better.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from types import TracebackType
from typing import final

import aiohttp

from kfpytorch_ray.cluster.remote.client import CONNECT_TIMEOUT_S, JobClient
from kfpytorch_ray.cluster.remote.received import Received

logger = logging.getLogger(__name__)

_PING_S = 10.0
_STOP_S = 5.0
_CLOSE_S = 1.0
"""The job server does not answer a request to close while it has nothing to send."""
_PAUSES_S = (0.5, 1.0, 2.0, 5.0)
"""Between tries; the last one again and again."""


@final
class LogTail:
    """Follows a job's log in a thread of its own while a ``with`` block runs.

    Args:
        client: Of its cluster.
        submission_id: The job.
    """

    def __init__(self, client: JobClient, submission_id: str) -> None:
        self._client = client
        self._url = f"{client.address}/api/jobs/{submission_id}/logs/tail"
        self._texts = Received()
        self._received = 0
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="kfpytorch-ray-log", daemon=True)

    def __enter__(self) -> LogTail:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Follow it no longer; what was received can still be asked for."""
        if not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._over.set)
        # A connection that does not let go must not hold up who stops: the thread is a daemon.
        self._thread.join(_STOP_S)

    def next(self, timeout_s: float) -> str:
        """What has come since the last time, after ``timeout_s`` at the latest; empty if nothing has."""
        return self._texts.next(timeout_s)

    def rest(self, whole: str) -> str:
        """What of the whole log ``next`` has not returned."""
        return whole[self._texts.delivered :]

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._follow_until_over())

    async def _follow_until_over(self) -> None:
        following = asyncio.ensure_future(self._follow())
        await self._over.wait()
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following

    async def _follow(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        tries = 0
        while True:
            before = self._received
            async with aiohttp.ClientSession(timeout=timeout, trust_env=True) as session:
                try:
                    await self._receive(session)
                except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
                    logger.debug("The log stream broke: %s", error)
            tries = 0 if self._received > before else tries + 1
            await asyncio.sleep(_PAUSES_S[min(tries, len(_PAUSES_S) - 1)])

    async def _receive(self, session: aiohttp.ClientSession) -> None:
        seen = 0
        limits = aiohttp.ClientWSTimeout(ws_close=_CLOSE_S)
        async with session.ws_connect(
            self._url, heartbeat=_PING_S, max_msg_size=0, timeout=limits, **self._client.websocket
        ) as stream:
            async for message in stream:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    continue
                fresh = message.data[max(0, self._received - seen) :]
                seen += len(message.data)
                if fresh:
                    self._received += len(fresh)
                    self._texts.put(fresh)
