"""The RayJob that Flyte makes of a task of type ``ray``.

Imitates flyteplugins/go/tasks/plugins/k8s/ray/ray.go at v1.16.8, written from a reading of it; it is no part of Flyte.
Head, workers and the submitting pod are each a copy of the task's pod, and the groups' own pods are laid over the first
two. What Flyte never sets (rayVersion, submissionMode, backoffLimit, activeDeadlineSeconds) is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
from kfpytorch_ray.cluster.kube.flyte_pod import (
    BasePod,
    Manifest,
    base_pod,
    laid_over,
    metadata,
    resource_metadata,
    without_empty,
)
from kfpytorch_ray.errors import ConfigError

MAX_NAME_LENGTH = 47
"""KubeRay's limit for a RayJob, to which Flyte cuts the names that it generates."""

_PORTS = (("redis", 6379), ("head", 10001), ("dashboard", 8265))


def ray_job(template: Mapping[str, Any], execution: FlyteExecution) -> Manifest:
    """The RayJob of a task template.

    Args:
        template: The message as a dict.
        execution: What is running it.

    Raises:
        ConfigError: Flyte would refuse the template, or fail on it again and again.
    """
    custom = template.get("custom", {})
    if "rayCluster" not in custom:
        raise ConfigError("task template", ("custom has no rayCluster, on which Flyte fails with a nil pointer",))
    if len(execution.name) > MAX_NAME_LENGTH:
        raise ConfigError("execution", (f"name {execution.name!r} is longer than {MAX_NAME_LENGTH} characters",))
    pod = base_pod(template, execution)
    shutdown = bool(custom.get("shutdownAfterJobFinishes"))
    spec: Manifest = {
        "entrypoint": entrypoint(pod.container["args"]),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _whole(custom, "ttlSecondsAfterFinished") if shutdown else execution.platform.ttl_s,
        "rayClusterSpec": _cluster(custom["rayCluster"], pod, execution),
        "submitterPodTemplate": {
            "metadata": metadata(pod.labels, pod.annotations, execution),
            "spec": without_empty(pod.spec),
        },
    }
    if custom.get("runtimeEnvYaml"):
        spec["runtimeEnvYAML"] = custom["runtimeEnvYaml"]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": resource_metadata(template, execution, pod.labels, pod.annotations),
        "spec": spec,
    }


def entrypoint(args: list[str]) -> str:
    """The container's arguments as one line for a shell: joined and not quoted, but for empty ones (since 1.16.5)."""
    return " ".join(argument or "''" for argument in args)


def _cluster(cluster: Mapping[str, Any], pod: BasePod, execution: FlyteExecution) -> Manifest:
    platform = execution.platform
    head = cluster.get("headGroupSpec", {})
    rendered: Manifest = {
        "headGroupSpec": {
            "serviceType": platform.service_type,
            "enableIngress": False,
            "rayStartParams": {**platform.head_start_params, **head.get("rayStartParams", {})},
            "template": _head_pod(pod.copied(), head.get("k8sPod", {}), execution),
        },
        "workerGroupSpecs": [_worker_group(group, pod, execution) for group in cluster.get("workerGroupSpec", ())],
        "enableInTreeAutoscaling": bool(cluster.get("enableAutoscaling")),
    }
    options = cluster.get("autoscalerOptions")
    if options is not None:
        rendered["autoscalerOptions"] = _autoscaler(options)
    return rendered


def _autoscaler(options: Mapping[str, Any]) -> Manifest:
    rendered: Manifest = {"resources": {}}
    if _whole(options, "idleTimeoutSeconds") > 0:
        rendered["idleTimeoutSeconds"] = _whole(options, "idleTimeoutSeconds")
    mode = options.get("upscalingMode", "")
    if mode:
        rendered["upscalingMode"] = mode.removeprefix("UPSCALING_MODE_").capitalize()
    if options.get("image"):
        rendered["image"] = options["image"]
    return rendered


def _worker_group(group: Mapping[str, Any], pod: BasePod, execution: FlyteExecution) -> Manifest:
    replicas = _whole(group, "replicas")
    return {
        "groupName": group.get("groupName", ""),
        "replicas": replicas,
        "minReplicas": min(_whole(group, "minReplicas"), replicas),
        "maxReplicas": max(_whole(group, "maxReplicas"), replicas),
        "rayStartParams": {**execution.platform.worker_start_params, **group.get("rayStartParams", {})},
        "template": _worker_pod(pod.copied(), group.get("k8sPod", {}), execution),
    }


def _head_pod(pod: BasePod, own: Mapping[str, Any], execution: FlyteExecution) -> Manifest:
    container = pod.container
    container["name"] = "ray-head"
    container["args"] = []
    container["env"] = [*container["env"], _field("MY_POD_IP", "status.podIP")]
    container["ports"] = [*container.get("ports", ()), *_ports()]
    return _pod_template(pod, own, execution)


def _worker_pod(pod: BasePod, own: Mapping[str, Any], execution: FlyteExecution) -> Manifest:
    container = pod.container
    container["name"] = "ray-worker"
    container["args"] = []
    container["env"] = [
        *container["env"],
        {"name": "RAY_DISABLE_DOCKER_CPU_WARNING", "value": "1"},
        {"name": "TYPE", "value": "worker"},
        _amount("CPU_REQUEST", "requests.cpu"),
        _amount("CPU_LIMITS", "limits.cpu"),
        # Flyte reads CPU here too; nobody is known to use them.
        _amount("MEMORY_REQUESTS", "requests.cpu"),
        _amount("MEMORY_LIMITS", "limits.cpu"),
        _field("MY_POD_NAME", "metadata.name"),
        _field("MY_POD_IP", "status.podIP"),
    ]
    container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", "ray stop"]}}}
    container["ports"] = [*container.get("ports", ()), *_ports()]
    return _pod_template(pod, own, execution)


def _pod_template(pod: BasePod, own: Mapping[str, Any], execution: FlyteExecution) -> Manifest:
    beside = own.get("metadata", {})
    return {
        "metadata": metadata(
            {**pod.labels, **beside.get("labels", {})}, {**pod.annotations, **beside.get("annotations", {})}, execution
        ),
        "spec": without_empty(laid_over(pod.spec, own.get("podSpec", {}))),
    }


def _ports() -> list[Manifest]:
    return [{"name": name, "containerPort": port} for name, port in _PORTS]


def _field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _amount(name: str, resource: str) -> Manifest:
    return {"name": name, "valueFrom": {"resourceFieldRef": {"containerName": "ray-worker", "resource": resource}}}


def _whole(message: Mapping[str, Any], name: str) -> int:
    """Numbers of a protobuf Struct are floating ones."""
    return int(message.get(name, 0))
