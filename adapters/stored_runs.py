"""What a run is, as its folder in the storage says, for all backends whose runs go on without this process."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TypeVar

from kfpytorch_ray.config import KubernetesOptions, StoredRunOptions
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.runs import Manifest, new_run_id, whoami

EXAMPLE_RUN = "kfr-example"
EXAMPLE_STORAGE = "s3://bucket/prefix"
EXAMPLE_IMAGE = "registry.example/image:tag"
"""Where a custom resource is shown and not created."""

K = TypeVar("K", bound=KubernetesOptions)


def address_of(namespace: str, options: KubernetesOptions) -> str:
    """Where in Kubernetes a run is, as its manifest says it."""
    return f"{namespace}@{options.context or ''}"


def located(options: K, address: str) -> K:
    """Options with the place that a run's manifest names, where they name none."""
    namespace, _, context = address.partition("@")
    return replace(options, namespace=options.namespace or namespace, context=options.context or context or None)


def manifest_of(plan: LaunchPlan, backend: str, options: StoredRunOptions, storage: str, address: str) -> Manifest:
    """The manifest of a new run.

    Args:
        plan: What is launched.
        backend: By which.
        options: Of the backend.
        storage: URI of the storage.
        address: Of the cluster, as the backend names it.
    """
    nodes = str(plan.min_nodes) if plan.min_nodes == plan.max_nodes else f"{plan.min_nodes}:{plan.max_nodes}"
    return Manifest(
        run_id=new_run_id(plan.name),
        name=plan.name,
        backend=backend,
        storage=storage,
        address=address,
        created_at=time.time(),
        created_by=whoami(),
        nodes=nodes,
        nproc_per_node=plan.nproc_per_node,
        retention_s=options.retention_s,
        lease_s=options.lease_s,
    )
