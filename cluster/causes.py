"""Which rank's end is the cause of the others': pure, from the records of a round.

Exceptions explain more than exit codes, these more than signals (out of memory first), lost nodes, aborts, and a rank
that only reports that a peer is gone. What follows from it is kfpytorch_ray.cluster.policy's.
"""

from __future__ import annotations

import re
from enum import IntEnum

from kfpytorch_ray.results import Outcome, RankRecord, RoundRecord


class _Severity(IntEnum):
    """How well an end explains the others', best first."""

    EXCEPTION = 0
    EXIT_CODE = 1
    OUT_OF_MEMORY = 2
    SIGNAL = 3
    LOST = 4
    HUNG = 5
    ABORT = 6
    REPORTS_PEER = 7


_PEER_REPORT = re.compile(
    r"connection (?:was )?(?:likely )?(?:closed|reset|refused)|broken pipe|closed by peer|pair closure|socket closed|"
    r"socket timeout|timed? ?out (?:waiting|after)|monitoredbarrier|collective operation timeout|"
    r"remote process exited|communicator was aborted|ncclRemoteError|ncclSystemError|Dist(?:Network|Store)Error",
    re.IGNORECASE,
)
"""What torch.distributed says when another rank is gone: true, and never the cause when there is a better one."""

_DISTRIBUTED = re.compile(r"torch[/\\.]distributed|Dist(?:Backend|Network|Store)Error|gloo|nccl", re.IGNORECASE)
"""Marks an error of torch.distributed; a refused connection to the user's own data server is a cause like any other."""


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


def failures(ended: RoundRecord) -> tuple[RankRecord, ...]:
    """The ranks that ended badly of themselves."""
    return tuple(rank for rank in ended.ranks if rank.outcome not in (Outcome.SUCCEEDED, Outcome.STOPPED))


def may_miss_a_peer(rank: RankRecord) -> bool:
    """Whether a rank's end says no more than that another one, or the connection to it, is gone.

    NCCL's watchdog aborts the process for that.
    """
    return _severity(rank) in (_Severity.ABORT, _Severity.REPORTS_PEER)


def distributed(rank: RankRecord) -> bool:
    """Whether a rank's error came from torch.distributed."""
    return _DISTRIBUTED.search(rank.message + rank.traceback) is not None


def alike(one: RankRecord, other: RankRecord) -> bool:
    """Whether two ranks failed the same way."""
    return (one.outcome, one.message) == (other.outcome, other.message)


def _severity(rank: RankRecord) -> _Severity:
    match rank.outcome:
        case Outcome.RAISED:
            # With what it was raised from: training code wraps errors.
            said = rank.message + rank.traceback
            reports = _PEER_REPORT.search(said) and _DISTRIBUTED.search(said)
            return _Severity.REPORTS_PEER if reports else _Severity.EXCEPTION
        case Outcome.EXITED:
            return _Severity.EXIT_CODE
        case Outcome.KILLED if rank.out_of_memory:
            return _Severity.OUT_OF_MEMORY
        case Outcome.KILLED:
            return _Severity.ABORT if "SIGABRT" in rank.message else _Severity.SIGNAL
        case Outcome.HUNG:
            return _Severity.HUNG
        case _:
            return _Severity.LOST
