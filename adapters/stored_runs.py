"""What a run is, as its folder in the storage says, for all backends whose runs go on without this process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from kfpytorch_ray.cluster.remote.versions import here
from kfpytorch_ray.config import KubernetesOptions, RayRunOptions, StoredRunOptions
from kfpytorch_ray.errors import KfpytorchRayError
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.relocation import outputs_of, relocated
from kfpytorch_ray.runs import MANIFEST, Manifest, new_run_id, run_folder, whoami
from kfpytorch_ray.storage import Storage

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
    run_id = new_run_id(plan.name)
    nodes = str(plan.min_nodes) if plan.min_nodes == plan.max_nodes else f"{plan.min_nodes}:{plan.max_nodes}"
    return Manifest(
        run_id=run_id,
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
        versions=str(here()),
        **_logs_of(plan, options, Storage(storage), run_id),
    )


def _logs_of(plan: LaunchPlan, options: StoredRunOptions, storage: Storage, run_id: str) -> dict[str, str]:
    """Whose lines the driver prints, and where all are kept; pods of a PyTorchJob keep their own."""
    if not isinstance(options, RayRunOptions):
        return {}
    folder = options.log_folder
    archive = outputs_of(plan, storage, run_id)[1] if folder is None else folder and f"{folder.rstrip('/')}/{run_id}"
    return {"logs": options.logs, "log_archive": archive}


@contextlib.contextmanager
def staging(plan: LaunchPlan, manifest: Manifest, storage: Storage) -> Iterator[LaunchPlan]:
    """Have a run's folder, with the files among its inputs in it; nothing of it stays where the block raises.

    Args:
        plan: What is launched.
        manifest: What the run is.
        storage: That this machine and the workers share.

    Yields:
        The plan with places that its workers reach.

    Raises:
        StorageError: Something cannot be staged.
    """
    folder = run_folder(storage, manifest.run_id)
    try:
        # First: a folder that has none is nobody's, and is removed by a clean-up.
        folder.write(MANIFEST, manifest.to_json())
        yield relocated(plan, storage, manifest.run_id, manifest.log_archive)
    except BaseException:
        with contextlib.suppress(KfpytorchRayError):
            folder.remove()
        raise
