"""How far the clocks of nodes are from this machine's, from what is known of messages between them. Pure.

A message that was sent at a by one clock and received at b by another bounds their difference on one side; one the
other way bounds it on the other side. Bounds of one node hold for another where the difference of those two is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kfpytorch_ray.cluster.doctor.report import Interval, NodeReport

_SAME = Interval(0.0, 0.0)


def round_trip(sent_at: float, answered: Interval, received_at: float) -> Interval:
    """What another clock shows more, given when it was asked, what it said, and when the answer was there."""
    return Interval(answered.low - received_at, answered.high - sent_at)


def ahead(
    reports: Iterable[NodeReport],
    boot_id: str,
    launched: Interval,
    seen_at: Mapping[int, tuple[float, float]],
) -> Mapping[int, Interval]:
    """What each node's clock shows more than this machine's, by rank.

    Args:
        reports: Of the nodes.
        boot_id: This machine's kernel; where it is a node's, too, they have one clock.
        launched: From before the launch to after its end, by this machine's clock.
        seen_at: By rank: when it wrote its answer into the storage by its own clock, and when that was seen here by
            this machine's.
    """
    by_rank = {report.rank: report for report in reports}
    own = {
        rank: _SAME if report.boot_id and report.boot_id == boot_id else _own(report, launched, seen_at.get(rank))
        for rank, report in by_rank.items()
    }
    known = dict(own)
    for report in by_rank.values():
        for peer in report.peers:
            if peer.ahead is None or peer.rank not in own:
                continue
            mine, theirs = own[report.rank], own[peer.rank]
            forth = Interval(mine.low + peer.ahead.low, mine.high + peer.ahead.high)
            back = Interval(theirs.low - peer.ahead.high, theirs.high - peer.ahead.low)
            known[peer.rank] = _both(known[peer.rank], forth)
            known[report.rank] = _both(known[report.rank], back)
    return known


def _own(report: NodeReport, launched: Interval, seen: tuple[float, float] | None) -> Interval:
    found = Interval(report.ended_at - launched.high, report.began_at - launched.low)
    if report.storage is not None and report.storage.beat_at is not None:
        found = _both(found, Interval(found.low, report.storage.read_at - report.storage.beat_at))
    if seen is not None:
        found = _both(found, Interval(seen[0] - seen[1], found.high))
    return found


def _both(one: Interval, other: Interval) -> Interval:
    low, high = max(one.low, other.low), min(one.high, other.high)
    # A clock that was set meanwhile makes them contradict each other.
    return Interval(low, high) if low <= high else one
