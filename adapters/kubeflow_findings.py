"""What gets lost between a task on the kubeflow backend and its PyTorchJob, and what is wrong with the options.

What Flyte loses is lost with upstream's plugin, too, and nothing of it is refused: this backend is a drop-in.
``render`` lists it. Read in Flyte's source at v1.16.8 (kfoperators/common/common_operator.go and
kfoperators/pytorch/pytorch.go). Pure.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from flytekit import PodTemplate

from kfpytorch_ray.adapters.job_message import is_plain_pod
from kfpytorch_ray.adapters.kubernetes_findings import kubernetes_option_problems, left_to_flyte
from kfpytorch_ray.adapters.ray_findings import call_option_problems, stored_option_problems
from kfpytorch_ray.backends import Findings, JobConfig
from kfpytorch_ray.checks import is_elastic
from kfpytorch_ray.cluster.kube.kinds import PYTORCH_CONTAINER
from kfpytorch_ray.config import KubeflowBackend, KubernetesOptions
from kfpytorch_ray.errors import explain
from kfpytorch_ray.pod_template import primary_container
from kfpytorch_ray.task_arguments import TaskArguments

_OPTIONS = tuple(sorted(field.name for field in fields(KubernetesOptions)))


def find(config: JobConfig, options: KubeflowBackend) -> Findings:
    """What cannot work."""
    problems = [
        *call_option_problems(options),
        *stored_option_problems(options),
        *kubernetes_option_problems(options, PYTORCH_CONTAINER),
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


def lost_without_flyte(config: JobConfig, options: KubeflowBackend, arguments: TaskArguments) -> tuple[str, ...]:
    """Every field that does not arrive, or means something else, in a PyTorchJob that this process creates."""
    found = []
    if config.run_policy is None or config.run_policy.ttl_seconds_after_finished is None:
        found.append(
            f"run_policy.ttl_seconds_after_finished=None means retention_s={options.retention_s:g} s here, not for "
            "ever: who launched it may be gone"
        )
    found += template_problems(arguments.pod_template)
    return (*found, *left_to_flyte(options, arguments, "PyTorchJob", "@task(pod_template"))


def template_problems(template: PodTemplate | None) -> tuple[str, ...]:
    """What of a task's pod template cannot be in a PyTorchJob that this process creates; Flyte makes its own of it."""
    if template is None:
        return ()
    problems = []
    primary = template.primary_container_name
    containers = (template.pod_spec and template.pod_spec.containers) or []
    if primary != PYTORCH_CONTAINER and any(container.name == PYTORCH_CONTAINER for container in containers):
        problems.append(
            explain(
                f"pod_template has a container {PYTORCH_CONTAINER!r} beside the primary one, {primary!r}.",
                "The training operator takes the one of that name for the task's.",
                "Rename it, or make it the primary one.",
            )
        )
    if (own := primary_container(template)) is not None and own.resources:
        problems.append(
            explain(
                "pod_template gives resources to the primary container.",
                "Those of the task count there, and two amounts would contradict each other: a pod with more GPUs than "
                "the task asks for has ranks for some of them only.",
                "Give them once, as @task(requests=, limits=), and leave them out of the template.",
            )
        )
    if own is not None and (own.command or own.args):
        problems.append(
            explain(
                "pod_template gives the primary container a command.",
                "It runs ours, which starts the ranks.",
                "Leave command and args out of the template.",
            )
        )
    return tuple(problems)


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
