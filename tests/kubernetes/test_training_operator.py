"""The double of the training operator takes PyTorchJobs through their conditions on a real API server."""

from __future__ import annotations

from typing import Any

import pytest
from doubles.api import Api, Document
from doubles.pytorch_pods import JOB_LABEL, defaulted, variables_of
from kubernetes import client

from kfpytorch_ray.testing import wait_until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:Unverified HTTPS request"),
    pytest.mark.usefixtures("training_operator"),
]

JOB = "train"


def replica(script: str, count: int = 1, policy: str = "Never", image: str = "any") -> Document:
    container = {"name": "pytorch", "image": image, "command": ["/bin/sh", "-c", script]}
    spec = {"containers": [container], "terminationGracePeriodSeconds": 1}
    return {"replicas": count, "restartPolicy": policy, "template": {"spec": spec}}


def job(master: Document | None = None, worker: Document | None = None, **spec: Any) -> Document:
    """A PyTorchJob; keywords but ``elasticPolicy`` are of its runPolicy."""
    elastic = {"elasticPolicy": spec.pop("elasticPolicy")} if "elasticPolicy" in spec else {}
    replicas = {kind: one for kind, one in (("Master", master), ("Worker", worker)) if one is not None}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": JOB},
        "spec": {"pytorchReplicaSpecs": replicas, "runPolicy": spec, **elastic},
    }


def conditions(api: Api, namespace: str) -> dict[str, str]:
    """What holds of the job and what does not, oldest first."""
    found = api.get("pytorchjobs", namespace, JOB) or {}
    return {one["type"]: one["status"] for one in (found.get("status") or {}).get("conditions", [])}


def wait_for(api: Api, namespace: str, condition: str) -> Document:
    wait_until(lambda: conditions(api, namespace).get(condition) == "True", f"{condition}, not only what there is")
    found = api.get("pytorchjobs", namespace, JOB)
    assert found is not None
    return {one["type"]: one for one in found["status"]["conditions"]}


def pods(api: Api, namespace: str) -> dict[str, Document]:
    return {one["metadata"]["name"]: one for one in api.find("pods", namespace, f"{JOB_LABEL}={JOB}")}


def uids(api: Api, namespace: str) -> set[str]:
    return {one["metadata"]["uid"] for one in pods(api, namespace).values()}


def log(connection: client.ApiClient, namespace: str, pod: str) -> list[str]:
    text = str(client.CoreV1Api(connection).read_namespaced_pod_log(pod, namespace, container="pytorch"))
    return text.splitlines()


def test_replicas_find_each_other_by_their_services(connection: client.ApiClient, api: Api, namespace: str) -> None:
    """Pods and Services with labels, and the variables of a plain job; the master's end is the job's."""
    said = "echo $MASTER_ADDR:$MASTER_PORT $RANK $WORLD_SIZE $PET_NNODES"
    # The worker begins when it knows the master's name, and the master ends when it knows the worker's.
    master = replica(f"{said}; until getent hosts train-worker-0; do sleep 0.1; done")
    worker = replica(f"{said}; exec sleep 60")
    api.create("pytorchjobs", namespace, job(master, worker))
    wait_for(api, namespace, "Succeeded")
    assert conditions(api, namespace)["Running"] == "False"
    for rank, name in enumerate(("train-master-0", "train-worker-0")):
        # What a container says takes a moment to its log.
        wait_until(lambda name=name: log(connection, namespace, name), f"the log of {name}")
        assert log(connection, namespace, name)[0] == f"train-master-0:23456 {rank} 2 2"
    labels = pods(api, namespace)["train-master-0"]["metadata"]["labels"]
    assert labels == {
        "training.kubeflow.org/operator-name": "pytorchjob-controller",
        "training.kubeflow.org/job-name": JOB,
        "training.kubeflow.org/replica-type": "master",
        "training.kubeflow.org/replica-index": "0",
        "training.kubeflow.org/job-role": "master",
    }
    assert len(api.find("services", namespace, f"{JOB_LABEL}={JOB}")) == 2


def test_an_elastic_job_is_done_with_its_first_pod(api: Api, namespace: str) -> None:
    """Whichever succeeds first; what still runs goes with cleanPodPolicy Running, and its Service."""
    worker = replica('test "$(hostname)" = train-worker-1 || exec sleep 60', count=2)
    api.create("pytorchjobs", namespace, job(None, worker, elasticPolicy={}, cleanPodPolicy="Running"))
    wait_for(api, namespace, "Succeeded")
    wait_until(lambda: set(pods(api, namespace)) == {"train-worker-1"}, "the other one to go")
    left = {"train-worker-1"}
    wait_until(
        lambda: {one["metadata"]["name"] for one in api.find("services", namespace)} == left, "the Service to go"
    )


def test_variables_of_an_elastic_job() -> None:
    """Where torchrun reads them: the rendezvous at the first worker, the range, and no rank."""
    policy = {"minReplicas": 1, "maxReplicas": 2, "nProcPerNode": 4, "maxRestarts": 3, "rdzvBackend": "c10d"}
    found = variables_of(defaulted(job(None, replica("true", 2), elasticPolicy=policy)), "Worker", 1)
    assert found == {
        "PYTHONUNBUFFERED": "1",
        "PET_RDZV_ENDPOINT": "train-worker-0:23456",
        "PET_RDZV_BACKEND": "c10d",
        "PET_NNODES": "1:2",
        "PET_MAX_RESTARTS": "3",
        "PET_NPROC_PER_NODE": "4",
    }


def test_a_failed_replica_fails_the_job(api: Api, namespace: str) -> None:
    """With restartPolicy Never: its Pods stay, and it is removed when its time to live has passed."""
    api.create("pytorchjobs", namespace, job(None, replica("exit 3")))
    failed = wait_for(api, namespace, "Failed")["Failed"]
    assert failed["message"] == "PyTorchJob train is failed because 1 Worker replica(s) failed."
    assert set(pods(api, namespace)) == {"train-worker-0"}
    # Not before: it would be over while somebody still looks.
    assert api.patch("pytorchjobs", namespace, JOB, {"spec": {"runPolicy": {"ttlSecondsAfterFinished": 2}}})
    wait_until(lambda: api.get("pytorchjobs", namespace, JOB) is None, "the job to be removed")


@pytest.mark.parametrize(("code", "condition"), [(137, "Restarting"), (1, "Failed")])
def test_an_exit_code_decides_who_is_made_again(api: Api, namespace: str, code: int, condition: str) -> None:
    """ExitCode: a signal's is tried again with another Pod, any other one fails the job."""
    api.create("pytorchjobs", namespace, job(replica(f"exit {code}", policy="ExitCode")))
    seen: set[str] = set()

    def pods_so_far() -> int:
        seen.update(uids(api, namespace))
        return len(seen)

    wait_until(pods_so_far, "the Pod")
    wait_for(api, namespace, condition)
    if condition == "Restarting":
        wait_until(lambda: pods_so_far() > 1, "another Pod")


def test_a_container_that_fails_again_and_again_reaches_the_limit(api: Api, namespace: str) -> None:
    """OnFailure: the kubelet starts it again, backoffLimit counts that, and the Pods go."""
    api.create("pytorchjobs", namespace, job(replica("exit 1", policy="OnFailure"), backoffLimit=1))
    assert "backoff limit" in wait_for(api, namespace, "Failed")["Failed"]["message"]
    wait_until(lambda: not pods(api, namespace), "the Pod to go")


def test_a_job_that_is_active_for_too_long(api: Api, namespace: str) -> None:
    """It fails, and its Pods go whatever cleanPodPolicy says."""
    api.create("pytorchjobs", namespace, job(replica("sleep 60"), activeDeadlineSeconds=1))
    assert "active longer than specified deadline" in wait_for(api, namespace, "Failed")["Failed"]["message"]
    wait_until(lambda: not pods(api, namespace), "the Pod to go")


def test_a_job_that_is_suspended_has_no_pods(api: Api, namespace: str) -> None:
    """Held back, let go and held back again; deleted in the foreground it is gone after all that it owns."""
    api.create("pytorchjobs", namespace, job(replica("sleep 60"), suspend=True))
    wait_for(api, namespace, "Suspended")
    assert not pods(api, namespace)
    for suspend in (False, True, False):
        assert api.patch("pytorchjobs", namespace, JOB, {"spec": {"runPolicy": {"suspend": suspend}}})
        wait_for(api, namespace, "Suspended" if suspend else "Running")
        assert conditions(api, namespace)["Running"] == str(not suspend)
        # One that is let go while its Pods are still ending fails: they count as failed.
        wait_until(lambda suspend=suspend: not (suspend and pods(api, namespace)), "the Pod to go")
    api.delete("pytorchjobs", namespace, JOB, propagationPolicy="Foreground")
    wait_until(lambda: api.get("pytorchjobs", namespace, JOB) is None, "the job to go")
    assert not any(api.find(kind, namespace, f"{JOB_LABEL}={JOB}") for kind in ("pods", "services"))
