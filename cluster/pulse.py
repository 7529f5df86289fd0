"""The controller's pulse: asks every agent again and again whether it is there. Ray itself needs 65 s for a cut link.

Pulses to one agent follow each other: the next is sent when the answer to the last has come, so an agent that gets it
knows that its answer arrived. It ends its workers ``silence_timeout_s`` after the last answer of which it knows that;
the controller gives it up no sooner. So whoever takes over never meets it at work. A thread of its own, because the
driver's may be held up, by a blocked terminal for example.

Silence of others means nothing after this process stood still itself: stopped by Ctrl-Z, or on a laptop that slept. It
knows by its clock, and whoever asks first notes it: after a stop, other threads may go on before this one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from kfpytorch_ray.cluster.protocol import NodePulse

logger = logging.getLogger(__name__)

_PULSES_PER_TIMEOUT = 10


@dataclass(slots=True)
class _Watched:
    """An agent whose pulse is taken.

    Attributes:
        handle: The actor.
        heard_at: When it was last known to be there, by the clock of this module.
        asked: The answer that is still out.
        latest: Its last answer.
        error: What Ray said instead of an answer.
    """

    handle: Any
    heard_at: float
    asked: Any = None
    latest: NodePulse | None = None
    error: RayError | None = None


class Pulse:
    """Takes the pulse of agents until it is closed. Agents are named by numbers of the caller's.

    Args:
        silence_timeout_s: Seconds without an answer after which an agent counts as silent.
        heard: Called with each answer, in this thread.
    """

    def __init__(self, silence_timeout_s: float, heard: Callable[[int, NodePulse], None]) -> None:
        self._heard = heard
        self._silence_timeout_s = silence_timeout_s
        self._interval_s = silence_timeout_s / _PULSES_PER_TIMEOUT
        self._watched: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._turned_at = _now()
        self._stood_still_at = float("-inf")
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def watch(self, agent: int, handle: Any) -> None:
        """Begin to take an agent's pulse."""
        with self._lock:
            self._watched[agent] = _Watched(handle, _now())

    def forget(self, agent: int) -> None:
        """End it."""
        with self._lock:
            self._watched.pop(agent, None)

    def latest(self, agent: int) -> NodePulse | None:
        """The last answer; None before the first."""
        with self._lock:
            return watched.latest if (watched := self._watched.get(agent)) else None

    def silent(self) -> set[int]:
        """Agents that have not answered for too long."""
        with self._lock:
            self._note_standstill()
            return {
                agent
                for agent, watched in self._watched.items()
                if _now() - watched.heard_at > self._silence_timeout_s and watched.error is None
            }

    def errors(self) -> dict[int, RayError]:
        """Agents about which Ray itself says that they are gone."""
        with self._lock:
            return {agent: watched.error for agent, watched in self._watched.items() if watched.error is not None}

    @property
    def stood_still(self) -> bool:
        """Whether this process was stopped lately, so that agents may have given it up."""
        with self._lock:
            self._note_standstill()
            return _now() - self._stood_still_at < self._silence_timeout_s

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                self._note_standstill()
                began = self._turned_at = _now()
            self._ask()
            self._listen()
            self._closed.wait(max(0.0, began + self._interval_s - _now()))

    def _ask(self) -> None:
        with self._lock:
            for watched in self._watched.values():
                if watched.asked is None and watched.error is None:
                    watched.asked = watched.handle.pulse.remote()

    def _listen(self) -> None:
        with self._lock:
            asked = {watched.asked: number for number, watched in self._watched.items() if watched.asked is not None}
            found = dict(self._watched)
        if not asked:
            return
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=self._interval_s)
        for ref in answered:
            watched = found[asked[ref]]
            error: RayError | None = None
            answer: NodePulse | None = None
            try:
                answer = ray.get(ref)
            except RayError as caught:
                error = caught
            with self._lock:
                watched.asked = None
                watched.error = error
                watched.latest = answer or watched.latest
                if answer is not None:
                    watched.heard_at = _now()
            if answer is not None:
                self._heard(asked[ref], answer)

    def _note_standstill(self) -> None:
        """Called with the lock held. A turn of the thread takes two intervals at most."""
        now = _now()
        still_s = now - self._turned_at
        if still_s < self._silence_timeout_s / 2:
            return
        logger.warning("This process stood still for %.0f s; agents that gave it up meanwhile do not count.", still_s)
        self._stood_still_at = self._turned_at = now
        # It was this process that was silent: the others get their time anew.
        for watched in self._watched.values():
            watched.heard_at = now


def _now() -> float:
    """The clock of the agents' leases, which goes on while a machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
