"""Sending a launch to KubeRay: look, stage, create the RayJob; and nothing left behind where that fails.

The request and the user's modules go by the storage, their SHA-256 by the RayJob's entrypoint. No variable of the
user's, no value and no token is in the manifest.
"""

from __future__ import annotations

import contextlib
import pickle
from dataclasses import dataclass

from kfpytorch_ray.cluster.kube import code
from kfpytorch_ray.cluster.kube.client import Manifest, Namespace
from kfpytorch_ray.cluster.kube.entrypoint import entrypoint
from kfpytorch_ray.cluster.kube.kinds import RAY_CLUSTER, RAY_JOB
from kfpytorch_ray.cluster.kube.kuberay_fields import unknown_field_problems
from kfpytorch_ray.cluster.kube.kuberay_job import KubeRayJob
from kfpytorch_ray.cluster.kube.kuberay_rules import problems
from kfpytorch_ray.cluster.remote.handle import RemoteRun
from kfpytorch_ray.cluster.remote.working_dir import WorkingDir, check, survey
from kfpytorch_ray.cluster.request import RayRequest
from kfpytorch_ray.cluster.runtime_env import working_dir_of
from kfpytorch_ray.config import KubeRayBackend, RayBackend
from kfpytorch_ray.errors import ClusterError, ConfigError, KfpytorchRayError, explain
from kfpytorch_ray.notices import tell
from kfpytorch_ray.runs import MANIFEST, REQUEST, run_folder
from kfpytorch_ray.runs import Manifest as RunManifest
from kfpytorch_ray.storage import Storage


@dataclass(frozen=True, slots=True)
class Destination:
    """A namespace that was looked at and found fit.

    Attributes:
        namespace: Where the RayJob is created.
        storage: That its pods share with this machine.
        working_dir: The user's modules; None where they are in the image.
    """

    namespace: Namespace
    storage: Storage
    working_dir: WorkingDir | None


def namespace_of(options: KubeRayBackend) -> Namespace:
    """The namespace that the options name.

    Raises:
        ConfigError: The kubeconfig or the context is not there.
    """
    return Namespace(options.namespace, options.context, options.kubeconfig)


def look(options: KubeRayBackend, draft: Manifest, namespace: Namespace, storage: Storage) -> Destination:
    """Look at the cluster, at the RayJob and at the user's modules, before anything is sent.

    Args:
        options: The backend's.
        draft: The RayJob, of whatever entrypoint.
        namespace: Where it is to be created.
        storage: That its pods share with this machine.

    Raises:
        ConfigError: KubeRay would refuse the RayJob, or the modules cannot be sent.
        ClusterError: The cluster cannot be reached, has no KubeRay, or refuses.
    """
    if refused := problems(draft):
        raise ConfigError("KubeRayBackend", refused)
    folder = working_dir_of(options)
    working_dir = survey(folder, options.excludes) if folder else None
    if working_dir is not None:
        check(working_dir, options.max_working_dir_bytes)
    schema = namespace.definition(RAY_JOB)
    if schema is not None and (unknown := unknown_field_problems(draft, schema)):
        raise ConfigError("KubeRayBackend", unknown)
    if options.cluster is not None and namespace.get(RAY_CLUSTER, options.cluster) is None:
        raise ClusterError(
            explain(
                f"There is no RayCluster {options.cluster!r} in the namespace {namespace.name!r}.",
                "KubeRayBackend(cluster=...) names one that is there already.",
                f"See which there are: kubectl -n {namespace.name} get rayclusters. Without cluster=... a new one is "
                "made.",
            )
        )
    return Destination(namespace, storage, working_dir)


def submit(
    request: RayRequest, inside: RayBackend, run: RunManifest, draft: Manifest, options: KubeRayBackend, to: Destination
) -> RemoteRun:
    """Stage a request and have KubeRay run it.

    Args:
        request: What the driver asks of Ray.
        inside: The driver's options.
        run: What the run is.
        draft: The RayJob, of whatever entrypoint.
        options: The backend's.
        to: As it was found fit.

    Raises:
        StorageError: It cannot be staged.
        ClusterError: The cluster cannot be reached, or refuses it.
    """
    folder = run_folder(to.storage, run.run_id)
    job = KubeRayJob(to.namespace, run.run_id, options.ready_timeout_s)
    try:
        folder.write(MANIFEST, run.to_json())
        sha256 = folder.upload(REQUEST, [pickle.dumps((request, inside))]).sha256
        packed = None
        if to.working_dir is not None:
            tell(to.working_dir.describe())
            packed = code.send(to.working_dir, options.excludes, folder)
        command = entrypoint(run.run_id, folder.uri, sha256, packed)
        to.namespace.create(RAY_JOB, {**draft, "spec": {**draft["spec"], "entrypoint": command}})
    except BaseException:
        with contextlib.suppress(KfpytorchRayError):
            job.forget()
        with contextlib.suppress(KfpytorchRayError):
            folder.remove()
        raise
    submitted = RemoteRun(run, folder, options, lambda: job)
    tell(
        f"the RayJob {run.run_id} is created in the namespace {to.namespace.name}. If this process ends, follow it: "
        f"{submitted.command('logs -f')}"
    )
    return submitted
