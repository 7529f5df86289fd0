"""The custom resources that are created here, and their operators' own names in and around them."""

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

PYTORCH_JOB = Kind("kubeflow.org", "pytorchjobs", "PyTorchJob", "Kubeflow's training operator")

CLUSTER_LABEL = "ray.io/cluster"
"""On every pod of a Ray cluster, and in a RayJob's selector of a cluster that is there."""

SUBMITTER_CONTAINER = "ray-job-submitter"
"""Which submits the driver of a RayJob and shows its log."""

JOB_LABEL = "training.kubeflow.org/job-name"
"""On every pod of a PyTorchJob."""

PYTORCH_CONTAINER = "pytorch"
"""Which the training operator looks after; its webhook demands this name."""
