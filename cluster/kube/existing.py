"""A RayCluster that is there already and is used by a run."""

from __future__ import annotations

from kfpytorch_ray.cluster.kube.client import Namespace
from kfpytorch_ray.cluster.kube.kinds import RAY_CLUSTER


def may_grow(namespace: Namespace, cluster: str | None) -> bool:
    """Whether more pods than there are may come: where an autoscaler works, or the cluster is made for the run.

    Args:
        namespace: Where it is.
        cluster: Its name; None: one is made.

    Raises:
        ClusterError: The cluster cannot be asked, or refuses.
    """
    if cluster is None:
        return True
    found = namespace.get(RAY_CLUSTER, cluster) or {}
    return bool((found.get("spec") or {}).get("enableInTreeAutoscaling"))
