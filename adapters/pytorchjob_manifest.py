"""The PyTorchJob that this package creates itself, without Flyte. Pure.

The operator (kubeflow/training-operator 1.8 and 1.9) gives its pods the variables by which torch elastic, or a
``PyTorch`` job's processes, find each other. What runs in them is kfpytorch_ray.cluster.kube.pytorch_pod.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kfpytorch_ray.adapters.kube_pods import DEFAULT_DEADLINE_S, Manifest, laid_over, pod, resource_metadata
from kfpytorch_ray.adapters.worker_pods import own_resources, pod_resources, worker_resources
from kfpytorch_ray.backends import JobConfig
from kfpytorch_ray.checks import deadline_s, is_elastic, parse_nnodes, worker_count
from kfpytorch_ray.cluster.kube.kinds import PYTORCH_CONTAINER
from kfpytorch_ray.cluster.torch_elastic import RENDEZVOUS_BACKEND
from kfpytorch_ray.config import CleanPodPolicy, KubeflowBackend, RestartPolicy, RunPolicy
from kfpytorch_ray.pod_template import MOUNT_PATH, VOLUME_NAME
from kfpytorch_ray.task_arguments import TaskArguments

_GRACE_MARGIN_S = 30
"""For an agent that has stopped its workers to say so in the storage."""

_CLEAN_POD_POLICIES = {CleanPodPolicy.NONE: "None", CleanPodPolicy.ALL: "All", CleanPodPolicy.RUNNING: "Running"}
_RESTART_POLICIES = {RestartPolicy.ALWAYS: "Always", RestartPolicy.FAILURE: "OnFailure", RestartPolicy.NEVER: "Never"}


def pytorch_job(
    config: JobConfig, options: KubeflowBackend, arguments: TaskArguments, *, name: str, command: Sequence[str]
) -> Manifest:
    """The manifest.

    Args:
        config: ``Elastic`` or ``PyTorch``.
        options: The backend's.
        arguments: What stands beside the config in ``@task(...)``.
        name: Of the PyTorchJob; its pods are called ``<name>-worker-0`` and so on.
        command: Of every pod.
    """
    spec: Manifest = {"runPolicy": _run_policy(config, options)}
    if is_elastic(config):
        low, high = parse_nnodes(config.nnodes)  # type: ignore[union-attr]
        workers: int = config.nproc_per_node  # type: ignore[union-attr]
        spec["elasticPolicy"] = {
            "minReplicas": low,
            "maxReplicas": high,
            "rdzvBackend": RENDEZVOUS_BACKEND,
            "nProcPerNode": workers,
            "maxRestarts": config.max_restarts,  # type: ignore[union-attr]
        }
        resources = pod_resources(worker_resources(options, arguments), options.gpu_resource, cpus=workers)
        template = _pod(config, options, arguments, options.image, resources, command)
        spec["pytorchReplicaSpecs"] = {"Worker": _replicas(high, "Never", template)}
    else:
        spec["pytorchReplicaSpecs"] = _roles(config, options, arguments, command)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": resource_metadata(name, options),
        "spec": laid_over(spec, options.spec),
    }


def _roles(config: Any, options: KubeflowBackend, arguments: TaskArguments, command: Sequence[str]) -> Manifest:
    """Master and workers; without workers the master is alone."""
    roles: Manifest = {}
    for role, replica, count in (
        ("Master", config.master, 1),
        ("Worker", config.worker, worker_count(config)),
    ):
        if count:
            asked = own_resources(replica) or worker_resources(options, arguments)
            resources = pod_resources(asked, options.gpu_resource, cpus=1)
            template = _pod(config, options, arguments, replica.image or options.image, resources, command)
            # By value, because upstream's enums are other classes.
            policy = replica.restart_policy
            restarts = "Never" if policy is None else _RESTART_POLICIES[RestartPolicy(policy.value)]
            roles[role] = _replicas(count, restarts, template)
    return roles


def _replicas(count: int, restarts: str, template: Manifest) -> Manifest:
    return {"replicas": count, "restartPolicy": restarts, "template": template}


def _pod(
    config: JobConfig,
    options: KubeflowBackend,
    arguments: TaskArguments,
    image: str | None,
    resources: Manifest,
    command: Sequence[str],
) -> Manifest:
    container: Manifest = {"image": image, "command": list(command)}
    volumes = None
    if config.increase_shared_mem or arguments.shared_memory:
        container["volumeMounts"] = [{"name": VOLUME_NAME, "mountPath": MOUNT_PATH}]
        size = {"sizeLimit": arguments.shared_memory} if isinstance(arguments.shared_memory, str) else {}
        volumes = [{"name": VOLUME_NAME, "emptyDir": {"medium": "Memory", **size}}]
    return pod(
        PYTORCH_CONTAINER,
        container,
        (arguments.pod_template,),
        resources,
        serviceAccountName=options.service_account,
        terminationGracePeriodSeconds=math.ceil(options.stop_grace_s) + _GRACE_MARGIN_S,
        volumes=volumes,
    )


def _run_policy(config: JobConfig, options: KubeflowBackend) -> Manifest:
    """Pods of an ended job stay by default, as their logs are read until the result is taken: by whom may be gone."""
    policy = RunPolicy() if config.run_policy is None else config.run_policy
    limit_s, ttl_s, clean = deadline_s(config), policy.ttl_seconds_after_finished, policy.clean_pod_policy
    limit = {} if policy.backoff_limit is None else {"backoffLimit": policy.backoff_limit}
    return {
        "cleanPodPolicy": "None" if clean is None else _CLEAN_POD_POLICIES[CleanPodPolicy(clean.value)],
        "activeDeadlineSeconds": DEFAULT_DEADLINE_S if limit_s is None else limit_s,
        "ttlSecondsAfterFinished": math.ceil(options.retention_s) if ttl_s is None else ttl_s,
        **limit,
    }
