"""The error of a failed launch: the message that a person reads, and the user's own exception as its cause."""

from __future__ import annotations

import pickle

from kfpytorch_ray.cluster.policy import alike, ending_cause, failures
from kfpytorch_ray.errors import LaunchError, NodeLostError, RecoverableWorkerError, ResultError, WorkerFailedError
from kfpytorch_ray.results import Outcome, RankRecord, RoundRecord, Stage

_SIGNAL_HINTS = {
    "SIGKILL": "Most often the kernel's out-of-memory killer: compare the node's memory with what the workers use.",
    "SIGABRT": "Most often a CUDA assertion, or NCCL's watchdog after a collective that not all ranks joined.",
    "SIGSEGV": "A crash in native code: run with PYTHONFAULTHANDLER=1 and look at the worker's standard error.",
    "SIGBUS": "Most often /dev/shm is full: give the container more shared memory.",
    "SIGTERM": "Somebody else ended the process: look for pre-emption, a node drain or a supervisor.",
}


def launch_error(name: str, rounds: tuple[RoundRecord, ...], max_restarts: int) -> LaunchError:
    """The error of a launch whose last round failed.

    Args:
        name: Of the launch.
        rounds: All its rounds.
        max_restarts: The restarts it was allowed.
    """
    cause = ending_cause(rounds[-1], len(rounds) - 1, max_restarts)
    error = _error_class(cause)(_message(name, rounds, cause, max_restarts), cause.timestamp, rounds)
    error.__cause__ = rebuilt_exception(cause)
    return error


def rebuilt_exception(rank: RankRecord) -> BaseException | None:
    """The exception that a rank raised; None if it has none, or its class does not exist here."""
    if rank.exception is None:
        return None
    try:
        error = pickle.loads(rank.exception)
    except Exception:  # noqa: BLE001 - the class is the user's; its text is in the message anyway
        return None
    return error if isinstance(error, BaseException) else None


def _error_class(cause: RankRecord) -> type[LaunchError]:
    if cause.outcome is Outcome.LOST:
        return NodeLostError
    if cause.outcome is Outcome.RAISED and cause.stage is Stage.RESULT:
        return ResultError
    return RecoverableWorkerError if cause.recoverable else WorkerFailedError


def _message(name: str, rounds: tuple[RoundRecord, ...], cause: RankRecord, max_restarts: int) -> str:
    own = f"{ResultError.__name__}: "
    if cause.stage is Stage.RESULT and cause.message.startswith(own):
        return f"{name}: {cause.message.removeprefix(own)}"
    last = rounds[-1]
    failed = failures(last)
    same = sum(alike(rank, cause) for rank in failed)
    where = f"rank {cause.rank} (local rank {cause.local_rank} on node {cause.node_rank}, {cause.node})"
    exit_code = "" if cause.exit_code is None else f", exit code {cause.exit_code}"
    lines = [
        f"{name} failed in round {last.index}: {where}: {cause.message}",
        f"Why: {_why(cause)}{exit_code}. {same} of {last.world_size} ranks failed this way"
        + (f", {len(failed) - same} in another way." if len(failed) > same else "."),
        f"Fix: {_fix(cause, restarts_used=len(rounds) - 1, max_restarts=max_restarts)}",
    ]
    if cause.outcome is Outcome.RAISED and cause.stage is not Stage.RESULT:
        lines += ["", f"Traceback of rank {cause.rank}:", cause.traceback.rstrip()]
    if cause.log_tail:
        lines += ["", f"Last lines of rank {cause.rank}:", *(f"  {line}" for line in cause.log_tail)]
    return "\n".join(lines)


def _why(cause: RankRecord) -> str:
    match cause.outcome:
        case Outcome.RAISED:
            return f"it raised while {cause.stage.value}"
        case Outcome.EXITED:
            return "it left by itself"
        case Outcome.KILLED:
            return "a signal that this launch did not send ended it"
        case _:
            return "its agent or node died"


def _fix(cause: RankRecord, restarts_used: int, max_restarts: int) -> str:
    restarts = f" Restarts used: {restarts_used} of {max_restarts} (max_restarts)."
    match cause.outcome:
        case Outcome.RAISED if cause.stage is Stage.LOAD:
            return (
                "The node lacks a module or a file of yours: send the folder with RayBackend(working_dir=...), under "
                "a ray.init() of your own with its runtime_env, or put it into the image. It was not tried again, "
                "because it would fail the same way."
            )
        case Outcome.RAISED if cause.stage is Stage.RESULT:
            return "Make room for the result in /dev/shm or in the folder for temporary files. It was not tried again."
        case Outcome.KILLED:
            name = cause.message.rsplit(" ", 1)[-1]
            return _SIGNAL_HINTS.get(name, "Find out who sent the signal.") + restarts
        case Outcome.LOST:
            return "Run the task again; give it retries, because lost nodes are not replaced within a launch."
        case _:
            return "Correct what the message names." + restarts
