"""torch elastic's own launcher on one node, whose agents find each other by c10d rendezvous, as in upstream's plugin.

In this process without a cluster, and in the pods of a PyTorchJob, whose operator names the rendezvous in PET_*
variables. What it raises becomes ours.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, TypeVar

from kfpytorch_ray.cluster.forking import inheritance_kept
from kfpytorch_ray.errors import (
    TORCH_IMPORT_ERROR_MESSAGE,
    LaunchError,
    LaunchInterruptedError,
    PlacementTimeoutError,
    RecoverableWorkerError,
    ResultError,
    WorkerFailedError,
    explain,
    text_of,
)
from kfpytorch_ray.flyte_worker import RECOVERABLE_MARKER, UNPICKLABLE_MARKER, has_marker
from kfpytorch_ray.plan import LaunchPlan

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

logger = logging.getLogger(__name__)

RENDEZVOUS_BACKEND = "c10d"
"""Needs no server of its own: the agents meet at one of them."""

_GRACE_S = 30.0
"""As torch gives its workers."""

T = TypeVar("T")


def launch_config(plan: LaunchPlan, **more: Any) -> LaunchConfig:
    """The launcher's configuration; the operator names the rendezvous in PET_RDZV_ENDPOINT.

    Args:
        plan: What is launched.
        **more: Fields of the configuration beside.

    Raises:
        ImportError: torch is not installed.
    """
    try:
        from torch.distributed.launcher.api import LaunchConfig
    except ImportError as error:
        raise ImportError(TORCH_IMPORT_ERROR_MESSAGE) from error
    return LaunchConfig(
        run_id=plan.run_id,
        min_nodes=plan.min_nodes,
        max_nodes=plan.max_nodes,
        nproc_per_node=plan.nproc_per_node,
        rdzv_backend=RENDEZVOUS_BACKEND,
        # The user's own dict, as upstream: torch adds its default time-out of 900 s to it.
        rdzv_configs=plan.rdzv_configs,  # type: ignore[arg-type]
        rdzv_endpoint=os.environ.get("PET_RDZV_ENDPOINT", "localhost:0"),
        max_restarts=plan.max_restarts,
        monitor_interval=plan.monitor_interval_s,
        start_method=plan.start_method,
        **more,
    )


def run_node(
    plan: LaunchPlan, config: LaunchConfig, entrypoint: Callable[..., T], args: tuple[Any, ...]
) -> dict[int, T]:
    """Run this node's workers to their end.

    Args:
        plan: What is launched.
        config: How.
        entrypoint: What every worker calls.
        args: Its arguments.

    Returns:
        What it returned, by global rank, for the ranks of this node.

    Raises:
        PlacementTimeoutError: Too few nodes met within the join timeout.
        RecoverableWorkerError: The first rank to fail raised FlyteRecoverableException.
        ResultError: A rank's result cannot be pickled.
        WorkerFailedError: The first rank to fail did so in another way; its cause is torch's ChildFailedError.
        LaunchInterruptedError: This process was told to stop.
        LaunchError: Torch elastic failed itself.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
    from torch.distributed.launcher.api import elastic_launch

    _limit_threads(plan)
    before = set(multiprocessing.active_children())
    try:
        with inheritance_kept(), _handlers_kept():
            returned: dict[int, T] = elastic_launch(config=config, entrypoint=entrypoint)(*args)
    except ChildFailedError as error:
        raise _worker_error(error) from error
    except json.JSONDecodeError as error:
        raise WorkerFailedError(_half_told(plan), time.time()) from error
    except SignalException as error:
        # It may come while torch is still starting them, and then torch knows nothing of them.
        _end(set(multiprocessing.active_children()) - before)
        raise LaunchInterruptedError(_interrupted(plan, error), time.time()) from error
    except RendezvousTimeoutError as error:
        raise PlacementTimeoutError(_too_few_nodes(plan, error)) from error
    except (RendezvousError, DistError) as error:
        # The second where the store is lost while ranks are assigned.
        raise LaunchError(_no_rendezvous(plan, config, error), time.time()) from error
    return returned


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """torch leaves handlers of its own, which raise an Exception: a script that goes on may take it for an error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is not handler:
                # None: one that was not set from Python.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _limit_threads(plan: LaunchPlan) -> None:
    """As torchrun: one OpenMP thread per worker where there are several and the user said nothing."""
    if plan.nproc_per_node > 1 and "OMP_NUM_THREADS" not in os.environ:
        logger.warning(
            "OMP_NUM_THREADS is set to 1 for each of the %d workers, so that they do not fight for the cores. "
            "Set it in the task's environment to tune it.",
            plan.nproc_per_node,
        )
        os.environ["OMP_NUM_THREADS"] = "1"


def _end(workers: set[BaseProcess]) -> None:
    """Python would wait for them at its own end, for ever."""
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + _GRACE_S
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        worker.kill()


def _worker_error(error: ChildFailedError) -> LaunchError:
    _, first = error.get_first_failure()
    message = error.format_msg()
    failed_at = _time_of(first)
    if has_marker(first.error_file, RECOVERABLE_MARKER):
        return RecoverableWorkerError(message, failed_at)
    if has_marker(first.error_file, UNPICKLABLE_MARKER):
        return ResultError(message, failed_at)
    return WorkerFailedError(message, failed_at)


def _time_of(failure: ProcessFailure) -> float:
    """When a rank failed. Torch tells whole seconds, within which ranks of other pods have failed because of it."""
    try:
        return os.stat(failure.error_file).st_mtime
    except OSError:
        # A rank that was killed has written none.
        return float(failure.timestamp)


def _half_told(plan: LaunchPlan) -> str:
    return explain(
        f"A rank of {plan.name} failed, and was killed while it wrote down why.",
        "Its error file, which torch elastic reads, ends in the middle.",
        "Look at the rank's output for what it raised, and whether the machine ran out of memory then.",
    )


def _interrupted(plan: LaunchPlan, error: Exception) -> str:
    return explain(
        f"{plan.name} was interrupted and its workers were stopped.",
        str(error),
        "Nothing in the task: the pod was evicted, deleted or pre-empted, or the run was cancelled. Run it again.",
    )


def _too_few_nodes(plan: LaunchPlan, error: Exception) -> str:
    return explain(
        f"{plan.name} did not find {plan.min_nodes} nodes within {plan.join_timeout_s:.0f} s.",
        f"The rendezvous timed out: {error}",
        "Check that all pods of the PyTorchJob were scheduled, or raise rdzv_configs['join_timeout'].",
    )


def _no_rendezvous(plan: LaunchPlan, config: LaunchConfig, error: Exception) -> str:
    return explain(
        f"{plan.name} could not meet its other nodes at {config.rdzv_endpoint}.",
        text_of(error),
        "Check that the pods of the PyTorchJob can reach each other and that the master is running.",
    )
