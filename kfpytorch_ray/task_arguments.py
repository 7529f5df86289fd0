"""What stands beside ``task_config`` in ``@task(...)``, as far as a backend depends on it.

Plans name this class, and agents import plans: flytekit is imported only where its classes are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flytekit.core.pod_template import PodTemplate
    from flytekit.core.resources import ResourceSpec


def nothing_asked() -> ResourceSpec:
    """Neither requests nor limits."""
    from flytekit import Resources
    from flytekit.core.resources import ResourceSpec

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
        secrets: flytekit's ``Secret`` objects that Flyte is to give the task's pods.
        pod_template_name: Of a PodTemplate on the cluster that Flyte is to lay under the task's pods.
    """

    resources: ResourceSpec = field(default_factory=nothing_asked)
    pod_template: PodTemplate | None = None
    accelerator: Any = None
    shared_memory: bool | str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    bounded: bool = False
    secrets: tuple[Any, ...] = ()
    pod_template_name: str | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> TaskArguments:
        """From the keyword arguments of a task class."""
        from flytekit import Resources
        from flytekit.core.resources import ResourceSpec

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
            secrets=tuple(arguments.get("secret_requests") or ()),
            pod_template_name=arguments.get("pod_template_name"),
        )
