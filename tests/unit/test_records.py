"""How a rank ended, from what it has left."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kfpytorch_ray.cluster.protocol import WorkerFailure
from kfpytorch_ray.cluster.records import LOG_TAIL_LINES, Ended, Traces, outcome_of, record_of
from kfpytorch_ray.heartbeat import Beat
from kfpytorch_ray.results import Outcome, RankRecord, Stage

SILENT = Beat(pid=1, rank=3, step=None, progressed_at=None, listens=False, told=False)
TOLD = replace(SILENT, listens=True, told=True)
START = 1000.0
FAILED_AT = 1010.0


def traces(ended: Ended | None, beat: Beat = SILENT, failed: bool = False) -> Traces:
    failure = WorkerFailure(Stage.CALL, "ValueError: no", "Traceback: no", FAILED_AT, True, 4, b"pickle")
    return Traces(ended, failure if failed else None, beat, last_sign=START)


def record(given: Traces) -> RankRecord:
    return record_of(given, rank=3, local_rank=1, node_rank=1, node="10.0.0.2")


@pytest.mark.parametrize(
    ("ended", "beat", "failed", "outcome", "message"),
    [
        (None, SILENT, False, Outcome.STOPPED, "stopped before it started"),
        (Ended(0, 1020.0), SILENT, False, Outcome.SUCCEEDED, ""),
        (Ended(0, 1020.0), replace(SILENT, listens=True), False, Outcome.SUCCEEDED, ""),
        (Ended(0, 1020.0), TOLD, False, Outcome.STOPPED, "left after it was asked to stop"),
        (Ended(1, 1020.0), TOLD, True, Outcome.RAISED, "ValueError: no"),
        (Ended(1, 1020.0), SILENT, True, Outcome.RAISED, "ValueError: no"),
        (Ended(3, 1020.0), TOLD, False, Outcome.EXITED, "left with exit code 3 and left no record of an exception"),
        (Ended(-signal.SIGABRT, 1020.0), SILENT, False, Outcome.KILLED, "killed by SIGABRT"),
        (Ended(-40, 1020.0), SILENT, False, Outcome.KILLED, "killed by signal 40"),
        (Ended(-9, 1020.0), TOLD, False, Outcome.KILLED, "killed by SIGKILL"),
        (Ended(-9, 1020.0, None, True), SILENT, False, Outcome.KILLED, "killed by SIGKILL: out of memory"),
        # Stopped by us: nothing it does afterwards is its own doing, not even success.
        (Ended(0, 1020.0, 1015.0), SILENT, False, Outcome.STOPPED, "stopped with the round"),
        (Ended(0, 1020.0, 1015.0), TOLD, False, Outcome.STOPPED, "stopped with the round"),
        (Ended(-15, 1020.0, 1015.0), SILENT, False, Outcome.STOPPED, "stopped with the round"),
        (Ended(1, 1020.0, FAILED_AT - 1), SILENT, True, Outcome.STOPPED, "stopped with the round"),
        (Ended(1, 1020.0, FAILED_AT + 1), SILENT, True, Outcome.RAISED, "ValueError: no"),
        (
            Ended(None, 1020.0, 1015.0),
            SILENT,
            False,
            Outcome.STOPPED,
            "stopped with the round, and does not end: it hangs in the kernel",
        ),
        (
            Ended(-15, 1020.0, 1012.5, stacks=""),
            SILENT,
            False,
            Outcome.HUNG,
            "made no progress for 12.5 s (no step was told)",
        ),
        (
            Ended(None, 1020.0, 1012.5, stacks="main"),
            replace(SILENT, step=7),
            False,
            Outcome.HUNG,
            "made no progress for 12.5 s (last step 7)",
        ),
        (
            Ended(1, 1020.0, FAILED_AT - 1, stacks="main"),
            SILENT,
            True,
            Outcome.HUNG,
            "made no progress for 9.0 s (no step was told)",
        ),
        (Ended(1, 1020.0, FAILED_AT + 1, stacks="main"), SILENT, True, Outcome.RAISED, "ValueError: no"),
    ],
)
def test_every_end_has_a_name(ended: Ended | None, beat: Beat, failed: bool, outcome: Outcome, message: str) -> None:
    """What a rank did by itself before it was stopped counts; a rank that was told to leave has not succeeded."""
    assert outcome_of(traces(ended, beat, failed)) == (outcome, message)


def test_a_record_holds_what_the_rank_wrote_of_its_failure() -> None:
    """Traceback, stage, exception and the time of it."""
    made = record(traces(Ended(1, 1020.0), failed=True))
    assert (made.rank, made.local_rank, made.node_rank, made.node) == (3, 1, 1, "10.0.0.2")
    assert (made.exit_code, made.timestamp, made.traceback, made.stage) == (1, FAILED_AT, "Traceback: no", Stage.CALL)
    assert (made.recoverable, made.exception) == (True, b"pickle")


def test_a_record_holds_what_is_known_from_outside() -> None:
    """Progress, memory, stacks; the time at which a rank that hangs was last alive, so that the first comes first."""
    beat = replace(SILENT, step=5, progressed_at=1.0)
    hung = record(traces(Ended(-15, 1020.0, 1015.0, stacks="main")))
    assert (hung.stacks, hung.timestamp, hung.progressed) == ("main", START, False)
    killed = record(traces(Ended(-9, 1020.0, None, True), beat))
    assert (killed.out_of_memory, killed.timestamp, killed.progressed, killed.step) == (True, 1020.0, True, 5)
    assert not killed.stacks


def test_a_rank_that_never_started_ended_now() -> None:
    """There is no better time to give."""
    before = time.time()
    assert before <= record(traces(None)).timestamp <= time.time()


def test_the_last_lines_are_kept_without_the_traceback(tmp_path: Path) -> None:
    """Of both streams, 20 at most; the record has the traceback already. Those of a success are shown, too."""
    stdout, stderr = tmp_path / "out", tmp_path / "err"
    stdout.write_text("".join(f"line {number}\n" for number in range(50)))
    stderr.write_text("oh\n\nTraceback: no\n")
    given = replace(traces(Ended(1, 1020.0), failed=True), stdout=str(stdout), stderr=str(stderr))
    tail = record(given).log_tail
    assert len(tail) == LOG_TAIL_LINES
    assert tail[-3:] == ("line 49", "oh", "")
    assert record(replace(given, failure=None)).log_tail[-1] == "Traceback: no"
    assert record(replace(given, failure=None, ended=Ended(0, 1020.0))).log_tail[-1] == "Traceback: no"
    assert record(replace(given, stdout=str(tmp_path / "none"))).log_tail == ("oh", "")
