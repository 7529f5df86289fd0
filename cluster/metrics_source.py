"""What rank 0 tells by ``progress()``, as its agent hands it to the controller: with pulses, and at the end of a round.

An answer may not arrive, and the end of a round overtakes a pulse. So what the last answer held is in the next one
again, unless the next pulse has shown that it arrived; whoever takes points passes over those that it has.
"""

from __future__ import annotations

import threading

from kfpytorch_ray.metric_page import MetricPage
from kfpytorch_ray.metrics import MetricPoint, thinned

MOST_AT_A_TIME = 64
"""Of one answer: more than a terminal shows in that time, and a page full of them in a minute."""


class MetricsSource:
    """The points of one agent. Methods may be called from several threads.

    Args:
        page: On which a worker tells of them.
    """

    def __init__(self, page: MetricPage) -> None:
        self._page = page
        self._round: int | None = None
        self._next = 0
        self._handed_out: list[MetricPoint] = []
        self._lock = threading.Lock()

    def begin(self, round_index: int) -> None:
        """A round with rank 0 begins here."""
        with self._lock:
            self._round = round_index
            self._next = 0
            self._handed_out = []

    def next(self) -> tuple[MetricPoint, ...]:
        """Points since the last call, whose answer has arrived."""
        with self._lock:
            self._handed_out = self._new()
            return tuple(self._handed_out)

    def end(self) -> tuple[MetricPoint, ...]:
        """The round is over: what is not known to have arrived."""
        with self._lock:
            points = (*self._handed_out, *self._new())
            self._round = None
            self._handed_out = []
            return points

    def _new(self) -> list[MetricPoint]:
        if self._round is None:
            return []
        points = self._page.read(self._round, self._next)
        if points:
            self._next = points[-1].number + 1
        return thinned(points, MOST_AT_A_TIME)
