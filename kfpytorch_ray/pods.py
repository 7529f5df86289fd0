"""The protocols of adapters that have a say in a task's pods.

Most backends have Flyte make one kind of pod, as flytekit serialises it. An adapter that also is a ``ShapesPods`` makes
several kinds out of one task; a ``ChecksArguments`` cannot honour some of what stands beside the config; a
``RendersFlyte`` can say what Flyte will make of the task's template.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from flytekit.core.resources import ResourceSpec

from kfpytorch_ray.backends import Findings, JobConfig
from kfpytorch_ray.task_arguments import TaskArguments


@runtime_checkable
class ChecksArguments(Protocol):
    """An adapter that looks at what stands beside a task's config, when the task is defined."""

    def check_arguments(self, config: JobConfig, arguments: TaskArguments) -> Findings:
        """Say what of ``arguments`` this backend cannot honour."""
        ...


@runtime_checkable
class ShapesPods(ChecksArguments, Protocol):
    """An adapter whose backend makes pods of several kinds out of one task, and mounts /dev/shm in them itself."""

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


@runtime_checkable
class RendersKubernetes(Protocol):
    """An adapter that creates Kubernetes resources itself, without Flyte."""

    def kubernetes_manifests(self, config: JobConfig, arguments: TaskArguments) -> tuple[dict[str, Any], ...]:
        """The resources."""
        ...

    def kubernetes_lost(self, config: JobConfig, arguments: TaskArguments) -> tuple[str, ...]:
        """Every field that does not arrive on this way, and why."""
        ...
