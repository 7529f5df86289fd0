"""Pods and metadata in Kubernetes's own words: for resources that this package creates itself. Pure.

Templates are laid over each other much as Kubernetes's strategic merge patch has it: what has a name (containers,
variables, volumes) is merged with what has the same, a list of plain values is replaced, other lists are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flytekit import PodTemplate

from kfpytorch_ray.config import KubernetesOptions
from kfpytorch_ray.pod_template import as_manifest

Manifest = dict[str, Any]

RUN_LABEL = "kfpytorch-ray/run"
"""On the custom resource of a run; KubeRay copies it to the cluster."""

DEFAULT_DEADLINE_S = 30 * 24 * 3600
"""For jobs that have none: pods that wait for each other hold their nodes, and before 1.7 KubeRay waits for ever for a
job whose head pod was lost."""

_KEYS = {"volumeMounts": "mountPath", "ports": "containerPort", "workerGroupSpecs": "groupName"}
"""By what the items of a list are told apart, where that is not their name."""


def pod(
    name: str, container: Manifest, templates: Sequence[PodTemplate | None], resources: Manifest, **spec: Any
) -> Manifest:
    """A pod template whose first container is ours.

    Args:
        name: Of that container. A template's primary container is laid over it, other containers come behind.
        container: What it is where the templates say nothing.
        templates: The user's, the later over the earlier.
        resources: Of that container, whatever the templates say: what Ray knows of a node follows from them.
        **spec: Fields of the pod's spec where the templates say nothing; None is left out.
    """
    merged: Manifest = {field: value for field, value in spec.items() if value is not None}
    merged["containers"] = [{"name": name, **container}]
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    for template in templates:
        if template is not None:
            merged = laid_over(merged, _with_primary(name, template))
            labels |= template.labels or {}
            annotations |= template.annotations or {}
    merged["containers"][0]["resources"] = resources
    metadata = {key: value for key, value in (("labels", labels), ("annotations", annotations)) if value}
    return {**({"metadata": metadata} if metadata else {}), "spec": merged}


def resource_metadata(name: str, options: KubernetesOptions) -> Manifest:
    """Of the custom resource of a run.

    Args:
        name: Of it, which is the run's id.
        options: The backend's.
    """
    labels = {"app.kubernetes.io/managed-by": "kfpytorch-ray", RUN_LABEL: name, **options.labels}
    beside = {"annotations": dict(options.annotations)} if options.annotations else {}
    return {"name": name, "namespace": options.namespace or "default", "labels": labels, **beside}


def laid_over(base: Any, over: Any, key: str = "name") -> Any:
    """``over`` laid over ``base``: dicts field by field, lists of what has names by name, lists of other dicts joined.

    Args:
        base: What counts where ``over`` says nothing.
        over: What counts.
        key: By what items are told apart if both are lists.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        merged = dict(base)
        for name, value in over.items():
            merged[name] = laid_over(base[name], value, _KEYS.get(name, "name")) if name in base else value
        return merged
    if isinstance(base, list) and isinstance(over, list):
        return _joined(base, over, key)
    return over


def _joined(base: list[Any], over: list[Any], key: str) -> list[Any]:
    if not all(isinstance(item, dict) for item in (*base, *over)):
        return over
    if not all(key in item for item in (*base, *over)):
        return [*base, *(item for item in over if item not in base)]
    merged = {item[key]: item for item in base}
    for item in over:
        merged[item[key]] = laid_over(merged[item[key]], item) if item[key] in merged else item
    return list(merged.values())


def _with_primary(name: str, template: PodTemplate) -> Manifest:
    spec = as_manifest(template)
    for container in spec.get("containers", ()):
        if container["name"] == template.primary_container_name:
            container["name"] = name
    return spec
