"""What is known of a run that torch elastic made in this process: less than of one on Ray.

torch does not tell when it restarts its workers, nor what became of those of other pods: there is one round, with this
node's ranks, or with those that torch says have failed.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Collection, Mapping
from typing import Any

from kfpytorch_ray.config import KubeflowBackend
from kfpytorch_ray.errors import KfpytorchRayError
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.report.data import Failure, ReportedNode, ReportedRank, ReportedRound, RunReport
from kfpytorch_ray.results import Ending, Outcome


def report_of(
    plan: LaunchPlan, started_at: float, returned: Collection[int], error: KfpytorchRayError | None = None
) -> RunReport:
    """The report of a run that is over.

    Args:
        plan: What was launched.
        started_at: Seconds since the epoch.
        returned: Global ranks of this node that have returned.
        error: Why it failed; its cause is torch's ``ChildFailedError`` where a rank failed.
    """
    now = time.time()
    failed: Mapping[int, Any] = getattr(error.__cause__, "failures", {}) if error is not None else {}
    ranks = [_returned(rank, local_rank, started_at, now) for local_rank, rank in enumerate(sorted(returned))]
    ranks += [_failed(rank, failure, started_at, now) for rank, failure in sorted(failed.items())]
    cause = min(failed, key=lambda rank: failed[rank].timestamp, default=None)
    one = ReportedRound(
        index=0,
        started_at=started_at,
        ended_at=now,
        ending=Ending.SUCCEEDED.value if error is None else Ending.FAILED.value,
        succeeded=error is None,
        nodes=(0,),
        ranks=tuple(ranks),
        cause=cause,
    )
    host = socket.gethostname()
    return RunReport(
        name=plan.name,
        run_id=plan.run_id,
        backend=KubeflowBackend.name,
        started_at=started_at,
        ended_at=now,
        nodes=(ReportedNode(0, host, started_at, started_at),),
        rounds=(one,) if ranks else (),
        failure=None if error is None else Failure(type(error).__name__, str(error), error.retryable),
    )


def _returned(rank: int, local_rank: int, started_at: float, ended_at: float) -> ReportedRank:
    return ReportedRank(rank, local_rank, 0, Outcome.SUCCEEDED.value, ended_at, called_at=started_at)


def _failed(rank: int, failure: Any, started_at: float, ended_at: float) -> ReportedRank:
    told = failure.message
    # What the rank's error file says, or torch's own words where it left none.
    text = told if isinstance(told, str) else str(told.get("message", ""))
    callstack = "" if isinstance(told, str) else str(told.get("extraInfo", {}).get("py_callstack", ""))
    killed = failure.exitcode < 0
    outcome = Outcome.KILLED if killed else Outcome.RAISED if callstack else Outcome.EXITED
    return ReportedRank(
        rank=rank,
        local_rank=failure.local_rank,
        node=0,
        outcome=outcome.value,
        ended_at=min(float(failure.timestamp) or ended_at, ended_at),
        called_at=started_at,
        exit_code=failure.exitcode,
        message=f"killed by {_signal(-failure.exitcode)}" if killed else text.strip(),
        traceback=callstack,
    )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
