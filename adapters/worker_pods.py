"""Which Ray worker groups a job config needs, and what one pod of each holds. Pure.

One Ray worker pod is one node of the job. Its amounts agree with what kfpytorch_ray.planning has the driver ask of
Ray: what a pod lacked there, no node could ever give. Requests and limits are both written for every kind, because
Flyte lays them over those of another container, whose limits would stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flytekit import Resources
from flytekit.core.resources import ResourceSpec

from kfpytorch_ray.backends import JobConfig
from kfpytorch_ray.checks import is_elastic, parse_nnodes
from kfpytorch_ray.config import KubernetesOptions
from kfpytorch_ray.task_arguments import TaskArguments, nothing_asked


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """Pods that are alike.

    Attributes:
        name: Of the group, a DNS label.
        min_nodes: Fewest pods, with which training starts.
        max_nodes: Most pods.
        resources: Of one pod: ``requests`` and ``limits`` by Kubernetes's names.
    """

    name: str
    min_nodes: int
    max_nodes: int
    resources: dict[str, dict[str, str]]


def worker_groups(config: JobConfig, resources: ResourceSpec, gpu_resource: str) -> tuple[WorkerGroup, ...]:
    """The groups of a job: one, or a master's and the other workers' where their resources differ.

    Args:
        config: ``Elastic`` or ``PyTorch``.
        resources: Of the task.
        gpu_resource: What the cluster calls a GPU.
    """
    if is_elastic(config):
        low, high = parse_nnodes(config.nnodes)  # type: ignore[union-attr]
        workers: int = config.nproc_per_node  # type: ignore[union-attr]
        return (WorkerGroup("worker", low, high, pod_resources(resources, gpu_resource, cpus=workers)),)
    return _replica_groups(config, resources, gpu_resource)


def worker_resources(options: KubernetesOptions, arguments: TaskArguments) -> ResourceSpec:
    """Of one node's pod: the task's, else the backend's."""
    if arguments.resources != nothing_asked():
        return arguments.resources
    return ResourceSpec(requests=options.requests or Resources(), limits=options.limits or Resources())


def _replica_groups(config: Any, resources: ResourceSpec, gpu_resource: str) -> tuple[WorkerGroup, ...]:
    replicas = config.num_workers or config.worker.replicas or 0
    master, worker = (
        pod_resources(own_resources(replica) or resources, gpu_resource, cpus=1)
        for replica in (config.master, config.worker)
    )
    if master == worker or not replicas:
        return (WorkerGroup("worker", 1 + replicas, 1 + replicas, master),)
    return (WorkerGroup("master", 1, 1, master), WorkerGroup("worker", replicas, replicas, worker))


def pod_resources(spec: ResourceSpec, gpu_resource: str, *, cpus: int | None = None) -> dict[str, dict[str, str]]:
    """Requests and limits by Kubernetes's names; each is the other where only one is given.

    Args:
        spec: As the user wrote it.
        gpu_resource: What the cluster calls a GPU.
        cpus: CPUs where none are given. None: leave them out.
    """
    requests, limits = (_by_kubernetes_name(side, gpu_resource) for side in (spec.requests, spec.limits))
    if cpus is not None and "cpu" not in requests and "cpu" not in limits:
        requests = {"cpu": str(cpus), **requests}
    return {"requests": {**limits, **requests}, "limits": {**requests, **limits}}


def own_resources(replica: Any) -> ResourceSpec | None:
    """Of a replica of a ``PyTorch`` job; None where it has the task's."""
    if replica.requests is None and replica.limits is None:
        return None
    return ResourceSpec(requests=replica.requests or Resources(), limits=replica.limits or Resources())


def _by_kubernetes_name(resources: Resources, gpu_resource: str) -> dict[str, str]:
    names = {"cpu": "cpu", "mem": "memory", "gpu": gpu_resource, "ephemeral_storage": "ephemeral-storage"}
    amounts = {names[kind]: getattr(resources, kind) for kind in names}
    return {name: str(amount) for name, amount in amounts.items() if amount is not None}
