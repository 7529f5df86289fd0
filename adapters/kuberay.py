"""The kuberay backend: Flyte has KubeRay make a Ray cluster, and the plan runs on it as on any other.

Under Flyte the task is a RayJob. Its driver, this process, is a Ray job on the head pod and runs the plan by the ray
backend's adapter, which joins the cluster around it. Without Flyte nothing makes the cluster yet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.resources import ResourceSpec

from kfpytorch_ray.adapters import flyte_ray, kuberay_findings
from kfpytorch_ray.adapters.raycluster import RayAdapter
from kfpytorch_ray.backends import REMOTE_EXECUTION_VARIABLE, Findings, JobConfig
from kfpytorch_ray.config import KubeRayBackend, RayBackend, RayRunOptions
from kfpytorch_ray.errors import BackendUnavailableError, explain
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.pods import TaskArguments
from kfpytorch_ray.results import ElasticResult

if TYPE_CHECKING:
    from kfpytorch_ray.cluster.request import RayRequest

RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the entrypoint of a job, and nowhere else."""


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
        """The RayJob as Flyte's message."""
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

    def build(self, plan: LaunchPlan) -> RayRequest:
        """What the driver asks of the Ray around it.

        Raises:
            PayloadError: The function or an input cannot be pickled.
        """
        return RayAdapter(inside_options(self._options)).build(plan)

    def run(self, plan: LaunchPlan) -> ElasticResult:
        """Run the plan on the cluster whose head pod this process is on.

        Raises:
            BackendUnavailableError: This process is not the driver of a Ray job, or Ray is not installed.
            PayloadError: The function or an input cannot be pickled.
            PlacementError: The nodes cannot be had.
            LaunchError: A rank or a node failed.
        """
        if RAY_JOB_VARIABLE not in os.environ:
            raise BackendUnavailableError(_no_cluster(plan.name))
        return RayAdapter(inside_options(self._options)).run(plan)


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
    if os.environ.get(REMOTE_EXECUTION_VARIABLE):
        return explain(
            f"{name} runs on the backend 'kuberay', but not on a Ray cluster.",
            "Flyte ran the task type 'ray' as a plain pod, so its ray plugin is not enabled.",
            "Enable it in Flyte's configuration, tasks.task-plugins: add ray to enabled-plugins and ray: ray to "
            "default-for-task-types.",
        )
    return explain(
        f"{name} cannot run on the backend 'kuberay' here.",
        "Without Flyte nothing makes the KubeRay cluster yet: this version reaches KubeRay through Flyte only.",
        "Register and run the task on Flyte, or run it on a Ray that is there: backend=RayBackend(address=...).",
    )
