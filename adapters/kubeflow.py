"""The kubeflow backend: what Flyte registers as a PyTorchJob, and torch elastic in this process.

Registers exactly what flytekitplugins-kfpytorch 1.16 registers. Executes as it does: inside a PyTorchJob's pod, where
the operator's PET_* variables lead to the other nodes, and on one machine without them. A ``PyTorch`` job's processes
are started by the operator, so there is nothing to launch. Found by kfpytorch_ray.backends.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.adapters import kubeflow_findings
from kfpytorch_ray.adapters.job_message import RENDEZVOUS_BACKEND, is_plain_pod, job_message
from kfpytorch_ray.backends import Findings, JobConfig
from kfpytorch_ray.checks import is_elastic
from kfpytorch_ray.config import KubeflowBackend
from kfpytorch_ray.errors import (
    TORCH_IMPORT_ERROR_MESSAGE,
    LaunchError,
    LaunchInterruptedError,
    PlacementTimeoutError,
    RecoverableWorkerError,
    ResultError,
    WorkerFailedError,
    explain,
)
from kfpytorch_ray.flyte_worker import (
    RECOVERABLE_MARKER,
    UNPICKLABLE_MARKER,
    has_marker,
    leave_marker,
    run_in_current_context,
    spawn_helper,
)
from kfpytorch_ray.payload import dump_payload, dump_result, importable, load_result
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.results import ElasticResult, ElasticWorkerResult
from kfpytorch_ray.task_arguments import TaskArguments

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

logger = logging.getLogger(__name__)

MULTI_NODE_TASK_TYPE = "pytorch"
SINGLE_NODE_TASK_TYPE = "python-task"


class KubeflowAdapter:
    """PyTorchJob on Flyte, torch elastic in this process. Takes no options.

    Args:
        options: ``KubeflowBackend()`` or None; the same.
    """

    def __init__(self, options: KubeflowBackend | None = None) -> None:
        self._options = options

    def check(self, config: JobConfig) -> Findings:
        """A fork server is not known to torch elastic's launcher here."""
        if is_elastic(config) and getattr(config, "start_method", None) == "forkserver":
            return Findings(
                problems=(
                    "start_method='forkserver': Bad start method for the backend 'kubeflow', use 'spawn' or 'fork'",
                )
            )
        return Findings()

    def task_type(self, config: JobConfig) -> str:
        """``python-task`` for one node, given as a number; ``pytorch`` otherwise, also for ``"1"`` and ``"1:1"``."""
        return SINGLE_NODE_TASK_TYPE if is_plain_pod(config) else MULTI_NODE_TASK_TYPE

    def custom(self, config: JobConfig) -> dict[str, Any] | None:
        """The PyTorchJob as Flyte's message; None for an elastic job of one node, which needs no operator."""
        return job_message(config)

    def lost(self, config: JobConfig, arguments: TaskArguments) -> tuple[str, ...]:
        """Every field that does not arrive, and why. Upstream's plugin loses the same."""
        return kubeflow_findings.lost(config, arguments)

    def flyte_manifests(self, template: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """The PyTorchJob, or the Pod of a single node, that Flyte makes of a task template."""
        from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
        from kfpytorch_ray.cluster.kube.flyte_pod import pod_manifest
        from kfpytorch_ray.cluster.kube.flyte_pytorchjob import pytorch_job

        render = pod_manifest if template["type"] == SINGLE_NODE_TASK_TYPE else pytorch_job
        return (render(template, FlyteExecution()),)

    def launches(self, config: JobConfig) -> bool:
        """Elastic jobs are launched here; a ``PyTorch`` job's processes by the operator."""
        return is_elastic(config)

    def build(self, plan: LaunchPlan) -> LaunchConfig:
        """The configuration of torch elastic's launcher; the operator names the rendezvous in PET_RDZV_ENDPOINT.

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
        )

    def run(self, plan: LaunchPlan) -> ElasticResult:
        """Run this node's workers. The result holds the ranks of this node.

        Raises:
            ImportError: torch is not installed.
            PayloadError: The function or an input cannot be pickled.
            PlacementTimeoutError: Too few nodes met within the join timeout.
            RecoverableWorkerError: The first rank to fail raised FlyteRecoverableException.
            ResultError: A rank's result cannot be pickled.
            WorkerFailedError: The first rank to fail did so in another way.
            LaunchInterruptedError: This process was told to stop.
            LaunchError: Torch elastic failed itself.
        """
        config = self.build(plan)
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError
        from torch.distributed.launcher.api import elastic_launch

        _warn_outside_job(plan)
        _limit_threads(plan)
        entrypoint, args = _entrypoint(plan)
        try:
            with importable(plan.function):
                outputs = elastic_launch(config=config, entrypoint=entrypoint)(*args)
        except ChildFailedError as error:
            raise _worker_error(error) from error
        except SignalException as error:
            raise LaunchInterruptedError(_interrupted(plan, error), time.time()) from error
        except RendezvousTimeoutError as error:
            raise PlacementTimeoutError(_too_few_nodes(plan, error)) from error
        except RendezvousError as error:
            raise LaunchError(_no_rendezvous(plan, config, error), time.time()) from error
        return ElasticResult(tuple(outputs), lambda rank: load_result(outputs[rank]))


def _warn_outside_job(plan: LaunchPlan) -> None:
    if plan.min_nodes > 1 and "PET_NNODES" not in os.environ:
        logger.warning(
            "%s wants %d nodes, but PET_NNODES is not set, so this is no PyTorchJob: nobody may come to the rendezvous "
            "within %.0f s.",
            plan.name,
            plan.min_nodes,
            plan.join_timeout_s,
        )


def _limit_threads(plan: LaunchPlan) -> None:
    """As torchrun: one OpenMP thread per worker where there are several and the user said nothing."""
    if plan.nproc_per_node > 1 and "OMP_NUM_THREADS" not in os.environ:
        logger.warning(
            "OMP_NUM_THREADS is set to 1 for each of the %d workers, so that they do not fight for the cores. "
            "Set it in the task's environment to tune it.",
            plan.nproc_per_node,
        )
        os.environ["OMP_NUM_THREADS"] = "1"


def _entrypoint(plan: LaunchPlan) -> tuple[Callable[..., bytes], tuple[Any, ...]]:
    """What torch elastic calls in each worker, and its arguments."""
    if plan.start_method == "fork":
        call = functools.partial(plan.function, *plan.args, **plan.kwargs)

        def train_in_forked_worker() -> bytes:
            return _bring_home(run_in_current_context(call))

        return train_in_forked_worker, ()
    flyte = plan.flyte
    payload = dump_payload(plan.function, plan.args, plan.kwargs)
    return train_in_spawned_worker, (payload, flyte.raw_output_prefix, flyte.checkpoint_dest, flyte.checkpoint_src)


def train_in_spawned_worker(
    payload: bytes, raw_output_prefix: str, checkpoint_dest: str | None, checkpoint_src: str | None
) -> bytes:
    """What a spawned worker runs; it finds this function by its name."""
    return _bring_home(spawn_helper(payload, raw_output_prefix, checkpoint_dest, checkpoint_src, {}))


def _bring_home(result: ElasticWorkerResult) -> bytes:
    """Pickle here, where a failure reaches the error file; torch's own queue would only end the process."""
    try:
        return dump_result(result, int(os.environ["RANK"]))
    except ResultError:
        leave_marker(UNPICKLABLE_MARKER)
        raise


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
        f"{type(error).__name__}: {error}",
        "Check that the pods of the PyTorchJob can reach each other and that the master is running.",
    )
