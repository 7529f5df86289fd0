"""The pod template that gives a task more shared memory: a memory-backed volume at /dev/shm.

What ``increase_shared_mem=True`` (the default) does unless ``@task(shared_memory=...)`` is given. A template of the
user is copied and never changed, so that several tasks may share one.
"""

from __future__ import annotations

import copy
from typing import Any

from flytekit.core.pod_template import PodTemplate

MOUNT_PATH = "/dev/shm"  # noqa: S108 - the kernel's name
VOLUME_NAME = "shm"


def shared_memory_problems(template: PodTemplate | None) -> tuple[str, ...]:
    """Why a volume at /dev/shm cannot be added to a template; empty if it can."""
    if template is None or template.pod_spec is None:
        return ()
    containers = template.pod_spec.containers or []
    if len(containers) > 1:
        problem = (
            f"pod_template has {len(containers)} containers, so that increase_shared_mem cannot know which one "
            "trains: set increase_shared_mem=False and mount a volume at /dev/shm where it is needed"
        )
        return (problem,)
    if any(mount.mount_path == MOUNT_PATH for container in containers for mount in container.volume_mounts or []):
        return ("pod_template already mounts a volume at /dev/shm: remove the mount or set increase_shared_mem=False",)
    return ()


def with_shared_memory(template: PodTemplate | None) -> PodTemplate:
    """A copy of a template, or a new one, whose only container has a memory-backed volume at /dev/shm."""
    from kubernetes.client import V1Container, V1EmptyDirVolumeSource, V1PodSpec, V1Volume, V1VolumeMount

    enlarged = PodTemplate() if template is None else copy.deepcopy(template)
    if enlarged.pod_spec is None:
        enlarged.pod_spec = V1PodSpec(containers=[])
    spec = enlarged.pod_spec
    volume = V1Volume(name=VOLUME_NAME, empty_dir=V1EmptyDirVolumeSource(medium="Memory"))
    spec.volumes = [*(spec.volumes or []), volume]
    spec.containers = spec.containers or [V1Container(name="primary")]
    container = spec.containers[0]
    mount = V1VolumeMount(name=VOLUME_NAME, mount_path=MOUNT_PATH)
    container.volume_mounts = [*(container.volume_mounts or []), mount]
    return enlarged


def copy_template(template: PodTemplate | None) -> PodTemplate | None:
    """A copy of a template that belongs to one task."""
    return copy.deepcopy(template)


def primary_container(template: PodTemplate) -> Any:
    """The container of a template that runs the task; None if flytekit has to add it."""
    containers = (template.pod_spec and template.pod_spec.containers) or []
    return next((container for container in containers if container.name == template.primary_container_name), None)


def as_manifest(template: PodTemplate | None) -> dict[str, Any]:
    """The pod spec of a template in Kubernetes's own words; empty without one."""
    if template is None or template.pod_spec is None:
        return {}
    from kubernetes.client import ApiClient

    manifest: dict[str, Any] = ApiClient().sanitize_for_serialization(template.pod_spec)
    return manifest
