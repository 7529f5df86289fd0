"""How a rank ended in a round: from what its supervisor knows to the record that the controller judges.

Pure but for the reading of log files; nothing here knows processes.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from kfpytorch_ray.cluster.protocol import WorkerFailure
from kfpytorch_ray.heartbeat import Beat
from kfpytorch_ray.results import Outcome, RankRecord, Stage

LOG_TAIL_LINES = 20
_LOG_TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Ended:
    """How one process ended.

    Attributes:
        exit_code: Negative for a signal; None where it does not end, not even by SIGKILL.
        at: Seconds since the epoch at which that was seen.
        stopped_at: When this launch told it to stop; None if it ended before.
        out_of_memory: Whether the kernel killed processes for want of memory, in its cgroup and in this round.
        stacks: Of all its threads, where it was stopped because it hung; None otherwise.
    """

    exit_code: int | None
    at: float
    stopped_at: float | None = None
    out_of_memory: bool = False
    stacks: str | None = None


@dataclass(frozen=True, slots=True)
class Traces:
    """What a rank of one round has left.

    Attributes:
        ended: How its process ended; None where it never started.
        failure: What it wrote of its own failure.
        beat: What it told of its progress.
        last_sign: Seconds since the epoch of its last sign of progress, or of the start of the round.
        stdout: File with its standard output; None where it never started.
        stderr: File with its standard error.
        started_at: Seconds since the epoch at which its process was started; None where it never was.
        called_at: Seconds since the epoch at which it began to run the function; None where it never did.
    """

    ended: Ended | None
    failure: WorkerFailure | None
    beat: Beat
    last_sign: float
    stdout: str | None = None
    stderr: str | None = None
    started_at: float | None = None
    called_at: float | None = None


def outcome_of(traces: Traces) -> tuple[Outcome, str]:
    """How a rank ended, and one line that says it."""
    ended, failure = traces.ended, traces.failure
    if ended is None:
        return Outcome.STOPPED, "stopped before it started"
    # What a worker raises once it was told to stop, from a handler of SIGTERM for example, is our doing.
    if failure is not None and (ended.stopped_at is None or failure.timestamp < ended.stopped_at):
        return Outcome.RAISED, failure.message
    if ended.stopped_at is not None:
        return _outcome_of_stopped(ended, ended.stopped_at, traces)
    if ended.exit_code == 0:
        # It has not finished: it left early, and what it returned is no result.
        return (Outcome.STOPPED, "left after it was asked to stop") if traces.beat.told else (Outcome.SUCCEEDED, "")
    if ended.exit_code is not None and ended.exit_code < 0:
        by = _signal_name(-ended.exit_code)
        return Outcome.KILLED, f"killed by {by}: out of memory" if ended.out_of_memory else f"killed by {by}"
    return Outcome.EXITED, f"left with exit code {ended.exit_code} and left no record of an exception"


def record_of(traces: Traces, rank: int, local_rank: int, node_rank: int, node: str) -> RankRecord:
    """The record of one rank.

    Args:
        traces: What it has left.
        rank: Global rank.
        local_rank: Rank on its node.
        node_rank: Rank of its node.
        node: Address of its node.
    """
    ended, failure = traces.ended, traces.failure
    outcome, message = outcome_of(traces)
    return RankRecord(
        rank=rank,
        local_rank=local_rank,
        node_rank=node_rank,
        node=node,
        outcome=outcome,
        exit_code=None if ended is None else ended.exit_code,
        timestamp=_timestamp(outcome, traces),
        message=message,
        traceback=failure.traceback if failure else "",
        stage=failure.stage if failure else Stage.CALL,
        recoverable=bool(failure and failure.recoverable),
        exception=failure.exception if failure else None,
        log_tail=_log_tail(traces),
        out_of_memory=ended is not None and ended.out_of_memory,
        progressed=traces.beat.progressed_at is not None,
        step=traces.beat.step,
        stacks=(ended.stacks or "") if ended is not None else "",
        started_at=traces.started_at,
        called_at=traces.called_at,
        ended_at=None if ended is None else ended.at,
    )


def _outcome_of_stopped(ended: Ended, stopped_at: float, traces: Traces) -> tuple[Outcome, str]:
    if ended.stacks is not None:
        step = "no step was told" if traces.beat.step is None else f"last step {traces.beat.step}"
        return Outcome.HUNG, f"made no progress for {max(0.0, stopped_at - traces.last_sign):.1f} s ({step})"
    if ended.exit_code is None:
        return Outcome.STOPPED, "stopped with the round, and does not end: it hangs in the kernel"
    return Outcome.STOPPED, "stopped with the round"


def _timestamp(outcome: Outcome, traces: Traces) -> float:
    if outcome is Outcome.HUNG:
        # So that the rank that stopped first comes first.
        return traces.last_sign
    if traces.failure is not None:
        return traces.failure.timestamp
    return time.time() if traces.ended is None else traces.ended.at


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _log_tail(traces: Traces) -> tuple[str, ...]:
    if traces.stdout is None or traces.stderr is None:
        return ()
    stdout = _last_lines(traces.stdout, None)
    # Not the traceback, which the record has already.
    stderr = _last_lines(traces.stderr, traces.failure.stderr_size_bytes if traces.failure else None)
    return (*stdout, *stderr)[-LOG_TAIL_LINES:]


def _last_lines(path: str, end: int | None) -> list[str]:
    """Up to LOG_TAIL_LINES lines before byte ``end`` of a file."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END) if end is None else end
            start = file.seek(max(0, end - _LOG_TAIL_BYTES))
            return file.read(end - start).decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    except FileNotFoundError:
        return []
