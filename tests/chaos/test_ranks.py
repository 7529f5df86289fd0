"""Ranks that fail, each way of the failure table."""

from __future__ import annotations

import signal
import threading

import pytest
import training
from training import Log, job, train

from kfpytorch_ray import (
    DeadlineExceededError,
    PayloadError,
    RecoverableWorkerError,
    ResultError,
    RunPolicy,
    WorkerFailedError,
    WorkerHungError,
    launch,
)
from kfpytorch_ray.results import Ending, Outcome
from kfpytorch_ray.testing import kill_rank, meanwhile, reached, wait_until

pytestmark = pytest.mark.usefixtures("whole")


@pytest.mark.row("a rank raises")
def test_rank_raises(log: Log) -> None:
    """All ranks start again, from the checkpoint, and the launch succeeds; the first round's record names the error."""
    result = launch(train, log, steps=8, misbehave=training.raise_once, elastic=job(2, max_restarts=1))
    failed, succeeded = result.rounds
    assert (failed.ending, succeeded.ending) == (Ending.FAILED, Ending.SUCCEEDED)
    assert failed.ranks[1].outcome is Outcome.RAISED
    assert "ValueError: the data are broken" in failed.ranks[1].message
    assert [result[rank].return_value for rank in range(2)] == [8, 8]
    assert [(seen.restarts, seen.world_size) for seen in log.rounds()] == [(0, 2), (1, 2)]
    assert log.at_most_one_step_was_lost()


@pytest.mark.row("a rank raises FlyteRecoverableException")
def test_rank_raises_recoverable(log: Log) -> None:
    """It is tried again here as often as max_restarts allows, then Flyte may."""
    with pytest.raises(RecoverableWorkerError, match="the data server is away") as caught:
        launch(train, log, steps=8, misbehave=training.raise_recoverable, elastic=job(2, max_restarts=1))
    assert caught.value.retryable
    assert [record.ending for record in caught.value.rounds] == [Ending.FAILED] * 2
    assert type(caught.value.__cause__).__name__ == "FlyteRecoverableException"


@pytest.mark.row("a rank is killed by a signal")
def test_rank_is_killed(log: Log, run: int) -> None:
    """The signal is named, and all ranks go on from the checkpoint in a new round."""
    signum = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM)[run % 4]

    def break_it() -> None:
        wait_until(lambda: reached(step=3, world_size=2), "three steps")
        kill_rank(run % 2, signum)
        wait_until(lambda: log.trained(rounds=2, world_size=2), "a second round")
        log.finish()

    with meanwhile(break_it):
        result = launch(train, log, elastic=job(2, max_restarts=1))
    failed, succeeded = result.rounds
    assert failed.ranks[run % 2].outcome is Outcome.KILLED
    assert signum.name in failed.ranks[run % 2].message
    assert failed.ranks[run % 2].exit_code == -signum
    assert succeeded.succeeded
    assert log.at_most_one_step_was_lost()


@pytest.mark.row("the same rank fails at the same place twice")
def test_rank_fails_at_the_same_place(log: Log) -> None:
    """It is not tried a third time, although some restarts are left."""
    with pytest.raises(WorkerFailedError, match=r"no such column(?s:.*)not tried again") as caught:
        launch(train, log, misbehave=training.raise_at_once, elastic=job(2, max_restarts=5))
    assert [record.ending for record in caught.value.rounds] == [Ending.FAILED] * 2


@pytest.mark.row("active_deadline_seconds has passed")
def test_deadline_passes(log: Log) -> None:
    """All ranks are stopped, and no restart is spent on that."""
    elastic = job(2, max_restarts=5)
    elastic.run_policy = RunPolicy(active_deadline_seconds=5)
    with pytest.raises(DeadlineExceededError, match="active_deadline_seconds") as caught:
        launch(train, log, elastic=elastic)
    (record,) = caught.value.rounds
    assert record.ending is Ending.DEADLINE
    assert [rank.outcome for rank in record.ranks] == [Outcome.STOPPED] * 2


@pytest.mark.row("sys.exit(0) in a rank")
def test_rank_leaves_with_zero() -> None:
    """It counts as returning None."""
    result = launch(training.leave_with_zero, elastic=job(2))
    assert [result[rank].return_value for rank in range(2)] == [7, None]
    assert len(result.rounds) == 1


@pytest.mark.row("the function, an input or a result cannot be pickled")
def test_cannot_be_pickled() -> None:
    """No restart: the input is named before anything starts, the result with its rank."""
    with pytest.raises(PayloadError, match="lock"):
        launch(len, threading.Lock(), elastic=job(2, max_restarts=3))
    with pytest.raises(ResultError, match="rank 1") as caught:
        launch(training.return_a_lock, elastic=job(2, max_restarts=3))
    assert len(caught.value.rounds) == 1


@pytest.mark.row("no progress for hang_timeout_s")
def test_rank_hangs(log: Log) -> None:
    """The error quotes the stacks of all ranks, which name the function where one hangs."""
    hang = training.wait_for_a_lock_that_nobody_releases
    with pytest.raises(WorkerHungError, match=hang.__name__) as caught:
        launch(train, log, misbehave=hang, elastic=job(2, hang_timeout_s=15))
    (record,) = caught.value.rounds
    assert record.ending is Ending.HUNG
    assert [rank.outcome for rank in record.ranks] == [Outcome.HUNG] * 2
    assert hang.__name__ in record.ranks[1].stacks
    assert hang.__name__ not in record.ranks[0].stacks
    assert record.ranks[1].step == 3


@pytest.mark.row("a rank raises while others ignore SIGTERM")
def test_ranks_ignore_sigterm(log: Log) -> None:
    """Stopping is bounded: what does not obey is killed, and its children with it."""
    with pytest.raises(WorkerFailedError, match="the data are broken") as caught:
        launch(training.raise_beside_the_deaf, log, elastic=job(2, stop_grace_s=1))
    assert [rank.outcome for rank in caught.value.rounds[0].ranks] == [Outcome.RAISED, Outcome.STOPPED]
    assert len(log.notes()) == 2
