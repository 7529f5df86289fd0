"""Sending a launch to an operator: stage it, create the custom resource; and nothing left behind where that fails.

The request and the user's modules go by the storage, their SHA-256 by the resource. No variable of the user's, no value
and no token is in the manifest.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass

from kfpytorch_ray.cluster.kube import code
from kfpytorch_ray.cluster.kube.client import Manifest, Namespace
from kfpytorch_ray.cluster.kube.kinds import Kind
from kfpytorch_ray.cluster.remote.handle import RemoteRun
from kfpytorch_ray.cluster.remote.job import ClusterJob
from kfpytorch_ray.cluster.remote.working_dir import WorkingDir, check, survey
from kfpytorch_ray.cluster.runtime_env import working_dir_of
from kfpytorch_ray.config import KubernetesOptions
from kfpytorch_ray.errors import KfpytorchRayError
from kfpytorch_ray.notices import tell
from kfpytorch_ray.runs import MANIFEST, REQUEST, run_folder
from kfpytorch_ray.runs import Manifest as RunManifest
from kfpytorch_ray.storage import Digest, Storage


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a launch goes.

    Attributes:
        namespace: Where the custom resource is created.
        storage: That its pods share with this machine.
        working_dir: The user's modules; None where they are in the image.
    """

    namespace: Namespace
    storage: Storage
    working_dir: WorkingDir | None


def namespace_of(options: KubernetesOptions) -> Namespace:
    """The namespace that the options name.

    Raises:
        ConfigError: The kubeconfig or the context is not there.
    """
    return Namespace(options.namespace, options.context, options.kubeconfig)


def destination(options: KubernetesOptions, namespace: Namespace, storage: Storage) -> Destination:
    """Where a launch goes, once the user's modules were looked at.

    Raises:
        ConfigError: The modules cannot be sent.
    """
    folder = working_dir_of(options)
    working_dir = survey(folder, options.excludes) if folder else None
    if working_dir is not None:
        check(working_dir, options.max_working_dir_bytes)
    return Destination(namespace, storage, working_dir)


def submit(
    request: object,
    run: RunManifest,
    kind: Kind,
    job: Callable[[Storage], ClusterJob],
    render: Callable[[str, str, Digest | None], Manifest],
    options: KubernetesOptions,
    to: Destination,
) -> RemoteRun:
    """Stage a request and have an operator run it.

    Args:
        request: What is to be done, as the process there reads it.
        run: What the run is.
        kind: Of the custom resource.
        job: Of the run, by its folder.
        render: Makes the custom resource of the folder's URI, the request's SHA-256 and what the modules' zip holds.
        options: The backend's.
        to: Where it goes.

    Raises:
        StorageError: It cannot be staged.
        ClusterError: The cluster cannot be reached, or refuses it.
    """
    folder = run_folder(to.storage, run.run_id)
    submitted = job(folder)
    try:
        folder.write(MANIFEST, run.to_json())
        sha256 = folder.upload(REQUEST, [pickle.dumps(request)]).sha256
        packed = None
        if to.working_dir is not None:
            tell(to.working_dir.describe())
            packed = code.send(to.working_dir, options.excludes, folder)
        to.namespace.create(kind, render(folder.uri, sha256, packed))
    except BaseException:
        with contextlib.suppress(KfpytorchRayError):
            submitted.forget()
        with contextlib.suppress(KfpytorchRayError):
            folder.remove()
        raise
    handle = RemoteRun(run, folder, options, lambda: submitted)
    tell(
        f"the {kind.name} {run.run_id} is created in the namespace {to.namespace.name}. If this process ends, follow "
        f"it: {handle.command('logs -f')}"
    )
    return handle
