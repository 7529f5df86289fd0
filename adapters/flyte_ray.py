"""A job config as Flyte's RayJob message, for the task type ``ray``. Pure.

Flyte copies the task's container into the head, every worker and the pod that submits the job, GPUs and all, and lays a
group's own pod over its copy (``k8s_pod``, known to Flyte 1.14 and later). What is laid over can change an amount or
add one, but take none away. So the task's container is small, and head and workers bring theirs.
"""

from __future__ import annotations

import json
from typing import Any

from flyteidl.core import tasks_pb2
from flyteidl.plugins import ray_pb2
from flytekit import PodTemplate, Resources
from flytekit.core.resources import ResourceSpec
from google.protobuf.json_format import MessageToDict, ParseDict

from kfpytorch_ray.adapters.worker_pods import WorkerGroup, pod_resources, worker_groups
from kfpytorch_ray.backends import JobConfig
from kfpytorch_ray.cluster.runtime_env import driver_environment
from kfpytorch_ray.config import KubeRayBackend
from kfpytorch_ray.pod_template import as_manifest
from kfpytorch_ray.task_arguments import TaskArguments

TASK_TYPE = "ray"

HEAD_CONTAINER = "ray-head"
"""Flyte lays over a container of this name only, and drops every other one of the head's own pod."""

WORKER_CONTAINER = "ray-worker"
"""Likewise on workers."""

HEAD_REQUESTS = Resources(cpu="1", mem="4Gi")
"""Ray's own processes take 1 to 2 GiB; the rest is for the driver, which loads torch and gathers results."""

SUBMITTER = Resources(cpu="500m", mem="1Gi")
"""``ray job submit`` and a tail of the driver's log."""

DEFAULT_TTL_S = 60
"""An ended cluster holds its nodes for as long; log collectors need a moment to read what it left."""


def ray_job(config: JobConfig, options: KubeRayBackend, arguments: TaskArguments) -> dict[str, Any]:
    """The message as a dict."""
    groups = worker_groups(config, arguments.resources, options.gpu_resource)
    cluster = ray_pb2.RayCluster(
        head_group_spec=_head(options),
        worker_group_spec=[_workers(group, options) for group in groups],
        enable_autoscaling=any(group.min_nodes < group.max_nodes for group in groups),
    )
    if options.idle_timeout_s is not None:
        cluster.autoscaler_options.idle_timeout_seconds = options.idle_timeout_s
    policy = config.run_policy
    ttl = policy.ttl_seconds_after_finished if policy else None
    # Without ray_cluster Flyte fails on a nil pointer, again and again, so it is there whatever the config.
    message: dict[str, Any] = MessageToDict(
        ray_pb2.RayJob(
            ray_cluster=cluster,
            runtime_env_yaml=_runtime_env(options),
            shutdown_after_job_finishes=True,
            ttl_seconds_after_finished=DEFAULT_TTL_S if ttl is None else ttl,
        )
    )
    return message


def container_resources(config: JobConfig, options: KubeRayBackend, arguments: TaskArguments) -> ResourceSpec:
    """Resources of the task's container, of which only the submitting pod is a plain copy.

    Where the user asks for no memory, neither does the container, so that workers get the platform's default and not
    the submitter's amount.
    """
    groups = worker_groups(config, arguments.resources, options.gpu_resource)
    sized = all("memory" in group.resources["requests"] for group in groups)
    small = SUBMITTER if sized else Resources(cpu=SUBMITTER.cpu)
    return ResourceSpec(requests=small, limits=small)


def head_resources(options: KubeRayBackend) -> ResourceSpec:
    """What the head asks for, ours where the user says nothing."""
    if options.head_requests is None and options.head_limits is None:
        return ResourceSpec(requests=HEAD_REQUESTS, limits=HEAD_REQUESTS)
    return ResourceSpec(requests=options.head_requests or Resources(), limits=options.head_limits or Resources())


def _head(options: KubeRayBackend) -> ray_pb2.HeadGroupSpec:
    resources = pod_resources(head_resources(options), options.gpu_resource)
    return ray_pb2.HeadGroupSpec(
        # Never empty: Flyte then fills a map of its own configuration, and keeps what it filled in for later jobs.
        ray_start_params={**options.head_start_params, "num-cpus": "0"},
        k8s_pod=_overlay(HEAD_CONTAINER, resources, options.head_pod_template),
    )


def _workers(group: WorkerGroup, options: KubeRayBackend) -> ray_pb2.WorkerGroupSpec:
    # KubeRay submits the job when all `replicas` run, so a range starts with the fewest and grows by demand.
    return ray_pb2.WorkerGroupSpec(
        group_name=group.name,
        replicas=group.min_nodes,
        min_replicas=group.min_nodes,
        max_replicas=group.max_nodes,
        ray_start_params=options.worker_start_params,
        k8s_pod=_overlay(WORKER_CONTAINER, group.resources, options.worker_pod_template),
    )


def _overlay(name: str, resources: dict[str, dict[str, str]], template: PodTemplate | None) -> tasks_pb2.K8sPod:
    spec = as_manifest(template)
    primary = template.primary_container_name if template else name
    own: dict[str, Any] = next((c for c in spec.get("containers", ()) if c["name"] == primary), {})
    spec["containers"] = [{**own, "name": name, "resources": resources}]
    pod = ParseDict({"podSpec": spec}, tasks_pb2.K8sPod())
    if template is not None:
        pod.metadata.labels.update(template.labels or {})
        pod.metadata.annotations.update(template.annotations or {})
    return pod


def _runtime_env(options: KubeRayBackend) -> str:
    # JSON is YAML, and needs no package for it.
    return json.dumps({**(options.runtime_env or {}), "env_vars": driver_environment(options)}, sort_keys=True)
