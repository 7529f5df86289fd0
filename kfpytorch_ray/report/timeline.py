"""The timeline to scale: what the driver did, the rounds, and each node with its ranks. Pure; positions are per mille."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kfpytorch_ray.report.breakdown import Segment, called_at, segments, within
from kfpytorch_ray.report.data import ReportedNode, ReportedRank, ReportedRound, RunReport
from kfpytorch_ray.report.scales import Tick, duration, time_ticks

WIDTH = 1000.0
_THINNEST = 1.5
"""What is shorter is drawn this wide, so that it can be seen at all."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of time.

    Attributes:
        x: Where it begins.
        width: How long it is.
        kind: Which colour it has.
        title: What it is, for who points at it.
        text: What is written in it.
    """

    x: float
    width: float
    kind: str
    title: str
    text: str = ""

    @property
    def end(self) -> float:
        """Where it ends."""
        return self.x + self.width


@dataclass(frozen=True, slots=True)
class Lane:
    """A row of bars.

    Attributes:
        label: What it is of.
        detail: More about it.
        bars: In the order in which they are drawn.
        ending: Whether and how what it is of ended badly: ``"cause"``, ``"failed"`` or empty; and where, and a title.
    """

    label: str
    bars: tuple[Bar, ...]
    detail: str = ""
    ending: tuple[str, float, str] = ("", 0.0, "")


@dataclass(frozen=True, slots=True)
class NodeLanes:
    """A node, and below it its ranks."""

    node: Lane
    ranks: tuple[Lane, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """All rows.

    Attributes:
        ticks: Of the time axis.
        driver: What the launch did.
        rounds: One bar for each.
        nodes: By number.
        edges: Where rounds begin.
    """

    ticks: tuple[Tick, ...]
    driver: Lane
    rounds: Lane
    nodes: tuple[NodeLanes, ...]
    edges: tuple[float, ...]


def timeline_of(report: RunReport) -> Timeline:
    """The timeline of a run."""
    axis = Axis(report.started_at, report.ended_at)
    return Timeline(
        ticks=time_ticks(axis.seconds),
        driver=Lane("launch", tuple(_segment_bar(axis, segment) for segment in segments(report))),
        rounds=Lane("rounds", tuple(_round_bar(axis, one) for one in report.rounds)),
        nodes=tuple(_node(axis, report, node) for node in report.nodes),
        edges=tuple(axis.at(one.started_at) for one in report.rounds),
    )


@dataclass(frozen=True, slots=True)
class Axis:
    """From the start of a run to its end."""

    started_at: float
    ended_at: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return max(self.ended_at - self.started_at, 1e-3)

    def at(self, moment: float) -> float:
        """Where a moment lies."""
        position = WIDTH * (moment - self.started_at) / self.seconds
        return round(min(max(position, 0.0), WIDTH), 1)

    def bar(self, started_at: float, ended_at: float, kind: str, title: str, text: str = "") -> Bar:
        """A bar from one moment to another."""
        x = min(self.at(started_at), WIDTH - _THINNEST)
        return Bar(x, round(max(self.at(ended_at) - x, _THINNEST), 1), kind, title, text)


def _segment_bar(axis: Axis, segment: Segment) -> Bar:
    name = segment.activity.name.lower()
    of = "" if segment.round_index is None else f" (round {segment.round_index})"
    title = f"{segment.activity.value}{of}: {duration(segment.seconds)}"
    return axis.bar(segment.started_at, segment.ended_at, name, title)


def _round_bar(axis: Axis, one: ReportedRound) -> Bar:
    seconds = one.ended_at - one.started_at
    title = f"round {one.index}: {one.ending}, after {duration(seconds)}" + (f"; {one.paid}" if one.paid else "")
    kind = "good" if one.succeeded else "bad" if one.cause is not None else "neutral"
    return axis.bar(one.started_at, one.ended_at, kind, title, f"round {one.index}")


def _node(axis: Axis, report: RunReport, node: ReportedNode) -> NodeLanes:
    played = [one for one in report.rounds if node.number in one.nodes]
    by_rank: dict[int, list[tuple[ReportedRound, ReportedRank]]] = {}
    for one in played:
        for rank in one.ranks:
            if rank.node == node.number:
                by_rank.setdefault(rank.local_rank, []).append((one, rank))
    node_rank = f"node {played[-1].nodes.index(node.number)}" if played else "node"
    end = report.ended_at if node.ended_at is None else node.ended_at
    ready_at = end if node.ready_at is None else node.ready_at
    lost = ("failed", axis.at(end), f"lost: {node.lost_because}") if node.lost_because else ("", 0.0, "")
    bars = (
        axis.bar(node.started_at, ready_at, "agents", f"agent starting: {duration(ready_at - node.started_at)}"),
        axis.bar(ready_at, end, "present", f"agent there for {duration(max(0.0, end - ready_at))}"),
    )
    lanes = tuple(_rank_lane(axis, parts) for _, parts in sorted(by_rank.items()))
    return NodeLanes(Lane(node_rank, bars[: 1 if node.ready_at is None else 2], node.address, lost), lanes)


def _rank_lane(axis: Axis, parts: list[tuple[ReportedRound, ReportedRank]]) -> Lane:
    ranks = list(dict.fromkeys(rank.rank for _, rank in parts))
    ending = ("", 0.0, "")
    for one, rank in parts:
        if rank.outcome not in ("", "succeeded", "stopped"):
            kind = "cause" if rank.rank == one.cause else "failed"
            ending = max(ending, (kind, axis.at(within(one, rank.ended_at)), _sentence(one, rank)), key=_weight)
    bars = tuple(bar for one, rank in parts for bar in _rank_bars(axis, one, rank))
    return Lane("rank " + ", ".join(map(str, ranks)), bars, ending=ending)


def _weight(ending: tuple[str, float, str]) -> int:
    return ("", "failed", "cause").index(ending[0])


def _rank_bars(axis: Axis, one: ReportedRound, rank: ReportedRank) -> Iterator[Bar]:
    ended_at = within(one, rank.ended_at)
    began = one.started_at if rank.started_at is None else within(one, rank.started_at)
    called = called_at(one, rank)
    if called > began:
        title = f"rank {rank.rank}, round {one.index}: starting, {duration(called - began)}"
        yield axis.bar(began, called, "workers", title)
    if rank.called_at is not None:
        title = f"{_sentence(one, rank)}, {duration(ended_at - called)} after the function was called"
        yield axis.bar(called, ended_at, f"o-{rank.outcome or 'unknown'}", title)


def _sentence(one: ReportedRound, rank: ReportedRank) -> str:
    text = f"rank {rank.rank}, round {one.index}: {rank.outcome or 'ended'}"
    return f"{text} ({rank.message.splitlines()[0][:160]})" if rank.message else text
