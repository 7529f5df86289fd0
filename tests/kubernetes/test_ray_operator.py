"""The double of KubeRay's operator takes RayJobs through their states, with a real Ray, on a real API server."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from doubles.api import Api, Document
from doubles.node import Node
from doubles.operator import KubeRayOperator

from kfpytorch_ray.testing import wait_until

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore:Unverified HTTPS request")]

LONG_S = 400.0
"""For Ray to start on a machine that is busy."""
WORK = """
import ray, socket
ray.init()
where = ray.get(ray.remote(num_cpus=2)(lambda: (socket.gethostname(), 6 * 7)).remote())
print("the answer of", *where, flush=True)
"""


def ray_job(name: str, entrypoint: str = "true", *, workers: int = 1, **spec: Any) -> Document:
    """A RayJob with a head without CPUs, and workers with two."""
    head = {"name": "ray-head", "image": "any", "resources": {"limits": {"cpu": "1", "memory": "2Gi"}}}
    worker = {"name": "ray-worker", "image": "any", "resources": {"limits": {"cpu": "2", "memory": "2Gi"}}}
    group = {"groupName": "workers", "replicas": workers, "minReplicas": workers, "maxReplicas": 2}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": {"team": "a"}},
        "spec": {
            "entrypoint": entrypoint,
            "rayClusterSpec": {
                "rayVersion": "2.60.0",
                "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": {"spec": {"containers": [head]}}},
                "workerGroupSpecs": [
                    {
                        **group,
                        "rayStartParams": {},
                        "template": {"spec": {"containers": [worker], "restartPolicy": "Never"}},
                    },
                ],
            },
            **spec,
        },
    }


def python(script: str) -> str:
    """An entrypoint, which ends up with one shell: what the submitter's takes away, ``ray job submit`` puts back."""
    return shlex.join(["python", "-c", script])


def status(api: Api, namespace: str, name: str) -> Document:
    found = api.get("rayjobs", namespace, name) or {}
    return found.get("status") or {}


def wait_for(api: Api, namespace: str, name: str, *states: str) -> Document:
    """Wait until a RayJob is in one of these states."""
    wait_until(
        lambda: status(api, namespace, name).get("jobDeploymentStatus", "") in states,
        f"RayJob {name} to be {states}",
        LONG_S,
    )
    return status(api, namespace, name)


def test_workers_come_when_they_are_asked_for_and_a_failure_is_told(
    api: Api, namespace: str, node: Node, operator: KubeRayOperator
) -> None:
    """Submitted over HTTP with no worker: autoscaling brings one, a lost one is replaced, exit code 3 is AppFailed."""
    script = WORK + "import os, time\nwhile not os.path.exists('/tmp/go'): time.sleep(0.1)\nraise SystemExit(3)"
    job = ray_job("grows", python(script), workers=0, submissionMode="HTTPMode", shutdownAfterJobFinishes=True)
    job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] = True
    api.create("rayjobs", namespace, job)

    def workers() -> list[str]:
        found = api.find("pods", namespace, "ray.io/node-type=worker")
        return [pod["metadata"]["name"] for pod in found if pod["status"].get("phase") == "Running"]

    wait_until(workers, "a worker", LONG_S)
    (lost,) = workers()
    node.kill_container(namespace, lost)
    wait_until(lambda: workers() and lost not in workers(), "another worker", LONG_S)
    head = api.find("pods", namespace, "ray.io/node-type=head")[0]["metadata"]["name"]
    for process in node.processes(namespace, head):
        open(f"/proc/{process}/root/tmp/go", "w", encoding="utf-8").close()
    ended = wait_for(api, namespace, "grows", "Complete", "Failed")
    assert (ended["jobStatus"], ended["reason"]) == ("FAILED", "AppFailed")
    assert "exit code 3" in ended["message"]
    assert not api.find("jobs", namespace)
    wait_until(lambda: not api.find("pods", namespace), "the RayCluster's Pods to go", LONG_S)
    assert api.get("rayjobs", namespace, "grows") is not None


@pytest.mark.parametrize(
    ("steps", "last"),
    [
        (
            [{"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "exit code 1"}],
            "Failed",
        ),
        ([{"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}], "Complete"),
        (
            [
                {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
                {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED", "failed": 1},
                {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "failed": 1, "succeeded": 1},
            ],
            "Complete",
        ),
    ],
    ids=["app-failed", "stopped", "retrying"],
)
def test_a_script_is_played(
    steps: list[Document], last: str, api: Api, namespace: str, operator: KubeRayOperator
) -> None:
    """A RayJob gets the states of its script one after the other, and nothing is made for it."""
    passed = [False]
    operator.script("scripted", [{"jobDeploymentStatus": "Initializing"}, lambda: passed[0], *steps])
    api.create("rayjobs", namespace, ray_job("scripted"))
    wait_for(api, namespace, "scripted", "Initializing")
    passed[0] = True
    found = wait_for(api, namespace, "scripted", last)
    assert steps[-1].items() <= found.items()
    assert not api.find("rayclusters", namespace)
    api.delete("rayjobs", namespace, "scripted")
    wait_until(lambda: not api.find("rayjobs", namespace), "the RayJob to go")


def test_a_ray_job_that_is_not_valid_is_refused(api: Api, namespace: str, operator: KubeRayOperator) -> None:
    """ValidationFailed, with the message and a Warning Event."""
    operator.problems["bad"] = "shutdownAfterJobFinishes must be set"
    api.create("rayjobs", namespace, ray_job("bad"))
    found = wait_for(api, namespace, "bad", "ValidationFailed")
    assert found["message"].endswith("shutdownAfterJobFinishes must be set")
    assert "InvalidRayJobSpec" in {event["reason"] for event in api.find("events", namespace)}


def test_a_ray_cluster_that_is_not_valid_gets_an_event_only(
    api: Api, namespace: str, operator: KubeRayOperator
) -> None:
    """Its status stays empty, and the RayJob waits."""
    operator.cluster_problems["odd-"] = "min above max"
    api.create("rayjobs", namespace, ray_job("odd"))
    wait_until(
        lambda: "InvalidRayClusterSpec" in {event["reason"] for event in api.find("events", namespace)}, "the Event"
    )
    assert status(api, namespace, "odd")["jobDeploymentStatus"] == "Initializing"
    assert not api.find("rayclusters", namespace)[0].get("status")


def test_a_suspended_ray_job_has_nothing(api: Api, namespace: str, operator: KubeRayOperator) -> None:
    """Suspended without Pods; released, it begins."""
    api.create("rayjobs", namespace, ray_job("held", suspend=True, shutdownAfterJobFinishes=True))
    wait_for(api, namespace, "held", "Suspended")
    assert not api.find("rayclusters", namespace)
    api.patch("rayjobs", namespace, "held", {"spec": {"suspend": False}})
    wait_for(api, namespace, "held", "Initializing")
    wait_until(lambda: api.find("rayclusters", namespace), "the RayCluster")


def test_a_ray_job_over_its_deadline_fails(api: Api, namespace: str, operator: KubeRayOperator) -> None:
    """DeadlineExceeded while its Pods do not fit, and no second try."""
    job = ray_job("late", activeDeadlineSeconds=2, backoffLimit=3)
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["nodeSelector"] = {"no": "where"}
    api.create("rayjobs", namespace, job)
    found = wait_for(api, namespace, "late", "Failed")
    assert found["reason"] == "DeadlineExceeded"
    assert found["failed"] == 1
