"""What only ``KubeRayBackend(spec=...)`` can say, in KubeRay's own words: as a user writes it, and since when it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kfpytorch_ray import Elastic, KubeRayBackend

_DELETED = [
    {"policy": "DeleteCluster", "condition": {"jobStatus": status, "ttlSeconds": 60}}
    for status in ("SUCCEEDED", "FAILED")
]


@dataclass(frozen=True, slots=True)
class Case:
    """One of them.

    Attributes:
        options: Of the backend, beside its image and its place.
        path: Where it is in the RayJob.
        since: First version of KubeRay that has it; the field that an older one does not know is ``unknown``.
        unknown: Path of that field.
    """

    options: dict[str, Any]
    path: str
    since: str
    unknown: str

    def on(self, backend: KubeRayBackend) -> KubeRayBackend:
        """The backend with it."""
        return replace(backend, **self.options)

    def found(self, manifest: Any) -> Any:
        """What a manifest has at ``path``."""
        for part in self.path.split("."):
            manifest = manifest[int(part)] if part.isdigit() else manifest[part]
        return manifest


CLUSTER = "spec.rayClusterSpec"
CONFIG = Elastic("1:2")
"""A range, which is autoscaled."""

CASES = {
    "auth token": Case(
        {"spec": {"rayClusterSpec": {"authOptions": {"mode": "token"}}}, "ray_version": "2.60.0"},
        f"{CLUSTER}.authOptions.mode",
        "1.5",
        f"{CLUSTER}.authOptions",
    ),
    "GCS fault tolerance": Case(
        {"spec": {"rayClusterSpec": {"gcsFaultToleranceOptions": {"redisAddress": "redis:6379"}}}},
        f"{CLUSTER}.gcsFaultToleranceOptions.redisAddress",
        "1.3",
        f"{CLUSTER}.gcsFaultToleranceOptions",
    ),
    "deletion rules": Case(
        {"spec": {"deletionStrategy": {"deletionRules": _DELETED}}},
        "spec.deletionStrategy.deletionRules.1.condition.ttlSeconds",
        "1.5",
        "spec.deletionStrategy",
    ),
    "autoscaler v2": Case(
        {"spec": {"rayClusterSpec": {"autoscalerOptions": {"version": "v2"}}}},
        f"{CLUSTER}.autoscalerOptions.version",
        "1.4",
        f"{CLUSTER}.autoscalerOptions.version",
    ),
    "SidecarMode": Case({"submission_mode": "SidecarMode"}, "spec.submissionMode", "1.5", "spec.submissionMode"),
    "a group's priority": Case(
        {
            "spec": {
                "rayClusterSpec": {
                    "autoscalerOptions": {"version": "v2"},
                    "workerGroupSpecs": [{"groupName": "worker", "priority": 7}],
                }
            }
        },
        f"{CLUSTER}.workerGroupSpecs.0.priority",
        "1.7",
        f"{CLUSTER}.workerGroupSpecs[].priority",
    ),
}


def has(version: str, case: Case) -> bool:
    """Whether a version of KubeRay has it."""
    return _minor(version) >= _minor(case.since)


def _minor(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)
