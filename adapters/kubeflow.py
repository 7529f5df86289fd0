"""The kubeflow backend: what Flyte registers as a PyTorchJob, and torch elastic in this process.

Registers exactly what flytekitplugins-kfpytorch 1.16 registers. Executes as it does: inside a PyTorchJob's pod, where
the operator's PET_* variables lead to the other nodes, and on one machine without them. A ``PyTorch`` job's processes
are started by the operator, so there is nothing to launch. Found by kfpytorch_ray.backends.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.adapters import kubeflow_findings
from kfpytorch_ray.adapters.job_message import is_plain_pod, job_message
from kfpytorch_ray.backends import Findings, JobConfig
from kfpytorch_ray.checks import is_elastic
from kfpytorch_ray.cluster.torch_elastic import launch_config, run_node
from kfpytorch_ray.config import KubeflowBackend
from kfpytorch_ray.errors import (
    ResultError,
)
from kfpytorch_ray.flyte_worker import (
    UNPICKLABLE_MARKER,
    leave_marker,
    run_in_current_context,
    spawn_helper,
)
from kfpytorch_ray.payload import dump_payload, dump_result, importable, load_result
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.results import ElasticResult, ElasticWorkerResult
from kfpytorch_ray.task_arguments import TaskArguments

if TYPE_CHECKING:
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
        return launch_config(plan)

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
        _warn_outside_job(plan)
        entrypoint, args = _entrypoint(plan)
        with importable(plan.function):
            outputs = run_node(plan, config, entrypoint, args)
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
