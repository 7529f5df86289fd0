"""The timeline to scale: what the driver did, the rounds, each node with its ranks. Pure; positions are per mille."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kfpytorch_ray.report.breakdown import NO_FAILURE, Segment, called_at, segments, within
from kfpytorch_ray.report.data import ReportedNode, ReportedRank, ReportedRound, RunReport
from kfpytorch_ray.report.scales import Tick, duration, time_ticks

WIDTH = 1000.0
_THINNEST = 1.5
"""What is shorter is drawn this wide, so that it can be seen at all."""
_MOST_TITLES = 64
"""Parts of rounds that ranks may have before what each is of is no longer said of it."""
_MOST_PARTS = 400
"""Parts of rounds of ranks that are drawn, the last ones: a page has a size."""


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
class BadEnd:
    """Where a rank or a node failed: ``kind`` is ``"cause"`` for the root cause of a round, else ``"failed"``."""

    x: float
    kind: str
    title: str


@dataclass(frozen=True, slots=True)
class Lane:
    """A row of bars.

    Attributes:
        label: What it is of.
        detail: More about it.
        bars: In the order in which they are drawn.
        endings: Where it ended badly.
    """

    label: str
    bars: tuple[Bar, ...]
    detail: str = ""
    endings: tuple[BadEnd, ...] = ()


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
        legend: Kind and meaning of the colours of ranks that occur.
    """

    ticks: tuple[Tick, ...]
    driver: Lane
    rounds: Lane
    nodes: tuple[NodeLanes, ...]
    edges: tuple[float, ...]
    legend: tuple[tuple[str, str], ...]


_MEANINGS = {
    "workers": "starting",
    "o-succeeded": "returned",
    "o-raised": "failed",
    "o-exited": "failed",
    "o-killed": "failed",
    "o-hung": "failed",
    "o-lost": "lost with its node",
    "o-stopped": "stopped with its round",
    "o-unknown": "running",
}


def timeline_of(report: RunReport) -> Timeline:
    """The timeline of a run."""
    axis = Axis(report.started_at, report.ended_at)
    parts = _parts(report)
    nodes = tuple(_node(axis, report, node, parts.get(node.number, [])) for node in report.nodes)
    kinds = {bar.kind for one in nodes for lane in one.ranks for bar in lane.bars}
    meanings = {meaning: kind for kind, meaning in reversed(_MEANINGS.items()) if kind in kinds}
    return Timeline(
        ticks=time_ticks(axis.seconds),
        driver=Lane("launch", tuple(_segment_bar(axis, segment) for segment in segments(report))),
        rounds=Lane("rounds", tuple(_round_bar(axis, one) for one in report.rounds)),
        nodes=nodes,
        edges=tuple(axis.at(one.started_at) for one in report.rounds),
        legend=tuple((kind, meaning) for meaning, kind in reversed(meanings.items())),
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


@dataclass(frozen=True, slots=True)
class _Part:
    """A rank in a round, and whether there is room to say what it is."""

    round: ReportedRound
    rank: ReportedRank
    titled: bool

    @property
    def ended_at(self) -> float:
        return within(self.round, self.rank.ended_at)

    @property
    def sentence(self) -> str:
        rank = self.rank
        text = f"rank {rank.rank}, round {self.round.index}: {rank.outcome or 'ended'}"
        return f"{text} ({rank.message.splitlines()[0][:160]})" if rank.message and self.titled else text


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


def _parts(report: RunReport) -> dict[int, list[_Part]]:
    """The parts of rounds that are drawn, by number of the node."""
    drawn: list[_Part] = []
    for one in reversed(report.rounds):
        if drawn and len(drawn) + len(one.ranks) > _MOST_PARTS:
            break
        drawn[:0] = [_Part(one, rank, len(drawn) + len(one.ranks) <= _MOST_TITLES) for rank in one.ranks]
    by_node: dict[int, list[_Part]] = {}
    for part in drawn:
        by_node.setdefault(part.rank.node, []).append(part)
    return by_node


def _node(axis: Axis, report: RunReport, node: ReportedNode, parts: list[_Part]) -> NodeLanes:
    played = [one for one in report.rounds if node.number in one.nodes]
    by_rank: dict[int, list[_Part]] = {}
    for part in parts:
        by_rank.setdefault(part.rank.local_rank, []).append(part)
    node_rank = f"node {played[-1].node_rank(node.number)}" if played else "node"
    end = report.ended_at if node.ended_at is None else node.ended_at
    ready_at = end if node.ready_at is None else node.ready_at
    lost = (BadEnd(axis.at(end), "failed", f"lost: {node.lost_because}"),) if node.lost_because else ()
    bars = (
        axis.bar(node.started_at, ready_at, "agents", f"agent starting: {duration(ready_at - node.started_at)}"),
        axis.bar(ready_at, end, "present", f"agent there for {duration(max(0.0, end - ready_at))}"),
    )
    lanes = tuple(_rank_lane(axis, parts) for _, parts in sorted(by_rank.items()))
    return NodeLanes(Lane(node_rank, bars[: 1 if node.ready_at is None else 2], node.address, lost), lanes)


def _rank_lane(axis: Axis, parts: list[_Part]) -> Lane:
    ranks = list(dict.fromkeys(part.rank.rank for part in parts))
    endings = tuple(
        BadEnd(axis.at(part.ended_at), "cause" if part.rank.rank == part.round.cause else "failed", part.sentence)
        for part in parts
        if part.rank.outcome not in NO_FAILURE and (part.titled or part.rank.rank == part.round.cause)
    )
    bars = tuple(bar for part in parts for bar in _rank_bars(axis, part))
    return Lane("rank " + ", ".join(map(str, ranks)), bars, endings=endings)


def _rank_bars(axis: Axis, part: _Part) -> Iterator[Bar]:
    one, rank, ended_at = part.round, part.rank, part.ended_at
    began = one.started_at if rank.started_at is None else within(one, rank.started_at)
    called = called_at(one, rank)
    if called > began:
        title = f"rank {rank.rank}, round {one.index}: starting, {duration(called - began)}"
        yield axis.bar(began, called, "workers", title if part.titled else "")
    if rank.called_at is not None:
        title = f"{part.sentence}, {duration(ended_at - called)} after the function was called"
        yield axis.bar(called, ended_at, f"o-{rank.outcome or 'unknown'}", title if part.titled else "")
