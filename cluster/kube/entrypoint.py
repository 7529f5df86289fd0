"""The command of a run's process on Kubernetes: which module, and where it finds what it is to do. Pure."""

from __future__ import annotations

import shlex

from kfpytorch_ray.storage import Digest

DRIVER = "kfpytorch_ray.cluster.kube.driver"
"""Of a RayJob."""

POD = "kfpytorch_ray.cluster.kube.pytorch_pod"
"""Of a PyTorchJob."""


def command(module: str, run_id: str, folder: str, request_sha256: str, code: Digest | None) -> tuple[str, ...]:
    """The words of a command.

    Args:
        module: That runs.
        run_id: Of the run.
        folder: URI of its folder.
        request_sha256: Of the request in it.
        code: Of the user's modules in it; None where there are none.
    """
    packed = [] if code is None else [f"{code.sha256}:{code.size_bytes}"]
    return ("python", "-m", module, run_id, f"{folder}#{request_sha256}", *packed)


def entrypoint(run_id: str, folder: str, request_sha256: str, code: Digest | None) -> str:
    """The command of a RayJob. KubeRay has it read by one shell or two; nothing in it means something to either.

    Args:
        run_id: As in ``command``.
        folder: As in ``command``.
        request_sha256: As in ``command``.
        code: As in ``command``.
    """
    return shlex.join(command(DRIVER, run_id, folder, request_sha256, code))
