"""What follows from a round that ended: pure decisions, no processes.

Which rank's end is the cause of the others', and whether the group is started again.
"""

from __future__ import annotations

import re
from enum import Enum, IntEnum

from kfpytorch_ray.results import Outcome, RankRecord, RoundRecord, Stage


class Decision(Enum):
    """What the controller does next."""

    FINISH = "finish"
    RESTART = "restart"
    RAISE = "raise"


class _Severity(IntEnum):
    """How well an end explains the others', best first."""

    EXCEPTION = 0
    EXIT_CODE = 1
    SIGNAL = 2
    LOST = 3
    ABORT = 4
    REPORTS_PEER = 5


_PEER_REPORT = re.compile(
    r"connection (?:was )?(?:likely )?(?:closed|reset|refused)|broken pipe|closed by peer|pair closure|socket closed|"
    r"socket timeout|timed? ?out (?:waiting|after)|monitoredbarrier|collective operation timeout|"
    r"remote process exited|communicator was aborted|ncclRemoteError|ncclSystemError|Dist(?:Network|Store)Error",
    re.IGNORECASE,
)
"""What torch.distributed says when another rank is gone: true, and never the cause when there is a better one."""

_DISTRIBUTED = re.compile(r"torch[/\\.]distributed|Dist(?:Backend|Network|Store)Error|gloo|nccl", re.IGNORECASE)
"""Marks an error of torch.distributed; a refused connection to the user's own data server is a cause like any other."""


def decide(ended: RoundRecord, restarts_used: int, max_restarts: int) -> Decision:
    """What to do after a round.

    A function that cannot be loaded and a result that cannot be pickled fail the same way every time: they are not
    tried again.

    Args:
        ended: The round.
        restarts_used: Restarts so far.
        max_restarts: Restarts allowed, counted over all nodes.
    """
    if ended.succeeded:
        return Decision.FINISH
    if any(rank.outcome is Outcome.LOST for rank in ended.ranks):
        return Decision.RAISE
    cause = root_cause(ended)
    if cause.outcome is Outcome.RAISED and cause.stage is not Stage.CALL:
        return Decision.RAISE
    return Decision.RESTART if restarts_used < max_restarts else Decision.RAISE


def root_cause(ended: RoundRecord) -> RankRecord:
    """The rank whose end explains the others': by severity, then by time. Ranks that were stopped never do.

    Raises:
        ValueError: No rank failed.
    """
    failed = failures(ended)
    if not failed:
        msg = "the round has no failed rank"
        raise ValueError(msg)
    return min(failed, key=lambda rank: (_severity(rank), rank.timestamp, rank.rank))


def ending_cause(ended: RoundRecord, restarts_used: int, max_restarts: int) -> RankRecord:
    """The rank that explains why the launch ends with this round: the root cause.

    But where a rank raised, could have been tried again, and a node was lost in the same round, it is the lost node.
    """
    lost = [rank for rank in ended.ranks if rank.outcome is Outcome.LOST]
    return lost[0] if lost and restarts_used < max_restarts else root_cause(ended)


def failures(ended: RoundRecord) -> tuple[RankRecord, ...]:
    """The ranks that ended badly of themselves."""
    return tuple(rank for rank in ended.ranks if rank.outcome not in (Outcome.SUCCEEDED, Outcome.STOPPED))


def alike(one: RankRecord, other: RankRecord) -> bool:
    """Whether two ranks failed the same way."""
    return (one.outcome, one.message) == (other.outcome, other.message)


def _severity(rank: RankRecord) -> _Severity:
    match rank.outcome:
        case Outcome.RAISED:
            reports = _PEER_REPORT.search(rank.message) and _DISTRIBUTED.search(rank.message + rank.traceback)
            return _Severity.REPORTS_PEER if reports else _Severity.EXCEPTION
        case Outcome.EXITED:
            return _Severity.EXIT_CODE
        case Outcome.KILLED:
            return _Severity.ABORT if "SIGABRT" in rank.message else _Severity.SIGNAL
        case _:
            return _Severity.LOST
