"""What a cluster would refuse of a custom resource, or drop from it in silence: asked before anything is sent."""

from __future__ import annotations

from kfpytorch_ray.cluster.kube.client import Manifest, Namespace
from kfpytorch_ray.cluster.kube.kinds import PYTORCH_JOB, RAY_CLUSTER, RAY_JOB
from kfpytorch_ray.cluster.kube.kuberay_fields import unknown_field_problems, unknown_fields
from kfpytorch_ray.cluster.kube.kuberay_rules import problems
from kfpytorch_ray.config import KubeRayBackend
from kfpytorch_ray.errors import ClusterError, ConfigError, explain


def check_ray_job(options: KubeRayBackend, draft: Manifest, namespace: Namespace) -> None:
    """Look at a RayJob and at the cluster that is to run it.

    Args:
        options: The backend's.
        draft: The RayJob, of whatever entrypoint.
        namespace: Where it is to be created.

    Raises:
        ConfigError: KubeRay would refuse it, or does not know a field of it.
        ClusterError: The cluster cannot be reached, has no KubeRay, or refuses.
    """
    if refused := problems(draft):
        raise ConfigError("KubeRayBackend", tuple(map(_refused, refused)))
    schema = namespace.definition(RAY_JOB)
    if schema is not None and (unknown := unknown_field_problems(draft, schema)):
        raise ConfigError("KubeRayBackend", unknown)
    if options.cluster is not None and namespace.get(RAY_CLUSTER, options.cluster) is None:
        raise ClusterError(
            explain(
                f"There is no RayCluster {options.cluster!r} in the namespace {namespace.name!r}.",
                "KubeRayBackend(cluster=...) names one that is there already.",
                f"See which there are: kubectl -n {namespace.name} get rayclusters. Without cluster=... a new one is "
                "made.",
            )
        )


def check_pytorch_job(draft: Manifest, namespace: Namespace) -> None:
    """Look at a PyTorchJob and at the cluster that is to run it.

    Args:
        draft: The PyTorchJob, of whatever command.
        namespace: Where it is to be created.

    Raises:
        ConfigError: The cluster's definition does not know a field of it.
        ClusterError: The cluster cannot be reached, has no training operator, or refuses.
    """
    schema = namespace.definition(PYTORCH_JOB)
    unknown = () if schema is None else unknown_fields(draft, schema)
    if unknown:
        raise ConfigError(
            "KubeflowBackend",
            tuple(
                explain(
                    f"{path}: this cluster's PyTorchJob does not have it.",
                    "Its training operator's definition has no such field, so the API server would drop it.",
                    "Check the spelling, or leave it out; a newer training operator may know it.",
                )
                for path in unknown
            ),
        )


def _refused(problem: str) -> str:
    """A rule's sentence, which names the field, what is wrong and the way out, as what, why and fix."""
    field, _, rest = problem.partition(": ")
    why, _, fix = rest.rpartition("; ")
    return explain(f"KubeRay would refuse {field}.", f"{field} {why}.", f"{fix[:1].upper()}{fix[1:]}.")
