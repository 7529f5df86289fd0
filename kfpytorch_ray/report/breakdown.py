"""Where a launch's time went: every second of it belongs to one activity. Pure.

Between rounds the driver has told what it did; within a round it follows from when ranks were called and ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kfpytorch_ray.report.data import Activity, ReportedRank, ReportedRound, RunReport

NO_FAILURE = frozenset({"", "succeeded", "stopped"})
"""Outcomes of ranks that did not end badly of themselves."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the launch's time.

    Attributes:
        activity: What it went into.
        started_at: Seconds since the epoch.
        ended_at: Seconds since the epoch.
        round_index: Of the round that it is a part of; None outside rounds.
    """

    activity: Activity
    started_at: float
    ended_at: float
    round_index: int | None = None

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.ended_at - self.started_at


def segments(report: RunReport) -> tuple[Segment, ...]:
    """The launch's time from its start to its end, without the empty stretches."""
    found = [Segment(phase.activity, phase.started_at, phase.ended_at) for phase in report.phases]
    for one in report.rounds:
        found += _of_round(one)
    found.sort(key=lambda segment: (segment.started_at, segment.ended_at))
    return tuple(segment for segment in found if segment.seconds > 0)


def totals(report: RunReport) -> dict[Activity, float]:
    """Seconds by activity, in the order of the activities."""
    seconds = dict.fromkeys(Activity, 0.0)
    for segment in segments(report):
        seconds[segment.activity] += segment.seconds
    return {activity: total for activity, total in seconds.items() if total > 0}


def within(one: ReportedRound, at: float) -> float:
    """A time that a node told, moved into its round: clocks of machines differ."""
    return min(max(at, one.started_at), one.ended_at)


def called_at(one: ReportedRound, rank: ReportedRank) -> float:
    """When a rank began to run the function; its end where it never did."""
    return within(one, rank.ended_at if rank.called_at is None else rank.called_at)


def _of_round(one: ReportedRound) -> Iterator[Segment]:
    ranks = one.ranks
    running_at = max((called_at(one, rank) for rank in ranks if rank.called_at is not None), default=one.ended_at)
    ends = [within(one, rank.ended_at) for rank in ranks]
    if one.succeeded:
        over_at = max(ends, default=one.ended_at)
    else:
        failed = [within(one, rank.ended_at) for rank in ranks if rank.outcome not in NO_FAILURE]
        over_at = min(failed or ends, default=one.ended_at)
    # A rank may fail before the last one is called.
    running_at = min(running_at, over_at)
    running = Activity.RUNNING if one.succeeded else Activity.REPEATED
    after = Activity.RESULTS if one.succeeded else Activity.STOPPING
    yield Segment(Activity.WORKERS, one.started_at, running_at, one.index)
    yield Segment(running, running_at, over_at, one.index)
    yield Segment(after, over_at, one.ended_at, one.index)
