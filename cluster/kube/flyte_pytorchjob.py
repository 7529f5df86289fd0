"""The PyTorchJob that Flyte makes of a task of type ``pytorch``.

Imitates flyteplugins/go/tasks/plugins/k8s/kfoperators/pytorch/pytorch.go and common/common_operator.go at v1.16.8,
written from a reading of them; it is no part of Flyte. Reads task type version 1 only, as kfpytorch registers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfpytorch_ray.cluster.kube import flyte_amounts
from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
from kfpytorch_ray.cluster.kube.flyte_pod import Manifest, base_pod, metadata, resource_metadata, without_empty
from kfpytorch_ray.errors import ConfigError

CONTAINER = "pytorch"
"""The operator's webhook demands this name."""

_RESTART_POLICIES = {
    "RESTART_POLICY_NEVER": "Never",
    "RESTART_POLICY_ON_FAILURE": "OnFailure",
    "RESTART_POLICY_ALWAYS": "Always",
}

_CLEAN_POD_POLICIES = {
    "CLEANPOD_POLICY_NONE": "None",
    "CLEANPOD_POLICY_ALL": "All",
    "CLEANPOD_POLICY_RUNNING": "Running",
}

_NUMBERS_OF_RUN_POLICY = ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")


def pytorch_job(template: Mapping[str, Any], execution: FlyteExecution) -> Manifest:
    """The PyTorchJob of a task template.

    Args:
        template: The message as a dict.
        execution: What is running it.

    Raises:
        ConfigError: Flyte would refuse the template (BadTaskSpecification).
    """
    if template.get("taskTypeVersion") != 1:
        raise ConfigError("task template", (f"task type version {template.get('taskTypeVersion', 0)} is not known",))
    custom = template.get("custom", {})
    worker = _replica_spec(template, custom.get("workerReplicas", {}), execution)
    worker["template"]["spec"]["containers"][0]["env"].append(
        {"name": "_F_WN", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    )
    replicas: dict[str, Manifest] = {}
    if "elasticConfig" not in custom:
        replicas["Master"] = {**_replica_spec(template, custom.get("masterReplicas", {}), execution), "replicas": 1}
    # Without workers the master is alone.
    if worker["replicas"] > 0 or "elasticConfig" in custom:
        replicas["Worker"] = worker
    spec: Manifest = {"pytorchReplicaSpecs": replicas, "runPolicy": _run_policy(custom.get("runPolicy"))}
    if "elasticConfig" in custom:
        spec["elasticPolicy"] = _elastic_policy(custom["elasticConfig"])
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": resource_metadata(template, execution),
        "spec": spec,
    }


def _replica_spec(template: Mapping[str, Any], replica: Mapping[str, Any], execution: FlyteExecution) -> Manifest:
    # Fields of the common spec win over the older ones beside it.
    fields = replica.get("common", replica)
    override = None
    if "resources" in fields:
        # Also where the message is empty: then CPU and memory become the platform's, whatever the task asks for.
        own = flyte_amounts.from_message(fields["resources"], execution.platform)
        override = flyte_amounts.completed(own, execution.platform)
    pod = base_pod(template, execution, override)
    pod.container["name"] = CONTAINER
    if fields.get("image"):
        pod.container["image"] = fields["image"]
    return {
        "replicas": int(fields.get("replicas", 0)),
        "restartPolicy": _RESTART_POLICIES[fields.get("restartPolicy", "RESTART_POLICY_NEVER")],
        "template": {
            "metadata": metadata(pod.labels, pod.annotations, execution),
            "spec": without_empty(pod.spec),
        },
    }


def _elastic_policy(config: Mapping[str, Any]) -> Manifest:
    return {
        "minReplicas": int(config.get("minReplicas", 0)),
        "maxReplicas": int(config.get("maxReplicas", 0)),
        "rdzvBackend": config.get("rdzvBackend", ""),
        "nProcPerNode": int(config.get("nprocPerNode", 0)),
        "maxRestarts": int(config.get("maxRestarts", 0)),
    }


def _run_policy(policy: Mapping[str, Any] | None) -> Manifest:
    """A number that is 0 counts as not given."""
    if policy is None:
        return {}
    numbers = {name: int(policy[name]) for name in _NUMBERS_OF_RUN_POLICY if policy.get(name)}
    clean = _CLEAN_POD_POLICIES[policy.get("cleanPodPolicy", "CLEANPOD_POLICY_NONE")]
    return {"cleanPodPolicy": clean, **numbers}
