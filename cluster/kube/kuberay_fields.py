"""Fields that a cluster's KubeRay does not know, and the first version that does.

An API server drops what a CustomResourceDefinition's schema does not have, and says so in a header that nobody reads
(Kubernetes's structural schemas, "field pruning"): asked of the definition before a resource is sent, it is an error.
The versions come from a comparison of the definitions that KubeRay publishes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kfpytorch_ray.errors import explain

_OF_A_JOB = {
    "spec.backoffLimit": "1.2",
    "spec.submitterConfig": "1.2",
    "spec.managedBy": "1.3",
    "spec.deletionPolicy": "1.3",
    "spec.deletionStrategy": "1.5",
    "spec.deletionStrategy.deletionRules[].condition.jobDeploymentStatus": "1.6",
    "spec.preRunningDeadlineSeconds": "1.6",
    "status.rayJobInfo": "1.4",
}

_OF_A_CLUSTERS_SPEC = {
    "managedBy": "1.3",
    "gcsFaultToleranceOptions": "1.3",
    "gcsFaultToleranceOptions.backend": "1.7",
    "gcsFaultToleranceOptions.storage": "1.7",
    "autoscalerOptions.version": "1.4",
    "autoscalerOptions.command": "1.7",
    "autoscalerOptions.args": "1.7",
    "authOptions": "1.5",
    "authOptions.enableK8sTokenAuth": "1.6",
    "authOptions.secretName": "1.6",
    "upgradeStrategy": "1.6",
    "networkPolicy": "1.7",
    "tlsOptions": "1.7",
    "historyServerOptions": "1.7",
    "headGroupSpec.labels": "1.5",
    "headGroupSpec.resources": "1.5",
    "headGroupSpec.ingressOptions": "1.7",
    "workerGroupSpecs[].idleTimeoutSeconds": "1.3",
    "workerGroupSpecs[].labels": "1.5",
    "workerGroupSpecs[].resources": "1.5",
    "workerGroupSpecs[].priority": "1.7",
}

_OF_A_CLUSTERS_STATUS = {"conditions": "1.2", "head.podName": "1.2", "head.serviceName": "1.2"}

SINCE = {
    **_OF_A_JOB,
    **{
        f"{at}.{path}": version
        for path, version in _OF_A_CLUSTERS_SPEC.items()
        for at in ("spec", "spec.rayClusterSpec")
    },
    **{
        f"{at}.{path}": version
        for path, version in _OF_A_CLUSTERS_STATUS.items()
        for at in ("status", "status.rayClusterStatus")
    },
}
"""Path of a field, of a RayJob or a RayCluster, to the first minor version of KubeRay that has it."""

GONE = {"spec.deletionPolicy": ("1.5", "spec.deletionStrategy")}
"""Path of a field to the version that has it no more, and to what came instead."""

_MODES_SINCE = {"InteractiveMode": ("1.3", "managedBy"), "SidecarMode": ("1.5", "deletionStrategy")}
"""A submissionMode to the version that has it, and to a field of a RayJob's spec that came with that version."""

_OF_EVERY_OBJECT = frozenset({"apiVersion", "kind", "metadata"})


def unknown_fields(manifest: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[str, ...]:
    """Paths of the fields that an API server would drop, in the manifest's order, each once.

    What lies inside a dropped field is not listed. Items of a list share a path, as in
    ``spec.rayClusterSpec.workerGroupSpecs[].priority``.

    Args:
        manifest: The resource, as it is sent.
        schema: ``openAPIV3Schema`` of its version, as the cluster's CustomResourceDefinition has it.
    """
    return tuple(dict.fromkeys(_dropped(manifest, schema, "", whole_object=True)))


def since(path: str) -> str | None:
    """The first version of KubeRay that has a field, as ``"1.6"``; None if it is as old as 1.1, or not known here.

    Args:
        path: As ``unknown_fields`` has it; an index in brackets is taken too. A field inside a newer one is at least
            as new as that.
    """
    path = re.sub(r"\[\d+\]", "[]", path)
    while path:
        if path in SINCE:
            return SINCE[path]
        path = path[:-2] if path.endswith("[]") else path.rpartition(".")[0]
    return None


def unknown_field_problems(manifest: Mapping[str, Any], schema: Mapping[str, Any]) -> tuple[str, ...]:
    """What, why and fix for each field of the manifest that the cluster does not know, with the version that does."""
    return (*map(_problem, unknown_fields(manifest, schema)), *_modes(manifest, schema))


def _modes(manifest: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[str]:
    """Of modes, whose words no schema lists: an operator that is too old takes them and submits nothing, for ever."""
    mode = (manifest.get("spec") or {}).get("submissionMode")
    known = schema.get("properties", {}).get("spec", {}).get("properties", {})
    if mode in _MODES_SINCE and (since_then := _MODES_SINCE[mode])[1] not in known:
        yield explain(
            f"spec.submissionMode: this cluster's KubeRay does not know {mode}.",
            f"KubeRay {since_then[0]} and later do; an older one takes the word and submits nothing.",
            f"Use K8sJobMode or HTTPMode, or have KubeRay {since_then[0]} or later installed.",
        )


def _problem(path: str) -> str:
    ignorance = f"{path}: this cluster's KubeRay does not know it."
    if path in GONE:
        last, instead = GONE[path]
        why = f"KubeRay {last} has it no more: only those from {SINCE[path]} on and before {last} do."
        return explain(ignorance, why, f"Use {instead}.")
    # A field inside one that this cluster knows is not unknown for want of the outer one's version.
    if path in SINCE:
        return explain(
            ignorance,
            f"KubeRay {SINCE[path]} and later do; this one is older, and the field would be dropped in silence.",
            f"Leave it out, or have KubeRay {SINCE[path]} or later installed, with its definitions.",
        )
    return explain(
        ignorance,
        "No version is known that does, and the API server would drop it.",
        "Check the spelling, or leave it out.",
    )


def _dropped(value: Any, schema: Mapping[str, Any], path: str, *, whole_object: bool = False) -> Iterator[str]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _dropped(item, schema.get("items", {}), f"{path}[]")
    elif isinstance(value, Mapping):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        whole_object = whole_object or bool(schema.get("x-kubernetes-embedded-resource"))
        for name, part in value.items():
            at = f"{path}.{name}" if path else str(name)
            if whole_object and name in _OF_EVERY_OBJECT:
                continue
            if name in known:
                yield from _dropped(part, known[name], at)
            elif isinstance(others, Mapping):
                yield from _dropped(part, others, at)
            elif not (others or schema.get("x-kubernetes-preserve-unknown-fields")):
                yield at
