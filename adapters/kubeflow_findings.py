"""What gets lost between a task on the kubeflow backend and its PyTorchJob, and what is wrong with the options.

What Flyte loses is lost with upstream's plugin, too, and nothing of it is refused: this backend is a drop-in.
``render`` lists it. Read in Flyte's source at v1.16.8 (kfoperators/common/common_operator.go and
kfoperators/pytorch/pytorch.go). Pure.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kfpytorch_ray.adapters.job_message import is_plain_pod
from kfpytorch_ray.adapters.kubernetes_findings import kubernetes_option_problems
from kfpytorch_ray.adapters.ray_findings import call_option_problems, stored_option_problems
from kfpytorch_ray.backends import Findings, JobConfig
from kfpytorch_ray.checks import is_elastic
from kfpytorch_ray.config import KubeflowBackend, KubernetesOptions
from kfpytorch_ray.task_arguments import TaskArguments

_OPTIONS = tuple(sorted(field.name for field in fields(KubernetesOptions)))


def find(config: JobConfig, options: KubeflowBackend) -> Findings:
    """What cannot work."""
    problems = [
        *call_option_problems(options),
        *stored_option_problems(options),
        *kubernetes_option_problems(options),
    ]
    if is_elastic(config) and getattr(config, "start_method", None) == "forkserver":
        problems.append("start_method='forkserver': Bad start method for the backend 'kubeflow', use 'spawn' or 'fork'")
    warnings = []
    if not options.creates_job:
        warnings = [
            f"KubeflowBackend({name}) has no effect: it is for a PyTorchJob that this process creates (image=...)"
            for name in _given(options)
        ]
    return Findings(tuple(problems), tuple(warnings))


def lost(config: JobConfig, options: KubeflowBackend, arguments: TaskArguments) -> tuple[str, ...]:
    """Every field that does not arrive, or means something else, on the way by Flyte."""
    policy = config.run_policy
    found = [
        f"KubeflowBackend({name}) has no effect under Flyte, which creates the PyTorchJob itself"
        for name in _given(options)
    ]
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


def lost_without_flyte(options: KubeflowBackend, arguments: TaskArguments) -> tuple[str, ...]:
    """Every field that does not arrive, or means something else, in a PyTorchJob that this process creates."""
    found = []
    if arguments.accelerator is not None:
        found.append(
            "accelerator has no effect: what its node label is called Flyte's platform knows; select nodes by "
            "@task(pod_template=PodTemplate(V1PodSpec(node_selector=...)))"
        )
    if arguments.bounded:
        found.append("@task(timeout=) is Flyte's: give run_policy.active_deadline_seconds")
    if options.image is None:
        found.append("container_image is Flyte's: give KubeflowBackend(image=...), or no PyTorchJob can be created")
    return tuple(found)


def _given(options: KubeflowBackend) -> list[str]:
    """Names of the options that are not the default."""
    plain = KubeflowBackend()
    return [name for name in _OPTIONS if getattr(options, name) != getattr(plain, name)]


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
