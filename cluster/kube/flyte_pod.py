"""The pod that Flyte makes of a task's container or pod template: the base of every resource that it creates.

Imitates flyteplugins/go/tasks/pluginmachinery/flytek8s at v1.16.8: pod_helper.go (the pod, shared memory, accelerators,
a group's own pod laid over it), container_helper.go (arguments, resources) and k8s_resource_adds.go (environment).
Reads a task template as ``MessageToDict`` gives it. Not imitated: copilot, interruptible tasks, secrets, pod templates
that live in the cluster (``pod_template_name``), and what a platform configures.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfpytorch_ray.cluster.kube import flyte_amounts
from kfpytorch_ray.cluster.kube.flyte_amounts import Amounts
from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution, FlytePlatform
from kfpytorch_ray.errors import ConfigError

Manifest = dict[str, Any]


@dataclass(slots=True)
class BasePod:
    """A pod that a plugin goes on with; it may change it.

    Attributes:
        spec: The pod's.
        labels: Of the user's pod template.
        annotations: Likewise.
        primary: Index of the container that runs the task.
    """

    spec: Manifest
    labels: dict[str, str]
    annotations: dict[str, str]
    primary: int

    @property
    def container(self) -> Manifest:
        """The container that runs the task."""
        found: Manifest = self.spec["containers"][self.primary]
        return found

    def copied(self) -> BasePod:
        """One that can be changed by itself."""
        return copy.deepcopy(self)


def base_pod(template: Mapping[str, Any], execution: FlyteExecution, override: Amounts | None = None) -> BasePod:
    """The pod of a task template.

    Args:
        template: The message as a dict.
        execution: What is running it.
        override: Resources laid over those of the primary container.

    Raises:
        ConfigError: Flyte would refuse the template (BadTaskSpecification).
    """
    pod = _raw_pod(template, execution)
    platform = execution.platform
    for index, container in enumerate(pod.spec["containers"]):
        container["args"] = [execution.fill_in(text) for text in container.get("args") or ()]
        container["command"] = [execution.fill_in(text) for text in container.get("command") or ()]
        container["env"] = [*(container.get("env") or ()), *execution.environment(template.get("id", {}))]
        amounts = flyte_amounts.sanitised(container.get("resources") or {}, platform)
        if index == pod.primary:
            wanted = flyte_amounts.merged(amounts, override) if override else amounts
            container["resources"] = flyte_amounts.completed(wanted, platform)
        else:
            container["resources"] = flyte_amounts.kept_in_range(amounts)
    pod.spec.setdefault("restartPolicy", "Never")
    pod.spec.setdefault("serviceAccountName", execution.service_account)
    extended = template.get("extendedResources", {})
    if "sharedMemory" in extended:
        _mount_shared_memory(pod, extended["sharedMemory"])
    if "gpuAccelerator" in extended:
        _select_accelerator(pod.spec, extended["gpuAccelerator"], platform)
    return pod


def metadata(labels: Mapping[str, str], annotations: Mapping[str, str], execution: FlyteExecution) -> Manifest:
    """Labels and annotations with the platform's, left out where there are none."""
    found = {"labels": dict(labels), "annotations": {**execution.platform.annotations, **annotations}}
    return {name: value for name, value in found.items() if value}


def resource_metadata(
    template: Mapping[str, Any],
    execution: FlyteExecution,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Manifest:
    """Name and place of the resource, and ``@task(labels=, annotations=)`` (nodes/task/k8s/plugin_manager.go)."""
    own = template.get("metadata", {}).get("metadata", {})
    beside = metadata(
        {**(labels or {}), **own.get("labels", {})}, {**(annotations or {}), **own.get("annotations", {})}, execution
    )
    return {"name": execution.name, "namespace": execution.namespace, **beside}


def pod_manifest(template: Mapping[str, Any], execution: FlyteExecution) -> Manifest:
    """The Pod of a ``python-task``."""
    pod = base_pod(template, execution)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": resource_metadata(template, execution, pod.labels, pod.annotations),
        "spec": without_empty(pod.spec),
    }


def without_empty(spec: Manifest) -> Manifest:
    """A pod spec whose containers have no empty lists, as Go leaves them out."""
    containers = [{k: v for k, v in container.items() if v not in ([], {}, None)} for container in spec["containers"]]
    return {**spec, "containers": containers}


def laid_over(base: Manifest, overlay: Mapping[str, Any]) -> Manifest:
    """A group's own pod laid over its copy of the base: mergo with WithOverride and WithAppendSlice.

    Containers are those of the base. One of the overlay counts where the base has its name, and is dropped elsewhere;
    likewise init containers.
    """
    overlay = _whole_numbers(overlay)
    merged: Manifest = _merged(base, overlay)
    for kind in ("containers", "initContainers"):
        over = {container.get("name"): container for container in overlay.get(kind) or ()}
        if kind in base:
            merged[kind] = [_merged(container, over.get(container.get("name"), {})) for container in base[kind]]
        else:
            merged.pop(kind, None)
    return merged


def _merged(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, Mapping):
        return {
            **base,
            **{key: _merged(base[key], value) if key in base else value for key, value in over.items()},
        }
    if isinstance(base, list) and isinstance(over, list):
        return [*base, *over]
    # What Go holds for unset does not override.
    return base if over in ("", 0, None, False) else over


def _raw_pod(template: Mapping[str, Any], execution: FlyteExecution) -> BasePod:
    if "container" in template:
        container = template["container"]
        spec: Manifest = {
            "name": execution.name,
            "image": container.get("image", ""),
            "args": list(container.get("args", ())),
            "command": list(container.get("command", ())),
            "env": [{"name": entry["key"], "value": entry.get("value", "")} for entry in container.get("env", ())],
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "resources": flyte_amounts.from_message(container.get("resources"), execution.platform),
        }
        return BasePod({"containers": [spec]}, {}, {}, 0)
    if "podSpec" not in template.get("k8sPod", {}):
        raise ConfigError("task template", ("it has neither a container nor a pod spec",))
    pod = template["k8sPod"]
    spec = _whole_numbers(pod["podSpec"])
    name = template.get("config", {}).get("primary_container_name")
    primary = next((i for i, container in enumerate(spec["containers"]) if container["name"] == name), None)
    if primary is None:
        raise ConfigError("task template", (f"the pod has no primary container {name!r}",))
    beside = pod.get("metadata", {})
    return BasePod(spec, dict(beside.get("labels", {})), dict(beside.get("annotations", {})), primary)


def _whole_numbers(value: Any) -> Any:
    """A copy in which 8080.0, as a protobuf Struct has it, is 8080, as Go's JSON writes it."""
    if isinstance(value, Mapping):
        return {key: _whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mount_shared_memory(pod: BasePod, wanted: Mapping[str, str]) -> None:
    name, path = wanted["mountName"], wanted["mountPath"]
    mounts = pod.container.setdefault("volumeMounts", [])
    if any(mount["mountPath"] == path for mount in mounts):
        raise ConfigError("task template", (f"shared_memory, but something is mounted at {path} already",))
    volumes = pod.spec.setdefault("volumes", [])
    if any(volume["name"] == name for volume in volumes):
        raise ConfigError("task template", (f"shared_memory, but there is a volume {name!r} already",))
    size = {"sizeLimit": wanted["sizeLimit"]} if wanted.get("sizeLimit") else {}
    volumes.append({"name": name, "emptyDir": {"medium": "Memory", **size}})
    mounts.append({"name": name, "mountPath": path})


def _select_accelerator(spec: Manifest, wanted: Mapping[str, Any], platform: FlytePlatform) -> None:
    """Node affinity and tolerations for a GPU's model; only where a container already has a GPU."""
    if not any(platform.gpu_resource in container["resources"]["limits"] for container in spec["containers"]):
        return
    expressions, tolerations = [], []
    for label, value in (
        (platform.accelerator_label, wanted.get("device")),
        (platform.partition_label, wanted.get("partitionSize")),
    ):
        if value:
            expressions.append({"key": label, "operator": "In", "values": [value]})
            tolerations.append({"key": label, "operator": "Equal", "value": value, "effect": "NoSchedule"})
    if wanted.get("unpartitioned"):
        expressions.append({"key": platform.partition_label, "operator": "DoesNotExist"})
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    terms = required.setdefault("nodeSelectorTerms", []) or [{}]
    required["nodeSelectorTerms"] = [
        {**term, "matchExpressions": [*term.get("matchExpressions", ()), *expressions]} for term in terms
    ]
    spec["tolerations"] = [*(spec.get("tolerations") or ()), *tolerations]
