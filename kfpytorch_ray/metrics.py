"""What rank 0 tells of its training by ``progress()``: points, and the bounded history of them that a driver keeps.

Plain data for whoever shows it: the terminal while it runs, the run deck afterwards. A round's points are in its
``RoundRecord``. Standard library only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MOST_POINTS = 1000
"""Of one round: more than a curve has pixels."""


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One call of ``progress()`` by rank 0.

    Attributes:
        round_index: In which round.
        number: Of the call in its round, from 0.
        step: As the function counts it.
        at: Seconds since the epoch, by the clock of rank 0's node.
        total: Steps in all; None where it was not told.
        values: Metrics by name; NaN and infinities are kept.
    """

    round_index: int
    number: int
    step: int
    at: float
    total: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)


def thinned(points: list[MetricPoint], most: int) -> list[MetricPoint]:
    """At most so many of these points, evenly, the last one always."""
    if len(points) <= most:
        return points
    stride = -(-len(points) // most)
    return points[(len(points) - 1) % stride :: stride]


@dataclass(slots=True)
class _Curve:
    """Of one round: every ``stride``-th point that came, and the last."""

    points: list[MetricPoint] = field(default_factory=list)
    stride: int = 1
    came: int = 0
    last: MetricPoint | None = None


class MetricHistory:
    """All rounds of one launch. Several threads may use it.

    Args:
        most: Points that are kept of one round; of more, every second, fourth, ... and the last.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most
        self._curves: dict[int, _Curve] = {}
        self._lock = threading.Lock()

    def add(self, points: Iterable[MetricPoint]) -> list[MetricPoint]:
        """Take points in their order; those that have come before are passed over.

        Returns:
            Those that are new.
        """
        new = []
        with self._lock:
            for point in points:
                curve = self._curves.setdefault(point.round_index, _Curve())
                if curve.last is not None and point.number <= curve.last.number:
                    continue
                if curve.came % curve.stride == 0:
                    curve.points.append(point)
                curve.came += 1
                curve.last = point
                new.append(point)
                # One place is the last point's.
                if len(curve.points) >= self._most:
                    curve.points = curve.points[::2]
                    curve.stride *= 2
        return new

    def of_round(self, round_index: int) -> tuple[MetricPoint, ...]:
        """What is kept of a round, in its order."""
        with self._lock:
            curve = self._curves.get(round_index)
            if curve is None or curve.last is None:
                return ()
            return (*curve.points, *(() if curve.points[-1] is curve.last else (curve.last,)))
