"""The kuberay backend: KubeRay makes a Ray cluster, and the plan runs on it as on any other.

Under Flyte the task is a RayJob that Flyte creates. Its driver, this process, is a Ray job on the head pod and runs the
plan by the ray backend's adapter, which joins the cluster around it. Without Flyte this process creates the RayJob,
whose driver is one of our own, and follows it as any remote run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.resources import ResourceSpec

from kfpytorch_ray.adapters import flyte_ray, kuberay_findings
from kfpytorch_ray.adapters.kuberay_manifest import ray_job
from kfpytorch_ray.adapters.raycluster import INSTALL, RayAdapter
from kfpytorch_ray.adapters.stored_runs import (
    EXAMPLE_IMAGE,
    EXAMPLE_RUN,
    EXAMPLE_STORAGE,
    address_of,
    located,
    manifest_of,
    staging,
)
from kfpytorch_ray.adapters.worker_pods import worker_resources
from kfpytorch_ray.backends import REMOTE_EXECUTION_VARIABLE, Findings, JobConfig, require_package
from kfpytorch_ray.config import KubeRayBackend, RayBackend, RayRunOptions
from kfpytorch_ray.errors import BackendUnavailableError, ConfigError, explain
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.planning import resources_of_nodes
from kfpytorch_ray.results import ElasticResult
from kfpytorch_ray.run import Run
from kfpytorch_ray.runs import Manifest, run_folder, storage_of
from kfpytorch_ray.storage import Digest, Storage
from kfpytorch_ray.task_arguments import TaskArguments

if TYPE_CHECKING:
    from kfpytorch_ray.cluster.remote.handle import RemoteRun
    from kfpytorch_ray.cluster.request import RayRequest

RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the entrypoint of a job, and nowhere else."""

NEEDS_IMAGE = explain(
    "no image is named.",
    "Without Flyte this process creates the RayJob, and all of its pods run one image.",
    "Give KubeRayBackend(image='REGISTRY/NAME:TAG'); it has ray, torch and kfpytorch_ray as this machine has them.",
)


class KubeRayAdapter:
    """Runs plans on a cluster that KubeRay makes. See ``KubeRayBackend`` for the options."""

    def __init__(self, options: KubeRayBackend | None) -> None:
        self._options = options or KubeRayBackend()

    def check(self, config: JobConfig) -> Findings:
        """Name the fields that Ray or KubeRay cannot honour."""
        return kuberay_findings.find(config, self._options)

    def check_arguments(self, config: JobConfig, arguments: TaskArguments) -> Findings:
        """Name the arguments of the task that Flyte does not take to the workers."""
        return kuberay_findings.find_in_arguments(self._options, arguments)

    def lost(self, config: JobConfig, arguments: TaskArguments) -> tuple[str, ...]:
        """Every field that does not arrive, and why."""
        return kuberay_findings.lost(config, self._options, arguments)

    def task_type(self, config: JobConfig) -> str:
        """Flyte's name for what its ray plugin runs."""
        return flyte_ray.TASK_TYPE

    def custom(self, config: JobConfig) -> dict[str, Any] | None:
        """The RayJob of a task that says nothing beside its config."""
        return self.custom_for(config, TaskArguments())

    def custom_for(self, config: JobConfig, arguments: TaskArguments) -> dict[str, Any]:
        """The RayJob as Flyte's message.

        Raises:
            ConfigError: Flyte would drop a part of the options.
        """
        if dropped := kuberay_findings.dropped_by_flyte(self._options):
            raise ConfigError("KubeRayBackend", dropped)
        return flyte_ray.ray_job(config, self._options, arguments)

    def container_resources(self, config: JobConfig, arguments: TaskArguments) -> ResourceSpec:
        """The submitting pod's: the user's go to the workers."""
        return flyte_ray.container_resources(config, self._options, arguments)

    def flyte_manifests(self, template: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """The RayJob that Flyte makes of a task template."""
        from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
        from kfpytorch_ray.cluster.kube.flyte_rayjob import ray_job

        return (ray_job(template, FlyteExecution()),)

    def launches(self, config: JobConfig) -> bool:
        """Always: this process is the driver, never a worker."""
        return True

    def kubernetes_manifests(self, config: JobConfig, arguments: TaskArguments) -> tuple[dict[str, Any], ...]:
        """The RayJob that this process creates without Flyte; what no option names is an example."""
        from kfpytorch_ray.cluster.kube.entrypoint import entrypoint

        folder = f"{self._options.storage or EXAMPLE_STORAGE}/runs/{EXAMPLE_RUN}"
        example = Digest("0" * 64, 0)
        command = entrypoint(EXAMPLE_RUN, folder, example.sha256, example)
        options = replace(self._options, image=self._options.image or EXAMPLE_IMAGE)
        return (_draft(config, options, arguments, EXAMPLE_RUN, command),)

    def kubernetes_lost(self, config: JobConfig, arguments: TaskArguments) -> tuple[str, ...]:
        """Every field that does not arrive where this process creates the RayJob, and why."""
        return kuberay_findings.lost_without_flyte(config, self._options, arguments)

    def build(self, plan: LaunchPlan) -> RayRequest:
        """What the driver asks of the Ray around it.

        Raises:
            PayloadError: The function or an input cannot be pickled.
        """
        return RayAdapter(inside_options(self._options)).build(plan)

    def run(self, plan: LaunchPlan) -> ElasticResult:
        """Run the plan on the cluster whose head pod this process is on, else on one that KubeRay is asked for.

        Raises:
            BackendUnavailableError: Flyte did not start this process on a Ray cluster, or Ray is not installed.
            ConfigError: An option that is needed is missing, or KubeRay would refuse the RayJob.
            PayloadError: The function or an input cannot be pickled.
            ClusterError: The Kubernetes cluster cannot be used.
            StorageError: The storage cannot be used.
            PlacementError: The nodes cannot be had.
            LaunchError: A rank or a node failed.
        """
        if RAY_JOB_VARIABLE in os.environ:
            return RayAdapter(inside_options(self._options), self._options.name).run(plan)
        return self._submit(plan).follow()

    def start(self, plan: LaunchPlan) -> Run:
        """Have KubeRay start the plan, and return at once.

        Raises:
            KfpytorchRayError: As ``run``, but for what happens to the plan itself.
        """
        run = self._submit(plan)
        run.keep_lease()
        return run

    def attach(self, manifest: Manifest) -> Run:
        """Open a run that KubeRay was asked for before.

        Raises:
            BackendUnavailableError: Ray is not installed.
            ConfigError: The kubeconfig or the context is not there.
        """
        require_package("ray", "ray", INSTALL)
        from kfpytorch_ray.cluster.kube.kuberay_job import KubeRayJob
        from kfpytorch_ray.cluster.kube.submission import namespace_of
        from kfpytorch_ray.cluster.remote.handle import RemoteRun

        options = located(self._options, manifest.address)
        folder = run_folder(storage_of(manifest.storage), manifest.run_id)
        return RemoteRun(
            manifest,
            folder,
            options,
            lambda: KubeRayJob(namespace_of(options), manifest.run_id, options.ready_timeout_s),
        )

    def _submit(self, plan: LaunchPlan) -> RemoteRun:
        if os.environ.get(REMOTE_EXECUTION_VARIABLE):
            raise BackendUnavailableError(_no_cluster(plan.name))
        require_package("ray", "ray", INSTALL)
        from kfpytorch_ray.cluster.kube.entrypoint import entrypoint
        from kfpytorch_ray.cluster.kube.existing import may_grow
        from kfpytorch_ray.cluster.kube.kinds import RAY_JOB
        from kfpytorch_ray.cluster.kube.kuberay_job import KubeRayJob
        from kfpytorch_ray.cluster.kube.preflight import check_ray_job
        from kfpytorch_ray.cluster.kube.submission import destination, namespace_of, submit

        options = self._options
        if options.image is None:
            raise ConfigError("KubeRayBackend", (NEEDS_IMAGE,))
        storage = storage_of(options.storage)
        namespace = namespace_of(options)
        run = manifest_of(plan, options.name, options, storage.uri, address_of(namespace.name, options))
        draft = _draft(plan.config, options, plan.arguments, run.run_id, "python")
        to = destination(options, namespace, storage)
        check_ray_job(options, draft, namespace)
        inside = replace(inside_options(options), working_dir="", autoscaling=may_grow(namespace, options.cluster))

        def render(folder: str, sha256: str, packed: Digest | None) -> dict[str, Any]:
            command = entrypoint(run.run_id, folder, sha256, packed)
            return {**draft, "spec": {**draft["spec"], "entrypoint": command}}

        def job(_folder: Storage) -> KubeRayJob:
            return KubeRayJob(namespace, run.run_id, options.ready_timeout_s)

        with staging(plan, run, storage) as staged:
            return submit((outside_request(options, staged), inside), run, RAY_JOB, job, render, options, to)


def outside_request(options: KubeRayBackend, plan: LaunchPlan) -> RayRequest:
    """What is asked of the RayJob's cluster, built here for a driver that is there: nodes as large as its pods.

    Args:
        options: The backend's.
        plan: As it was made here. Where its task says no resources, the backend's count, as in the pods.

    Raises:
        PayloadError: The function or an input cannot be pickled.
    """
    shared = {field.name: getattr(options, field.name) for field in fields(RayRunOptions)}
    node, first = resources_of_nodes(plan.config, worker_resources(options, plan.arguments))
    return RayAdapter(RayBackend(**shared)).build(replace(plan, resources=node, first_node_resources=first))


def _draft(
    config: JobConfig, options: KubeRayBackend, arguments: TaskArguments, name: str, entrypoint: str
) -> dict[str, Any]:
    """The RayJob."""
    from kfpytorch_ray.cluster.runtime_env import driver_environment

    runtime_env = {**(options.runtime_env or {}), "env_vars": driver_environment(options)}
    return ray_job(config, options, arguments, name=name, entrypoint=entrypoint, runtime_env=runtime_env)


def inside_options(options: KubeRayBackend) -> RayBackend:
    """Options of the ray backend for a driver that is on the cluster's head pod."""
    shared = {field.name: getattr(options, field.name) for field in fields(RayRunOptions)}
    if shared["working_dir"] is None:
        shared["working_dir"] = _fast_registered_code() or ""
    # The RayJob has it, and Ray refuses two.
    shared["runtime_env"] = None
    # KubeRay replaces a lost pod, so what no node holds now may be held soon.
    return RayBackend("auto", autoscaling=True, **shared)


def _fast_registered_code() -> str | None:
    """Where Flyte unpacked the code for this process: only here, so the workers have to be sent it."""
    settings = FlyteContextManager.current_context().serialization_settings
    fast = settings.fast_serialization_settings if settings else None
    if fast is None or not fast.enabled:
        return None
    return os.path.abspath(fast.destination_dir or ".")


def _no_cluster(name: str) -> str:
    return explain(
        f"{name} runs on the backend 'kuberay', but not on a Ray cluster.",
        "Flyte ran the task type 'ray' as a plain pod, so its ray plugin is not enabled.",
        "Enable it in Flyte's configuration, tasks.task-plugins: add ray to enabled-plugins and ray: ray to "
        "default-for-task-types.",
    )
