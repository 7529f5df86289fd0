"""What gets lost between a task on the kubeflow backend and the PyTorchJob that Flyte makes of it.

The same is lost with upstream's plugin, and nothing of it is refused: this backend is a drop-in. ``render`` lists it.
Read in Flyte's source at v1.16.8 (kfoperators/common/common_operator.go, kfoperators/pytorch/pytorch.go). Pure.
"""

from __future__ import annotations

from typing import Any

from kfpytorch_ray.adapters.job_message import is_plain_pod
from kfpytorch_ray.backends import JobConfig
from kfpytorch_ray.checks import is_elastic
from kfpytorch_ray.task_arguments import TaskArguments


def lost(config: JobConfig, arguments: TaskArguments) -> tuple[str, ...]:
    """Every field that does not arrive, or means something else."""
    policy = config.run_policy
    found = []
    if policy is not None and is_plain_pod(config):
        found.append(
            "run_policy has no effect with nnodes=1: Flyte makes a plain pod of it; nnodes='1' is a PyTorchJob"
        )
    elif policy is not None:
        found += _zeros(policy)
    if not is_elastic(config):
        found += _replicas(config, arguments)
    gpus = arguments.resources.requests.gpu or arguments.resources.limits.gpu
    if arguments.accelerator is not None and not gpus:
        found.append("accelerator has no effect: Flyte selects nodes by it only where the task asks for a GPU")
    return tuple(found)


def _zeros(policy: Any) -> list[str]:
    return [
        f"run_policy.{name}=0 has no effect: Flyte takes 0 for not given"
        for name in ("ttl_seconds_after_finished", "active_deadline_seconds", "backoff_limit")
        if getattr(policy, name) == 0
    ]


def _replicas(config: Any, arguments: TaskArguments) -> list[str]:
    asked = [
        kind
        for kind in ("cpu", "mem")
        if any(getattr(side, kind) is not None for side in (arguments.resources.requests, arguments.resources.limits))
    ]
    if not asked:
        return []
    return [
        f"@task's {' and '.join(asked)} do not reach the {role}: its message always has resources, which Flyte "
        f"completes by the platform's CPU and memory; give {role.capitalize()}(requests=)"
        for role, replica in (("master", config.master), ("worker", config.worker))
        if all(
            getattr(side, kind, None) is None for side in (replica.requests, replica.limits) for kind in ("cpu", "mem")
        )
    ]
