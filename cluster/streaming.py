"""The driver's end of what ranks print: it asks each agent for lines and prints them. A thread of its own.

Nothing is lost on the way: an agent keeps lines until it is asked for those behind them. When a launch ends, agents are
asked until they say that there is no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from kfpytorch_ray.cluster.output_spool import Cursor, OutputChunk

logger = logging.getLogger(__name__)

_ASK_S = 10.0
"""How long an agent may wait for lines before it says that there are none."""
_LOOK_S = 0.5
_CLOSE_S = 5.0
_SILENCE_S = 10.0
"""At the end of a launch: as long nothing may come from any agent before the rest is given up."""
_LEFT_OUT = "kfpytorch_ray: some lines are left out here, because they were not printed as fast as they came.\n"


@dataclass(slots=True)
class _Followed:
    """An agent.

    Attributes:
        handle: The actor.
        address: Of its node.
        cursor: What has arrived.
        asked: The answer that is still out.
        over: Whether there will be no more.
        given_up: Whether nobody waits for more, because the agent is lost.
    """

    handle: Any
    address: str
    cursor: Cursor = field(default_factory=Cursor)
    asked: Any = None
    over: bool = False
    given_up: bool = False

    @property
    def waited_for(self) -> bool:
        """Whether more may come."""
        return not (self.over or self.given_up)


class OutputStream:
    """Prints what agents have until it is closed. Agents are named by numbers of the caller's.

    Args:
        show: Takes whole lines, and whether they are of standard error.
    """

    def __init__(self, show: Callable[[str, bool], None]) -> None:
        self._show = show
        self._followed: dict[int, _Followed] = {}
        self._lock = threading.Lock()
        self._heard_at = time.monotonic()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ranks-output", daemon=True)
        self._thread.start()

    def follow(self, agent: int, handle: Any, address: str) -> None:
        """Begin to print what an agent has."""
        with self._changed:
            self._followed[agent] = _Followed(handle, address)
            self._changed.notify_all()

    def give_up(self, agent: int) -> None:
        """An agent is lost: print what is on its way, and wait for no more."""
        with self._changed:
            if agent in self._followed:
                self._followed[agent].given_up = True
                self._changed.notify_all()

    def drain(self, agents: AbstractSet[int]) -> set[str]:
        """Wait until agents that end have said that there is no more.

        Args:
            agents: Their numbers.

        Returns:
            Addresses of those that have not.
        """
        with self._changed:
            began = time.monotonic()
            ending = [followed for agent, followed in self._followed.items() if agent in agents]
            while missing := {followed.address for followed in ending if followed.waited_for}:
                left = max(began, self._heard_at) + _SILENCE_S - time.monotonic()
                if left <= 0:
                    return missing
                self._changed.wait(left)
            return set()

    def close(self) -> None:
        """End it; what is about to be printed may still be, where a terminal holds it up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (asked := self._ask()) is not None:
            answered, _ = ray.wait(list(asked), num_returns=1, timeout=_LOOK_S)
            for ref in answered:
                self._take(asked[ref], ref)

    def _ask(self) -> dict[Any, _Followed] | None:
        """Ask those that are not being asked; None when it is closed."""
        with self._changed:
            while not self._closed and not any(map(_concerns, self._followed.values())):
                self._changed.wait()
            if self._closed:
                return None
            for followed in self._followed.values():
                if followed.asked is None and followed.waited_for:
                    followed.asked = followed.handle.read_output.remote(followed.cursor, _ASK_S)
            return {followed.asked: followed for followed in self._followed.values() if followed.asked is not None}

    def _take(self, followed: _Followed, ref: Any) -> None:
        chunk: OutputChunk | None = None
        try:
            chunk = ray.get(ref)
        except RayError as error:
            # Whoever watches the agent says so.
            logger.debug("No more lines come from %s: %s", followed.address, error)
        if chunk is not None:
            if chunk.left_out:
                self._print(_LEFT_OUT, error=True)
            for is_error, text in chunk.texts:
                self._print(text, error=is_error)
        with self._changed:
            followed.asked = None
            followed.over = chunk is None or chunk.ended
            if chunk is not None:
                followed.cursor = chunk.cursor
                self._heard_at = time.monotonic()
            self._changed.notify_all()

    def _print(self, text: str, *, error: bool) -> None:
        # A pipe whose reader has gone, most likely: that is no reason to end the training.
        try:
            self._show(text, error)
        except (OSError, ValueError) as broken:
            logger.debug("Lines of ranks cannot be printed: %s", broken)


@contextmanager
def output_shown(show: Callable[[str, bool], None]) -> Iterator[OutputStream]:
    """Have what ranks print shown while the context runs. As ``OutputStream``."""
    output = OutputStream(show)
    try:
        yield output
    finally:
        output.close()


def _concerns(followed: _Followed) -> bool:
    return followed.waited_for or followed.asked is not None
