"""The custom resources that are created here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of custom resource.

    Attributes:
        group: Of its API.
        plural: As in its URL.
        name: As in ``kind``.
        operator: Whose it is, for people.
    """

    group: str
    plural: str
    name: str
    operator: str

    @property
    def crd(self) -> str:
        """Name of its definition."""
        return f"{self.plural}.{self.group}"


RAY_JOB = Kind("ray.io", "rayjobs", "RayJob", "KubeRay")
RAY_CLUSTER = Kind("ray.io", "rayclusters", "RayCluster", "KubeRay")
