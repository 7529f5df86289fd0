from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest

import kfpytorch_ray.errors
from kfpytorch_ray.cluster.failures import launch_error, rebuilt_exception
from kfpytorch_ray.cluster.limits import Budgets, Spent
from kfpytorch_ray.cluster.policy import Reason
from kfpytorch_ray.errors import (
    ConfigError,
    DeadlineExceededError,
    KfpytorchRayError,
    LaunchError,
    NodeLostError,
    RecoverableWorkerError,
    ResultError,
    WorkerFailedError,
    WorkerHungError,
)
from kfpytorch_ray.results import Outcome, RankRecord, RoundRecord, Stage

TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 7, in train\nValueError: bad batch\n'


def record(rank: int = 0, outcome: Outcome = Outcome.RAISED, **fields: Any) -> RankRecord:
    plain: dict[str, Any] = {
        "local_rank": rank % 4,
        "node_rank": rank // 4,
        "node": f"10.0.0.{rank // 4}",
        "exit_code": None if outcome in (Outcome.STOPPED, Outcome.LOST) else 1,
        "timestamp": 100.0 + rank,
    }
    return RankRecord(rank=rank, outcome=outcome, **{**plain, **fields})


def raised(rank: int = 6, **fields: Any) -> RankRecord:
    return record(rank, message="ValueError: bad batch", traceback=TRACEBACK, **fields)


def killed(signal: str, code: int) -> RankRecord:
    return record(1, Outcome.KILLED, message=f"killed by {signal}", exit_code=code)


def round_of(*ranks: RankRecord, index: int = 0) -> RoundRecord:
    return RoundRecord(index, 8, ("10.0.0.0", "10.0.0.1"), started_at=0.0, ended_at=200.0, ranks=ranks)


def error_of(*ranks: RankRecord, max_restarts: int = 0, reason: Reason = Reason.RESTARTS_SPENT) -> LaunchError:
    losses = ["10.0.0.1: it has not answered for 15 s"]
    return launch_error("train", (round_of(*ranks),), reason, Spent(), Budgets(max_restarts, 3), losses)


@pytest.mark.parametrize(
    ("cause", "expected", "retryable"),
    [
        (raised(), WorkerFailedError, False),
        (raised(recoverable=True), RecoverableWorkerError, True),
        (raised(stage=Stage.LOAD), WorkerFailedError, False),
        (raised(stage=Stage.RESULT), ResultError, False),
        (record(1, Outcome.EXITED, message="left with exit code 3 without an exception"), WorkerFailedError, False),
        (killed("SIGKILL", -9), WorkerFailedError, False),
        (record(1, Outcome.HUNG, message="made no progress for 60 s"), WorkerHungError, False),
    ],
)
def test_the_class_says_who_is_to_blame_and_whether_to_try_again(
    cause: RankRecord, expected: type[LaunchError], retryable: bool
) -> None:
    """Each kind of failure has its class; lost nodes and recoverable exceptions may be retried by Flyte."""
    error = error_of(record(0, Outcome.STOPPED, message="stopped with the round"), cause)
    assert type(error) is expected
    assert error.retryable is retryable
    assert error.timestamp == cause.timestamp


def test_the_message_says_where_what_and_how_often() -> None:
    """Launch, round, rank, local rank, node, exit code, ranks that failed alike or not, and restarts used."""
    rounds = (
        round_of(raised(0), index=0),
        round_of(
            record(0, Outcome.STOPPED, message="stopped with the round"),
            raised(7),
            raised(6),
            record(2, Outcome.EXITED, message="left with exit code 3 without an exception", exit_code=3),
            index=1,
        ),
    )
    error = launch_error("train", rounds, Reason.RESTARTS_SPENT, Spent(1, 2), Budgets(1, 3), [])
    what, why, fix, *_ = str(error).splitlines()
    assert what == "train failed in round 1: rank 6 (local rank 2 on node 1, 10.0.0.1): ValueError: bad batch"
    assert why == (
        "Why: it raised while running the function, exit code 1. 2 of 8 ranks failed this way, 1 in another way."
    )
    assert fix.startswith("Fix: ")
    assert fix.endswith("Restarts used: 1 of 1 (max_restarts); nodes lost: 2 of 3 (max_node_failures).")
    assert error.rounds == rounds


def test_the_message_counts_no_other_way_where_there_is_none() -> None:
    """Ranks that were stopped did not fail."""
    why = str(error_of(raised(), record(0, Outcome.STOPPED))).splitlines()[1]
    assert why.endswith("1 of 8 ranks failed this way.")


def test_the_message_has_the_remote_traceback_and_the_last_lines() -> None:
    """What the rank's own terminal would have shown is there, of the rank that is the cause."""
    other = record(0, Outcome.STOPPED, log_tail=("line of rank 0",))
    message = str(error_of(other, raised(log_tail=("epoch 1", "epoch 2"))))
    assert f"\nTraceback of rank 6:\n{TRACEBACK.rstrip()}\n" in message
    assert message.endswith("\nLast lines of rank 6:\n  epoch 1\n  epoch 2")
    assert "line of rank 0" not in message


def test_a_rank_without_traceback_and_output_has_no_empty_headings() -> None:
    """A message shows only what there is."""
    message = str(error_of(killed("SIGKILL", -9)))
    assert "Traceback" not in message
    assert "Last lines" not in message


@pytest.mark.parametrize(
    ("signal", "code", "hint"),
    [
        ("SIGKILL", -9, "out-of-memory killer"),
        ("SIGABRT", -6, "CUDA assertion, or NCCL's watchdog"),
        ("SIGSEGV", -11, "PYTHONFAULTHANDLER=1"),
        ("SIGBUS", -7, "/dev/shm is full"),
        ("SIGTERM", -15, "pre-emption"),
        ("SIGUSR1", -10, "who sent the signal"),
    ],
)
def test_a_signal_comes_with_a_hint(signal: str, code: int, hint: str) -> None:
    """The usual reason for each signal is given, with signal, exit code and restarts used."""
    message = str(error_of(killed(signal, code), max_restarts=2))
    assert f"killed by {signal}" in message
    assert f"exit code {code}." in message
    assert hint in message
    assert "Restarts used: 0 of 2 (max_restarts);" in message


def test_a_rank_that_left_by_itself_is_told_with_its_code() -> None:
    """``sys.exit(3)`` reads as what it is."""
    cause = record(1, Outcome.EXITED, message="left with exit code 3 without an exception", exit_code=3)
    message = str(error_of(cause))
    assert "rank 1 (local rank 1 on node 0, 10.0.0.0): left with exit code 3 without an exception" in message
    assert "Why: it left by itself, exit code 3." in message


@pytest.mark.parametrize(
    ("reason", "expected", "says"),
    [
        (Reason.NODE_FAILURES_SPENT, NodeLostError, "10.0.0.1: it has not answered for 15 s"),
        (Reason.DEADLINE, DeadlineExceededError, "active_deadline_seconds"),
    ],
)
def test_a_launch_that_ends_for_its_nodes_or_its_deadline_says_so(
    reason: Reason, expected: type[LaunchError], says: str
) -> None:
    """Lost nodes are named with what is known; both budgets are shown; no rank is blamed."""
    error = error_of(raised(), record(5, Outcome.LOST, message="lost with its node: dead"), reason=reason)
    assert type(error) is expected
    assert says in str(error)
    assert "nodes lost: 0 of 3 (max_node_failures)" in str(error)
    assert error.__cause__ is None


def test_restarting_that_ends_early_says_why() -> None:
    """Budget is left, and the message says that it was not used and why."""
    message = str(error_of(raised(), max_restarts=5, reason=Reason.SAME_AGAIN))
    assert "It was not tried again: the same rank failed at the same place twice" in message
    assert "Restarts used: 0 of 5" in message


def test_stacks_of_hung_ranks_are_quoted_once_for_those_that_agree() -> None:
    """The odd rank stands out: equal stacks are one, whatever their thread identifiers are."""
    stacks = {0: "Thread 0x00007f01 in all_reduce", 1: "Thread 0x00007f02 in all_reduce", 2: "Thread 0x01 in wait"}
    hung = [record(rank, Outcome.HUNG, message="made no progress", stacks=text) for rank, text in stacks.items()]
    message = str(error_of(*hung))
    assert "Stacks of rank 0, 1:\nThread 0x00007f01 in all_reduce" in message
    assert "Stacks of rank 2:\nThread 0x01 in wait" in message


def test_a_collective_that_timed_out_comes_with_a_hint() -> None:
    """It was waited for a rank that did not come."""
    message = "DistBackendError: [Rank 1] Watchdog caught collective operation timeout: timed out"
    assert "A collective waited for a rank that did not come" in str(error_of(record(1, message=message)))


def test_memory_that_ran_out_is_said() -> None:
    """The kernel's counter is proof, so the hint does not guess."""
    cause = record(1, Outcome.KILLED, message="killed by SIGKILL: out of memory", exit_code=-9, out_of_memory=True)
    message = str(error_of(cause))
    assert "control group had no memory left" in message
    assert "Most often" not in message


def test_a_function_that_cannot_be_loaded_leads_to_the_code_on_the_node() -> None:
    """The advice names ``working_dir``, and says why no restart was spent."""
    cause = record(2, message="ModuleNotFoundError: No module named 'mine'", traceback=TRACEBACK, stage=Stage.LOAD)
    message = str(error_of(cause, max_restarts=3))
    assert "it raised while loading the function and its inputs" in message
    assert "the backend's working_dir=..." in message
    assert "not tried again" in message
    assert "Traceback of rank 2:" in message


def test_a_result_that_cannot_be_pickled_keeps_the_workers_own_explanation() -> None:
    """The worker has said which part of which rank's result it is; that message is the error's."""
    explained = "The return value of rank 6 cannot be pickled: it is of type _thread.lock.\nWhy: x\nFix: y"
    cause = record(6, message=f"ResultError: {explained}", stage=Stage.RESULT)
    assert str(error_of(cause)) == f"train: {explained}"


def test_a_result_without_room_leads_to_shared_memory() -> None:
    """A full disk while the result is written is told as such."""
    cause = record(6, message="OSError: [Errno 28] No space left on device", stage=Stage.RESULT)
    message = str(error_of(cause))
    assert "it raised while pickling the return value" in message
    assert "/dev/shm" in message


def test_the_users_own_exception_is_the_cause() -> None:
    """It is rebuilt with its class and arguments."""
    error = error_of(raised(exception=pickle.dumps(ValueError("bad", 7))))
    assert type(error.__cause__) is ValueError
    assert error.__cause__.args == ("bad", 7)


@pytest.mark.parametrize(
    "pickled",
    [None, b"", b"no pickle", b"cno_such_module\nGone\n.", pickle.dumps("not an exception")],
    ids=["none", "empty", "rubbish", "class not here", "no exception"],
)
def test_an_exception_that_cannot_be_rebuilt_here_is_left_out(pickled: bytes | None) -> None:
    """The error has no cause then, and its message still holds the text."""
    cause = raised(exception=pickled)
    assert rebuilt_exception(cause) is None
    error = error_of(cause)
    assert error.__cause__ is None
    assert "ValueError: bad batch" in str(error)


def test_the_error_of_a_launch_survives_pickling() -> None:
    """Message, time and the record of every rank cross processes twice."""
    error = error_of(raised(log_tail=("epoch 1",)), record(0, Outcome.STOPPED))
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert (again.message, again.timestamp, again.rounds) == (error.message, error.timestamp, error.rounds)


def tree(root: type[KfpytorchRayError]) -> Iterator[type[KfpytorchRayError]]:
    """A class of the tree and all below it."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == kfpytorch_ray.errors.__name__:
            yield from tree(child)


CLASSES = list(dict.fromkeys(tree(KfpytorchRayError)))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_twice(kind: type[KfpytorchRayError]) -> None:
    """Class, arguments, fields and text arrive, as they must when an error crosses Ray and a process."""
    arguments: tuple[Any, ...] = ("What.\nWhy: x\nFix: y",)
    if issubclass(kind, ConfigError):
        arguments = ("Elastic", ("a is wrong", "b is wrong"))
    elif issubclass(kind, LaunchError):
        arguments = ("What.\nWhy: x\nFix: y", 12.5, (round_of(raised(log_tail=("a",), exception=b"x")),))
    error = kind(*arguments)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(error))))
    assert type(again) is kind
    assert again.args == error.args == arguments
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_the_tree_in_the_docstring_is_complete() -> None:
    """Every class is drawn there, and marked if Flyte may retry it."""
    drawn = {
        line.split()[0]: "(retryable)" in line
        for line in (kfpytorch_ray.errors.__doc__ or "")
        .replace("├──", "")
        .replace("└──", "")
        .replace("│", "")
        .splitlines()
        if line.split() and line.split()[0].endswith("Error")
    }
    assert drawn == {kind.__name__: kind.retryable for kind in CLASSES}
