"""The command that a RayJob submits: our driver, and where it finds what it is to do. Pure."""

from __future__ import annotations

import shlex

from kfpytorch_ray.storage import Digest

DRIVER = "kfpytorch_ray.cluster.kube.driver"


def entrypoint(run_id: str, folder: str, request_sha256: str, code: Digest | None) -> str:
    """A shell command. KubeRay has it read by one shell or two; nothing in it means something to either.

    Args:
        run_id: Of the run.
        folder: URI of its folder.
        request_sha256: Of the request in it.
        code: Of the user's modules in it; None where there are none.
    """
    packed = [] if code is None else [f"{code.sha256}:{code.size_bytes}"]
    return shlex.join(["python", "-m", DRIVER, run_id, f"{folder}#{request_sha256}", *packed])
