"""The ranks of one pod: started by torch elastic, or one that this process is; and the records of how they ended."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kfpytorch_ray.cluster.failures import worker_error
from kfpytorch_ray.cluster.interruption import TERMINATED
from kfpytorch_ray.cluster.kube.pod_worker import Places, Returned, train
from kfpytorch_ray.cluster.memory import OutOfMemoryWatch
from kfpytorch_ray.cluster.policy import Reason
from kfpytorch_ray.cluster.protocol import WorkerFailure
from kfpytorch_ray.cluster.records import Ended, Traces, record_of
from kfpytorch_ray.cluster.torch_elastic import launch_config, run_node
from kfpytorch_ray.errors import LaunchError
from kfpytorch_ray.heartbeat import Beat
from kfpytorch_ray.plan import Contract, LaunchPlan
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord

_SILENT = Beat(pid=None, rank=None, step=None, progressed_at=None, listens=False, told=False)
"""Nobody has a page for heartbeats here."""


def run_ranks(plan: LaunchPlan, places: Places) -> dict[int, Returned]:
    """Run this pod's ranks to their end.

    Args:
        plan: As in ``PodRequest``.
        places: Where they leave things.

    Returns:
        Those of this pod, by global rank.

    Raises:
        LaunchError: One of them failed; its rounds have one record, of the ranks that did.
        LaunchInterruptedError: This process was told to stop.
        PlacementTimeoutError: Too few pods met.
    """
    return _elastic(plan, places) if plan.contract is Contract.TORCHRUN else _single(plan, places)


def succeeded(returned: Mapping[int, Returned], started_at: float) -> RoundRecord:
    """The record of a round in which every rank of this pod returned."""
    pod, ended_at = socket.gethostname(), time.time()
    first = next(iter(returned.values()))
    ranks = tuple(
        RankRecord(rank, one.local_rank, one.node_rank, pod, Outcome.SUCCEEDED, 0, ended_at)
        for rank, one in sorted(returned.items())
    )
    return RoundRecord(first.restarts, first.world_size, (pod,), started_at, ended_at, ranks)


def budget_of(plan: LaunchPlan) -> str:
    """What a launch that failed has spent: torch elastic does not give up before."""
    if plan.contract is not Contract.TORCHRUN:
        return "The operator restarts pods (restart_policy, run_policy.backoff_limit)."
    return f"Restarts used: {plan.max_restarts} of {plan.max_restarts} (max_restarts)."


def _elastic(plan: LaunchPlan, places: Places) -> dict[int, Returned]:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logs = Path(places.failures, "ranks")
    config = launch_config(
        plan,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), tee=Std.ALL),
        log_line_prefix_template="[rank ${rank}] ",
    )
    memory = OutOfMemoryWatch()
    started_at = time.time()
    try:
        return run_node(plan, config, train, (plan.function, plan.flyte, places))
    except LaunchError as error:
        if not isinstance(error.__cause__, ChildFailedError):
            raise
        struck = memory.struck(os.getpid())
        ranks = [
            _failed(rank, failure, places, logs, plan.nproc_per_node, out_of_memory=struck)
            for rank, failure in error.__cause__.failures.items()
        ]
        raise _error(plan, places, ranks, started_at) from error.__cause__


def _failed(rank: int, failure: Any, places: Places, logs: Path, workers: int, *, out_of_memory: bool) -> RankRecord:
    """The record of a rank of which torch elastic says that it has failed."""
    at = float(failure.timestamp)
    # Of the last attempt.
    folder = max(logs.glob(f"*/attempt_*/{failure.local_rank}"), key=os.path.getmtime, default=logs)
    traces = Traces(
        Ended(failure.exitcode, at, out_of_memory=out_of_memory and failure.exitcode == -signal.SIGKILL),
        _written_failure(places, rank),
        _SILENT,
        at,
        stdout=str(folder / "stdout.log"),
        stderr=str(folder / "stderr.log"),
    )
    return record_of(traces, rank, failure.local_rank, rank // workers, socket.gethostname())


def _single(plan: LaunchPlan, places: Places) -> dict[int, Returned]:
    """This process is the rank, and the operator's variables say which."""
    rank = int(os.environ["RANK"])
    started_at = time.time()
    try:
        return {rank: train(plan.function, plan.flyte, places)}
    except SystemExit as left:
        if left.code == TERMINATED:
            raise
        code = left.code if isinstance(left.code, int) else 1
        error: BaseException = left
    except Exception as raised:  # noqa: BLE001 - it is the user's, and the end of this process
        traceback.print_exc()
        code, error = 1, raised
    traces = Traces(Ended(code, time.time()), _written_failure(places, rank), _SILENT, started_at)
    record = record_of(traces, rank, 0, rank, socket.gethostname())
    raise _error(plan, places, [record], started_at) from error


def _written_failure(places: Places, rank: int) -> WorkerFailure | None:
    path = places.failure(rank)
    if not path.exists():
        return None
    failure: WorkerFailure = pickle.loads(path.read_bytes())
    return failure


def _error(plan: LaunchPlan, places: Places, ranks: list[RankRecord], started_at: float) -> LaunchError:
    world_size = int(places.world.read_text()) if places.world.exists() else len(ranks)
    ended = RoundRecord(
        plan.max_restarts, world_size, (socket.gethostname(),), started_at, time.time(), tuple(ranks), Ending.FAILED
    )
    return worker_error(plan.name, (ended,), Reason.RESTARTS_SPENT, budget_of(plan))
