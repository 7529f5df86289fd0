"""What a view can do, and the launch as its driver tells of it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from typing import Protocol

from kfpytorch_ray.live.status import Phase, Status, Steps
from kfpytorch_ray.metrics import MetricHistory, MetricPoint


class View(Protocol):
    """Shows where a launch stands. Its methods are not called at the same time."""

    def changed(self, status: Status) -> None:
        """The launch does something else, or is further."""
        ...

    def show(self, text: str, error: bool) -> None:
        """Pass on whole lines that a rank has printed.

        Args:
            text: The lines.
            error: Whether to standard error.
        """
        ...

    def close(self, status: Status, how: str) -> None:
        """The launch is over.

        Args:
            status: Where it stood.
            how: How it ended.
        """
        ...


class Live:
    """One launch. Several threads may tell.

    Args:
        name: Of the launch.
        run_id: Of the launch.
        view: Shows it.
    """

    def __init__(self, name: str, run_id: str, view: View) -> None:
        self._status = Status(name, run_id)
        self._view = view
        self._alive: dict[int, int] = {}
        self._lock = threading.RLock()
        # Apart, because a terminal may hold up who prints lines.
        self._printing = threading.Lock()
        self.metrics = MetricHistory()
        view.changed(self._status)

    def nodes(self, placed: int, wanted: int, why: str = "") -> None:
        """How many of the nodes there are before a round, and why there are not more."""
        with self._lock:
            status = self._status
            status.placed, status.wanted = placed, wanted
            status.why = why or (status.why if placed < wanted else "")
            status.enter(Phase.PLACING if placed < wanted else Phase.STARTING)
            self._view.changed(status)

    def round(self, round_index: int, rounds: int, nodes: int, world: int) -> None:
        """A round begins.

        Args:
            round_index: 0 for the first.
            rounds: As many are allowed.
            nodes: Nodes that take part.
            world: Its ranks.
        """
        with self._lock:
            self._alive = {}
            status = self._status
            status.round_index, status.rounds, status.placed, status.world = round_index, rounds, nodes, world
            status.alive, status.why, status.steps = None, "", Steps()
            # Also after another round.
            status.phase = Phase.STARTING
            status.enter(Phase.RUNNING)
            self._view.changed(status)

    def heard(self, agent: int, round_index: int | None, alive: int, points: Iterable[MetricPoint]) -> None:
        """What an agent has answered to a pulse.

        Args:
            agent: Its number.
            round_index: Of the round that runs there; None between rounds.
            alive: Ranks whose process runs there.
            points: What rank 0 has told, if it is there.
        """
        self.told(points)
        with self._lock:
            status = self._status
            if round_index != status.round_index or status.phase is not Phase.RUNNING:
                return
            self._alive[agent] = alive
            # Whoever has not answered yet has begun, as far as is known.
            if sum(self._alive.values()) <= status.world and len(self._alive) >= status.placed:
                status.alive = sum(self._alive.values())
            self._view.changed(status)

    def told(self, points: Iterable[MetricPoint]) -> None:
        """What rank 0 has told; some may come twice."""
        with self._lock:
            status = self._status
            new = [point for point in self.metrics.add(points) if point.round_index == status.round_index]
            if new:
                status.steps.add(new)
                self._view.changed(status)

    def forget(self, agent: int) -> None:
        """An agent is lost, and its ranks with it."""
        with self._lock:
            if agent in self._alive:
                self._alive[agent] = 0

    def show(self, text: str, error: bool) -> None:
        """Pass on whole lines that a rank has printed."""
        with self._printing:
            self._view.show(text, error)

    def close(self, how: str) -> None:
        """It is over."""
        with self._lock:
            self._status.enter(Phase.ENDED)
            self._view.close(self._status, how)


class Silent:
    """Shows ranks' lines and nothing else."""

    def changed(self, status: Status) -> None:
        """Nothing."""

    def show(self, text: str, error: bool) -> None:
        """To where this process prints now."""
        stream = sys.stderr if error else sys.stdout
        stream.write(text)
        stream.flush()

    def close(self, status: Status, how: str) -> None:
        """Nothing."""
