"""KubeRay without Flyte on a real API server: how the status of a RayJob is read, and what becomes of the run.

Nobody acts on the RayJobs here: each test writes the status that KubeRay would write.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doubles.api import Api, Document, now
from doubles.front import Front
from explained import assert_explained

from kfpytorch_ray import (
    Elastic,
    KubeRayBackend,
    RunLostError,
    RunPendingError,
    RunStatus,
    RunStoppedError,
    attach,
    launch,
)
from kfpytorch_ray.cluster.kube import waiting as patience
from kfpytorch_ray.cluster.remote.outcome import Record, write_outcome
from kfpytorch_ray.errors import ClusterError, PlacementTimeoutError
from kfpytorch_ray.run import Run
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import wait_until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("no_operator"),
    # The control plane of tests has no certificate that anybody has signed.
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]


def train(x: int) -> int:
    return x


def started(backend: KubeRayBackend, nnodes: int | str = 2) -> Run:
    return launch(train, 1, elastic=Elastic(nnodes, backend=backend), wait=False)


def write_status(api: Api, namespace: str, run: Run, **status: Any) -> None:
    assert api.patch("rayjobs", namespace, f"{run.run_id}/status", {"status": status})


def job_of(api: Api, namespace: str) -> Document:
    (found,) = api.find("rayjobs", namespace)
    return found


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"jobDeploymentStatus": "Initializing"}, RunStatus.PENDING),
        ({"jobDeploymentStatus": "Retrying"}, RunStatus.PENDING),
        ({"jobDeploymentStatus": "Suspended"}, RunStatus.PENDING),
        ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, RunStatus.RUNNING),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, RunStatus.LOST),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, RunStatus.STOPPED),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}, RunStatus.LOST),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "name"}, RunStatus.LOST),
    ],
)
def test_every_status_is_read(
    api: Api, namespace: str, backend: KubeRayBackend, status: Document, expected: RunStatus
) -> None:
    """As KubeRay means it; what is over without an outcome in the storage is lost."""
    run = started(backend)
    assert run.status() is RunStatus.PENDING
    write_status(api, namespace, run, **status)
    assert run.status() is expected


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (
            {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "exit 137"},
            RunLostError,
            "AppFailed: exit 137",
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, RunLostError, "DeadlineExceeded"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, RunStoppedError, "was stopped"),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "bad name"}, ClusterError, "refuses.*\n.*bad name"),
    ],
)
def test_every_bad_end_is_an_error_that_says_why(
    api: Api, namespace: str, backend: KubeRayBackend, status: Document, error: type[Exception], words: str
) -> None:
    """Typed, with KubeRay's own reason and message."""
    run = started(backend)
    write_status(api, namespace, run, **status)
    with pytest.raises(error, match=words):
        run.result()
    assert not api.find("rayjobs", namespace)
    with pytest.raises(error, match=words):
        attach(run.run_id, storage=backend.storage, backend=backend).result()


def test_a_job_that_a_queue_holds_is_waited_for(api: Api, namespace: str, backend: KubeRayBackend, capsys: Any) -> None:
    """However long: ``ready_timeout_s`` counts from its admission, not from its creation."""
    run = started(replace(backend, ready_timeout_s=1.0))
    write_status(api, namespace, run, jobDeploymentStatus="Suspended")
    with pytest.raises(RunPendingError):
        run.result(timeout=2.0)
    assert "is suspended: a queue has not admitted it yet" in capsys.readouterr().err
    # Admitted just now, on a machine of whatever speed.
    write_status(api, namespace, run, jobDeploymentStatus="Initializing", startTime="2100-01-01T00:00:00Z")
    assert run.status() is RunStatus.PENDING
    write_status(api, namespace, run, jobDeploymentStatus="Initializing", startTime="2020-01-01T00:00:00Z")
    with pytest.raises(PlacementTimeoutError, match="within 1 s"):
        run.result()


def test_a_job_that_is_tried_again_goes_on(
    api: Api, namespace: str, backend: KubeRayBackend, front: Front, tmp_path: Path
) -> None:
    """After Retrying, where a failure leads that is not final, it runs on another cluster, which has another head."""
    run = started(replace(backend, kubeconfig=front.kubeconfig(tmp_path / "kubeconfig")))
    running = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "startTime": now()}
    taken: list[object] = []
    following = threading.Thread(target=lambda: taken.append(run.result()), daemon=True)
    for cluster in ("first", "second"):
        api.create("pods", namespace, waiting_pod(cluster, f"{cluster}-head"))
    write_status(api, namespace, run, rayClusterName="first", **running)
    following.start()
    wait_until(lambda: front.counted("watch pods") == 1, "the first head to be watched")
    write_status(api, namespace, run, jobDeploymentStatus="Retrying", jobStatus="FAILED", failed=1)
    api.delete("pods", namespace, "first-head", gracePeriodSeconds=0)
    wait_until(lambda: run.status() is RunStatus.PENDING, "the second try")
    write_status(api, namespace, run, rayClusterName="second", **running)
    wait_until(lambda: front.counted("watch pods") == 2, "the second head to be watched")
    assert run.status() is RunStatus.RUNNING
    succeed(Path(str(backend.storage)) / "runs" / run.run_id)
    write_status(api, namespace, run, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", failed=1, succeeded=1)
    following.join(60)
    assert len(taken) == 1
    wait_until(lambda: not api.find("rayjobs", namespace), "the RayJob to go")


def succeed(folder: Path) -> None:
    """Leave what a driver leaves whose one rank returned nothing."""
    write_outcome(Storage(str(folder)), RunStatus.SUCCEEDED, Record(()), (("", 0),))


def test_a_cluster_that_never_gets_ready(api: Api, namespace: str, backend: KubeRayBackend) -> None:
    """After ``ready_timeout_s`` the run ends with what it waited for, and nothing of it is left."""
    run = started(replace(backend, ready_timeout_s=1.0))
    write_status(api, namespace, run, jobDeploymentStatus="Initializing", rayClusterName="c")
    api.create("pods", namespace, waiting_pod("c", "c-head"))
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes fit"}
    assert api.patch("pods", namespace, "c-head/status", {"status": {"phase": "Pending", "conditions": [condition]}})
    with pytest.raises(PlacementTimeoutError, match=r"(?s)within 1 s.*c-head Unschedulable: 0/3 nodes fit") as caught:
        run.result()
    assert_explained(caught.value)
    assert not api.find("rayjobs", namespace)
    with pytest.raises(PlacementTimeoutError, match="within 1 s"):
        attach(run.run_id, storage=backend.storage, backend=backend).result()


def test_an_image_that_cannot_be_pulled(
    api: Api, namespace: str, backend: KubeRayBackend, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is said at once, and the run ends when it stays like that."""
    monkeypatch.setattr(patience, "_PATIENCE_S", 1.0)
    run = started(backend)
    write_status(api, namespace, run, jobDeploymentStatus="Initializing", rayClusterName="c")
    api.create("pods", namespace, waiting_pod("c", "c-head"))
    waiting = {"reason": "ImagePullBackOff", "message": "not found: registry.example/train:1"}
    container = {"name": "ray-head", "ready": False, "restartCount": 0, "image": "i", "imageID": ""}
    stuck = {"phase": "Pending", "containerStatuses": [{**container, "state": {"waiting": waiting}}]}
    assert api.patch("pods", namespace, "c-head/status", {"status": stuck})
    with pytest.raises(ClusterError, match=r"(?s)cannot come up.*ImagePullBackOff: not found") as caught:
        run.result()
    assert_explained(caught.value)
    assert "0 of 1 run; c-head/ray-head ImagePullBackOff" in capsys.readouterr().err
    assert not api.find("rayjobs", namespace)


def test_what_only_an_event_says_is_told(api: Api, namespace: str, backend: KubeRayBackend, capsys: Any) -> None:
    """A RayCluster that KubeRay refuses has no status: its Warning is all there is."""
    run = started(replace(backend, ready_timeout_s=2.0))
    api.event(
        job_of(api, namespace), "RayJob", "InvalidRayClusterSpec", "the worker group is wrong", "rayjob-controller"
    )
    write_status(api, namespace, run, jobDeploymentStatus="Initializing")
    with pytest.raises(PlacementTimeoutError, match="InvalidRayClusterSpec: the worker group is wrong"):
        run.result()


def test_a_run_is_found_again_and_cancelled(api: Api, namespace: str, backend: KubeRayBackend) -> None:
    """By its id, from another process; cancelling twice is as once, and its RayJob is gone."""
    run = started(backend)
    again = attach(run.run_id, storage=backend.storage, backend=KubeRayBackend(kubeconfig=backend.kubeconfig))
    assert again.status() is RunStatus.PENDING
    assert again.cancel() is RunStatus.STOPPED
    assert not api.find("rayjobs", namespace)
    assert again.cancel() is run.status() is RunStatus.STOPPED
    with pytest.raises(RunStoppedError):
        run.result()


def test_a_finalizer_is_waited_for(api: Api, namespace: str, backend: KubeRayBackend) -> None:
    """KubeRay holds a RayJob until its driver is told to stop: cancel returns when it is really gone."""
    run = started(backend)
    name = run.run_id
    assert api.patch("rayjobs", namespace, name, {"metadata": {"finalizers": ["ray.io/rayjob-finalizer"]}})
    states: list[RunStatus] = []
    thread = threading.Thread(target=lambda: states.append(run.cancel()))
    thread.start()
    wait_until(lambda: "deletionTimestamp" in job_of(api, namespace)["metadata"], "the deletion to begin")
    assert not states
    assert api.patch("rayjobs", namespace, name, {"metadata": {"finalizers": None}})
    thread.join(60)
    assert states == [RunStatus.STOPPED]


def waiting_pod(cluster: str, name: str) -> Document:
    labels = {"ray.io/cluster": cluster, "ray.io/node-type": "head"}
    containers = [{"name": "ray-head", "image": "i"}]
    # No node of a test may take it.
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": containers, "schedulerName": f"none-{os.getpid()}"},
    }
