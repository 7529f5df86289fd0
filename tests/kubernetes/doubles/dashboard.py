"""What KubeRay's operator asks a Ray head, over HTTP and of its GCS."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from doubles.api import Document
from doubles.rendering import runtime_env

_TIMEOUT_S = 10.0


def job_info(address: str, job_id: str) -> Document | None:
    """What the job server knows about a job; None if it does not know it.

    Raises:
        OSError: It does not answer.
    """
    try:
        return _request(f"http://{address}/api/jobs/{job_id}")
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return None


def submit(address: str, job: Document) -> None:
    """Submit a RayJob's entrypoint.

    Raises:
        OSError: The job server does not answer, or refuses.
    """
    spec = job["spec"]
    body = {
        "entrypoint": spec["entrypoint"],
        "submission_id": job["status"]["jobId"],
        "runtime_env": runtime_env(job),
        "metadata": spec.get("metadata", {}),
        "entrypoint_num_cpus": spec.get("entrypointNumCpus", 0),
        "entrypoint_num_gpus": spec.get("entrypointNumGpus", 0),
    }
    _request(f"http://{address}/api/jobs/", body)


def stop(address: str, job_id: str) -> None:
    """Have a job stopped.

    Raises:
        OSError: The job server does not answer, or does not know it.
    """
    _request(f"http://{address}/api/jobs/{job_id}/stop", {})


def has_demand(gcs_address: str) -> bool:
    """Whether tasks, actors or placement groups wait for resources, as an autoscaler would see it."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    demands = get_cluster_status(gcs_address).resource_demands
    return bool(demands.ray_task_actor_demand or demands.placement_group_demand)


def _request(url: str, body: dict[str, Any] | None = None) -> Document:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        read: Document = json.load(answer)
        return read
