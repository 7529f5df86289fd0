"""Curves: what ranks used over time, and the metrics that they told. Pure; the lines are points of an SVG polyline.

Ranks are drawn together in groups of at most eight, each with a colour, and all groups of one quantity on one scale,
so that a rank that differs is seen. The more ranks there are, the fewer points each has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from kfpytorch_ray.report.data import Metric, RankSamples, RunReport, Sample
from kfpytorch_ray.report.scales import Tick, amount, memory, step_ticks, time_ticks, top_of, value_ticks
from kfpytorch_ray.report.timeline import WIDTH, Axis

HEIGHT = 240.0
GROUP = 8
_MOST_POINTS = 160
_POINTS_IN_ALL = 2600
_MOST_LINES = 16
_MOST_METRICS = 24

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve.

    Attributes:
        colour: Number of its colour.
        label: Of whom it is.
        title: More, for who points at it.
        pieces: Points of polylines; a line has a gap between two rounds.
    """

    colour: int
    label: str
    title: str
    pieces: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A pair of axes with curves."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    edges: tuple[float, ...] = ()

    @property
    def widest(self) -> str:
        """The longest word of the vertical axis, which makes room for it."""
        return max((tick.text for tick in self.y_ticks), key=len)


@dataclass(frozen=True, slots=True)
class ChartGroup:
    """Charts that are shown side by side."""

    title: str
    charts: tuple[Chart, ...]


@dataclass(frozen=True, slots=True)
class _Quantity:
    title: str
    unit: str
    value: Callable[[Sample], float | None]
    text: Callable[[float], str]
    binary: bool = False


_QUANTITIES = (
    _Quantity("Processor", "100 % is one core", lambda sample: sample.cpu_percent, lambda value: f"{value:.0f} %"),
    _Quantity("Memory", "resident, with children", lambda sample: sample.memory_bytes, memory, binary=True),
    _Quantity("GPU", "busy", lambda sample: sample.gpu_percent, lambda value: f"{value:.0f} %"),
    _Quantity("GPU memory", "in use", lambda sample: sample.gpu_memory_bytes, memory, binary=True),
)


def resource_charts(report: RunReport) -> tuple[ChartGroup, ...]:
    """What the ranks used: a group for each quantity, or one group where there is one chart of each."""
    if not report.rounds:
        return ()
    axis = Axis(report.rounds[0].started_at, report.rounds[-1].ended_at)
    edges = tuple(axis.at(one.started_at) for one in report.rounds[1:])
    found = []
    for quantity in _QUANTITIES:
        charts = _charts_of(quantity, report.samples, axis, edges)
        if charts:
            found.append(ChartGroup(quantity.title, charts))
    if found and all(len(group.charts) == 1 for group in found):
        return (ChartGroup("", tuple(group.charts[0] for group in found)),)
    return tuple(found)


def metric_charts(report: RunReport) -> tuple[Chart, ...]:
    """The metrics of all rounds, over the step."""
    by_name: dict[str, list[tuple[int, Metric]]] = {}
    for one in report.rounds:
        for metric in one.metrics:
            if metric.points:
                by_name.setdefault(metric.name, []).append((one.index, metric))
    return tuple(_metric_chart(name, told) for name, told in [*by_name.items()][:_MOST_METRICS])


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` of the points, with the lowest and the highest of each stretch."""
    if len(points) <= most:
        return list(points)
    buckets = max(most // 2, 1)
    kept: list[Point] = []
    for index in range(buckets):
        bucket = points[index * len(points) // buckets : (index + 1) * len(points) // buckets]
        lowest, highest = min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])
        kept += sorted({lowest, highest})
    return kept


def _charts_of(
    quantity: _Quantity, samples: Sequence[RankSamples], axis: Axis, edges: tuple[float, ...]
) -> tuple[Chart, ...]:
    values = {
        one.rank: [(sample, value) for sample in one.samples if (value := quantity.value(sample)) is not None]
        for one in samples
    }
    values = {rank: found for rank, found in values.items() if found}
    if not values:
        return ()
    top = top_of(max(value for found in values.values() for _, value in found), binary=quantity.binary)
    most = max(12, min(_MOST_POINTS, _POINTS_IN_ALL // len(values)))
    ranks = sorted(values)
    charts = []
    for first in range(0, len(ranks), GROUP):
        group = ranks[first : first + GROUP]
        lines = tuple(
            _resource_line(quantity, colour, rank, values[rank], axis, top, most) for colour, rank in enumerate(group)
        )
        title = quantity.title if len(ranks) <= GROUP else f"{quantity.title}, {_span(group)}"
        y_ticks = value_ticks(0.0, top, quantity.text)
        charts.append(Chart(title, quantity.unit, lines, time_ticks(axis.seconds), y_ticks, edges))
    return tuple(charts)


def _resource_line(
    quantity: _Quantity,
    colour: int,
    rank: int,
    found: Sequence[tuple[Sample, float]],
    axis: Axis,
    top: float,
    most: int,
) -> Line:
    by_round: dict[int, list[Point]] = {}
    for sample, value in found:
        by_round.setdefault(sample.round_index, []).append((axis.at(sample.at), HEIGHT * (1 - value / top)))
    share = max(2, most // len(by_round))
    mean = sum(value for _, value in found) / len(found)
    peak = max(value for _, value in found)
    title = f"rank {rank}: {quantity.text(mean)} on average, {quantity.text(peak)} at most"
    return Line(colour, f"rank {rank}", title, tuple(_polyline(thinned(one, share)) for one in by_round.values()))


def _metric_chart(name: str, every: Sequence[tuple[int, Metric]]) -> Chart:
    # The last ones: how it ended is among them.
    told = every[-_MOST_LINES:]
    finite = [point for _, metric in told for point in metric.points if _is_finite(point)]
    steps = [step for step, _ in finite] or [0.0]
    values = [value for _, value in finite] or [0.0]
    first, last = min(steps), max(steps)
    bottom, top = _bounds(min(values), max(values))
    one_rank = len({metric.rank for _, metric in told}) == 1

    def place(point: Point) -> Point:
        step, value = point
        return WIDTH * (step - first) / ((last - first) or 1.0), HEIGHT * (1 - (value - bottom) / (top - bottom))

    lines = []
    for index, metric in told:
        points = [point for point in metric.points if _is_finite(point)]
        label = f"round {index}" if one_rank else f"round {index}, rank {metric.rank}"
        broken = _broken_end(metric.points)
        said = [f"{amount(points[-1][1])} at step {points[-1][0]:.12g}"] if points else []
        title = f"{label}: {', then '.join([*said, *broken])}"
        drawn = (_polyline([place(point) for point in thinned(points, _MOST_POINTS)]),) if points else ()
        lines.append(Line(index % GROUP, ": ".join([label, *broken]), title, drawn))
    unit = "by step" if len(told) == len(every) else f"by step, the last {len(told)} of {len(every)} curves"
    return Chart(name, unit, tuple(lines), step_ticks(first, last), value_ticks(bottom, top, amount))


def _is_finite(point: Point) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _broken_end(points: Sequence[Point]) -> list[str]:
    """Where a metric became what cannot be drawn, and stayed so, such as ``nan from step 7``; empty if not."""
    broken = [*takewhile(lambda point: not _is_finite(point), reversed(points))]
    return [f"{value} from step {step:.12g}" for step, value in broken[-1:]]


def _bounds(lowest: float, highest: float) -> Point:
    """Where the axis of a metric begins and ends: at 0 where that is near."""
    if lowest >= 0 and lowest <= highest / 2:
        return 0.0, top_of(highest)
    margin = (highest - lowest) * 0.08 or abs(highest) * 0.08 or 1.0
    return lowest - margin, highest + margin


def _polyline(points: Sequence[Point]) -> str:
    drawn = [*points]
    if len(drawn) == 1:
        # A line of one point is not drawn at all.
        drawn.append((drawn[0][0] + 2, drawn[0][1]))
    return " ".join(f"{x:.0f},{y:.0f}" for x, y in drawn)


def _span(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
