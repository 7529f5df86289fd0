"""What a Flyte task asks of its pods beside ``task_config``, and the protocols of adapters that have a say in them.

Most backends have Flyte make one kind of pod, as flytekit serialises it. An adapter that also is a ``ShapesPods`` makes
several kinds out of one task; one that is a ``RendersFlyte`` can say what Flyte will make of the task's template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from flytekit import Resources
from flytekit.core.pod_template import PodTemplate
from flytekit.core.resources import ResourceSpec

from kfpytorch_ray.backends import Findings, JobConfig


def nothing_asked() -> ResourceSpec:
    """Neither requests nor limits."""
    return ResourceSpec(requests=Resources(), limits=Resources())


@dataclass(frozen=True, slots=True)
class TaskArguments:
    """What stands beside ``task_config`` in ``@task(...)``, as far as pods depend on it.

    Attributes:
        resources: Requests and limits.
        pod_template: The user's.
        accelerator: The GPU's model.
        shared_memory: Whether Flyte is to mount a volume at /dev/shm, or its size.
        environment: Environment variables of the container.
        bounded: Whether the task has a time-out.
    """

    resources: ResourceSpec = field(default_factory=nothing_asked)
    pod_template: PodTemplate | None = None
    accelerator: Any = None
    shared_memory: bool | str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    bounded: bool = False

    @classmethod
    def of(cls, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> TaskArguments:
        """From the keyword arguments of a task class."""
        both = arguments.get("resources")
        return cls(
            resources=ResourceSpec(
                requests=arguments.get("requests") or Resources(), limits=arguments.get("limits") or Resources()
            )
            if both is None
            else ResourceSpec.from_multiple_resource(both),
            pod_template=arguments.get("pod_template"),
            accelerator=arguments.get("accelerator"),
            shared_memory=arguments.get("shared_memory"),
            environment=environment,
            bounded=bool(getattr(arguments.get("metadata"), "timeout", None)),
        )


@runtime_checkable
class ShapesPods(Protocol):
    """An adapter whose backend makes pods of several kinds out of one task, and mounts /dev/shm in them itself."""

    def check_arguments(self, config: JobConfig, arguments: TaskArguments) -> Findings:
        """Say what of ``arguments`` this backend cannot honour."""
        ...

    def container_resources(self, config: JobConfig, arguments: TaskArguments) -> ResourceSpec:
        """Resources of the task's own container, in place of those that the user gave."""
        ...

    def custom_for(self, config: JobConfig, arguments: TaskArguments) -> dict[str, Any]:
        """The ``custom`` field of the Flyte task template, with all kinds of pods."""
        ...


@runtime_checkable
class RendersFlyte(Protocol):
    """An adapter that knows what Flyte makes of its tasks."""

    def flyte_manifests(self, template: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """The Kubernetes resources that Flyte creates for a task template (the message as a dict)."""
        ...

    def lost(self, config: JobConfig, arguments: TaskArguments) -> tuple[str, ...]:
        """Every field that does not arrive on this way, and why."""
        ...
