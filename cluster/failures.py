"""The error of a failed launch: the message that a person reads, and the user's own exception as its cause."""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Callable, Sequence

from kfpytorch_ray.cluster.causes import alike, distributed, failures, root_cause
from kfpytorch_ray.cluster.limits import Budgets, Spent
from kfpytorch_ray.cluster.policy import Reason
from kfpytorch_ray.errors import (
    DeadlineExceededError,
    LaunchError,
    NodeLostError,
    RecoverableWorkerError,
    ResultError,
    WorkerFailedError,
    WorkerHungError,
    explain,
)
from kfpytorch_ray.results import Outcome, RankRecord, RoundRecord, Stage

_MOST_STACKS = 4
_MOST_LOGS = 4
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)

_SIGNAL_HINTS = {
    "SIGKILL": "Most often the kernel's out-of-memory killer: compare the node's memory with what the workers use.",
    "SIGABRT": "Most often a CUDA assertion, or NCCL's watchdog after a collective that not all ranks joined.",
    "SIGSEGV": "A crash in native code: run with PYTHONFAULTHANDLER=1 and look at the worker's standard error.",
    "SIGBUS": "Most often /dev/shm is full: give the container more shared memory.",
    "SIGTERM": "Somebody else ended the process: look for pre-emption, a node drain or a supervisor.",
}


def launch_error(
    name: str, rounds: tuple[RoundRecord, ...], reason: Reason, spent: Spent, budgets: Budgets, losses: Sequence[str]
) -> LaunchError:
    """The error of a launch that has failed.

    Args:
        name: Of the launch.
        rounds: All its rounds.
        reason: Why there is no other.
        spent: What it has spent.
        budgets: What it was allowed.
        losses: Of agents and nodes: where, and what is known of it.
    """
    used = f"Restarts used: {spent.restarts} of {budgets.max_restarts} (max_restarts); nodes lost: "
    used += f"{spent.node_failures} of {budgets.max_node_failures} (max_node_failures)."
    if reason is Reason.DEADLINE:
        return _deadline_error(name, rounds, used)
    if reason is Reason.NODE_FAILURES_SPENT:
        return _node_lost_error(name, rounds, losses, used)
    if not failures(rounds[-1]):
        # A rank was said to have failed or hung, and had ended well before it could be looked at.
        message = explain(f"{name} failed in round {rounds[-1].index}.", rounds[-1].ending.value, used)
        return WorkerFailedError(message, time.time(), rounds)
    return worker_error(name, rounds, reason, used)


def worker_error(name: str, rounds: tuple[RoundRecord, ...], reason: Reason, used: str) -> LaunchError:
    """The error of a launch of which a rank has failed in the last round.

    Args:
        name: Of the launch.
        rounds: All its rounds.
        reason: Why there is no other.
        used: A sentence on the budgets.
    """
    cause = root_cause(rounds[-1])
    error = _error_class(cause)(_message(name, rounds, cause, reason, used), cause.timestamp, rounds)
    error.__cause__ = rebuilt_exception(cause)
    return error


def _deadline_error(name: str, rounds: tuple[RoundRecord, ...], used: str) -> DeadlineExceededError:
    message = explain(
        f"{name} did not end within its deadline; all its workers were stopped.",
        f"RunPolicy(active_deadline_seconds=...) bounds the launch from its first round on. {used}",
        "Raise the deadline, or make the work shorter.",
    )
    return DeadlineExceededError(message, time.time(), rounds)


def _node_lost_error(name: str, rounds: tuple[RoundRecord, ...], losses: Sequence[str], used: str) -> NodeLostError:
    last = f" in round {rounds[-1].index}" if rounds else " before the first round"
    message = explain(
        f"{name} failed{last}: too many agents or nodes were lost.",
        f"{'; '.join(losses)}. {used}",
        "Run the task again (give it retries), look after the nodes that are named, or raise "
        "RayBackend(max_node_failures=...).",
    )
    return NodeLostError(message, time.time(), rounds)


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
    if cause.outcome is Outcome.HUNG:
        return WorkerHungError
    if cause.outcome is Outcome.RAISED and cause.stage is Stage.RESULT:
        return ResultError
    return RecoverableWorkerError if cause.recoverable else WorkerFailedError


def _message(name: str, rounds: tuple[RoundRecord, ...], cause: RankRecord, reason: Reason, used: str) -> str:
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
        + (f", {len(failed) - same} in another way." if len(failed) > same else ".")
        + (f" It was not tried again: {reason.value}." if reason is Reason.SAME_AGAIN else ""),
        f"Fix: {_fix(cause, used)}",
    ]
    if cause.outcome is Outcome.RAISED and cause.stage is not Stage.RESULT:
        lines += ["", f"Traceback of rank {cause.rank}:", cause.traceback.rstrip()]
    if cause.outcome is Outcome.HUNG:
        lines += _stacks(last)
    if cause.log_tail:
        lines += ["", f"Last lines of rank {cause.rank}:", *(f"  {line}" for line in cause.log_tail)]
    return "\n".join(lines)


def kept_logs(rounds: tuple[RoundRecord, ...], uri: str) -> str:
    """Where to read on, for the error's message: what the failed ranks printed, and where everything is; empty without.

    Args:
        rounds: All rounds, with the files that are kept.
        uri: Of the folder in which they are.
    """
    kept = [rank for record in rounds[-1:] for rank in record.ranks if rank.logs]
    if not kept:
        return ""
    lines = ["", f"Logs of all ranks and rounds: {uri}"]
    if failed := failures(rounds[-1]):
        cause = root_cause(rounds[-1])
        shown = [cause, *(rank for rank in failed if rank is not cause)][:_MOST_LOGS]
        lines += [f"  rank {rank.rank}: {' '.join(rank.logs)}" for rank in shown if rank.logs]
    return "\n".join(lines)


def last_lines(record: RoundRecord, shown: Callable[[int], bool]) -> str:
    """The last lines of the ranks that failed in a round, as the driver prints them; empty if it has printed them.

    Args:
        record: Of the round.
        shown: Whether a rank's lines are printed as they come.
    """
    failed = [rank for rank in failures(record) if rank.outcome is not Outcome.LOST and not shown(rank.rank)]
    if not failed:
        return ""
    cause = root_cause(record)
    failed.sort(key=lambda rank: (rank.rank != cause.rank, rank.timestamp))
    lines = []
    for rank in failed[:_MOST_LOGS]:
        prefix = f"[rank {rank.rank} | node {rank.node_rank}] "
        lines += [f"{prefix}{line}" for line in rank.log_tail]
        lines += [f"{prefix}{line}" for line in (rank.message.splitlines() or [rank.outcome.value])]
    if len(failed) > _MOST_LOGS:
        lines.append(f"{len(failed) - _MOST_LOGS} other ranks failed, too; their lines are not shown here.")
    return "".join(f"{line}\n" for line in lines)


def _stacks(ended: RoundRecord) -> list[str]:
    """What the ranks were doing, equal stacks once."""
    groups: dict[str, list[int]] = {}
    texts: dict[str, str] = {}
    for rank in ended.ranks:
        if rank.stacks:
            # Thread identifiers differ between processes that do the same.
            key = re.sub(r"0x[0-9a-f]+|\b\d{4,}\b", "", rank.stacks)
            groups.setdefault(key, []).append(rank.rank)
            texts.setdefault(key, rank.stacks)
    lines = []
    for key, ranks in [*groups.items()][:_MOST_STACKS]:
        lines += ["", f"Stacks of rank {', '.join(map(str, ranks))}:", texts[key].rstrip()]
    if len(groups) > _MOST_STACKS:
        lines += ["", f"{len(groups) - _MOST_STACKS} other stacks are in error.rounds[-1].ranks[...].stacks."]
    return lines


def _why(cause: RankRecord) -> str:
    match cause.outcome:
        case Outcome.RAISED:
            return f"it raised while {cause.stage.value}"
        case Outcome.EXITED:
            return "it left by itself"
        case Outcome.KILLED if cause.out_of_memory:
            return "the kernel ended it, because its control group had no memory left"
        case Outcome.KILLED:
            return "a signal that this launch did not send ended it"
        case _:
            return "no rank had called kfpytorch_ray.progress() or written a checkpoint for hang_timeout_s"


def _fix(cause: RankRecord, used: str) -> str:
    match cause.outcome:
        case Outcome.RAISED if cause.stage is Stage.LOAD:
            return (
                "The node lacks a module or a file of yours: send the folder with the backend's working_dir=..., under "
                "a ray.init() of your own with its runtime_env, or put it into the image. It was not tried again, "
                "because it would fail the same way."
            )
        case Outcome.RAISED if cause.stage is Stage.RESULT:
            return "Make room for the result in /dev/shm or in the folder for temporary files. It was not tried again."
        case Outcome.KILLED if cause.out_of_memory:
            return f"Give the nodes more memory, or let the workers use less (batch size, data loaders). {used}"
        case Outcome.KILLED:
            name = cause.message.rsplit(" ", 1)[-1]
            return f"{_SIGNAL_HINTS.get(name, 'Find out who sent the signal.')} {used}"
        case Outcome.HUNG:
            return (
                "Look where the stacks below stand: most often one rank waits for something that the others do not, "
                f"and they wait for it in a collective. Raise hang_timeout_s if steps are slower than that. {used}"
            )
        case _ if _TIMED_OUT.search(cause.message) and distributed(cause):
            return (
                "A collective waited for a rank that did not come: look for a rank that took another branch, or that "
                f"was slower than the timeout of init_process_group. {used}"
            )
        case _:
            return f"Correct what the message names. {used}"
