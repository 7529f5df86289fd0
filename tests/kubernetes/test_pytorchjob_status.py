"""PyTorchJobs without Flyte on a real API server: what is created, what every refusal says, how a status is read.

Nobody acts on the PyTorchJobs here: each test writes the status that the training operator would write.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blocks import rules
from doubles.api import Api, Document, now
from doubles.front import Asked, Front
from explained import assert_explained
from flytekit import PodTemplate, Resources, task
from kubernetes.client import V1Container, V1PodSpec, V1ResourceRequirements

from kfpytorch_ray import (
    CleanPodPolicy,
    ConfigError,
    Elastic,
    KubeflowBackend,
    RunLostError,
    RunPendingError,
    RunPolicy,
    RunStatus,
    attach,
    launch,
)
from kfpytorch_ray.errors import AuthenticationError, ClusterError, PlacementTimeoutError
from kfpytorch_ray.run import Run

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("no_training_operator"),
    # The control plane of tests has no certificate that anybody has signed.
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]


@pytest.fixture
def backend(control_plane: Path, namespace: str, tmp_path: Path) -> KubeflowBackend:
    """Where tests create PyTorchJobs that nobody runs; no folder is sent."""
    return KubeflowBackend(
        image="registry.example/train:1",
        namespace=namespace,
        kubeconfig=str(control_plane),
        storage=str(tmp_path / "storage"),
        working_dir="",
        reconnect_timeout_s=5.0,
    )


def train(x: int) -> int:
    return x


def started(backend: KubeflowBackend, **config: Any) -> Run:
    return launch(train, 1, elastic=Elastic(2, backend=backend, **config), wait=False)


def job_of(api: Api, namespace: str) -> Document:
    (found,) = api.find("pytorchjobs", namespace)
    return found


def nothing_is_created(api: Api, namespace: str, backend: KubeflowBackend) -> bool:
    """Neither a PyTorchJob nor a run's folder."""
    return not api.find("pytorchjobs", namespace) and not list(Path(str(backend.storage)).glob("runs/*"))


def write_conditions(api: Api, namespace: str, run: Run, *conditions: str, message: str = "so", **status: Any) -> None:
    """Have these hold, the last one since just now; one with a ``-`` before it does not hold any more."""
    written = [
        {"type": one.lstrip("-"), "status": str(not one.startswith("-")), "message": message, "lastUpdateTime": now()}
        for one in conditions
    ]
    body = {"status": {"conditions": written, **status}}
    assert api.patch("pytorchjobs", namespace, f"{run.run_id}/status", body)


def test_what_is_created_is_what_is_rendered(api: Api, namespace: str, backend: KubeflowBackend) -> None:
    """The API server keeps every field, and options and policies are where they belong."""
    mine = replace(
        backend,
        requests=Resources(cpu="2", mem="3Gi", gpu="1"),
        labels={"kueue.x-k8s.io/queue-name": "team"},
        service_account="robot",
        spec={"runPolicy": {"schedulingPolicy": {"queue": "team"}}},
    )
    policy = RunPolicy(CleanPodPolicy.RUNNING, ttl_seconds_after_finished=60, backoff_limit=2)
    run = started(mine, run_policy=policy, max_restarts=1)
    job = job_of(api, namespace)
    assert job["metadata"]["name"] == run.run_id
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    spec = job["spec"]
    assert spec["elasticPolicy"]["maxRestarts"] == 1
    assert spec["runPolicy"]["schedulingPolicy"] == {"queue": "team"}
    assert spec["runPolicy"]["cleanPodPolicy"] == "Running"
    pod = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    assert pod["serviceAccountName"] == "robot"
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "2", "memory": "3Gi", "nvidia.com/gpu": "1"}


def unknown_field(backend: KubeflowBackend) -> KubeflowBackend:
    return replace(backend, spec={"runPolicy": {"colour": "red"}})


def wrong_type(backend: KubeflowBackend) -> KubeflowBackend:
    return replace(backend, spec={"runPolicy": {"backoffLimit": "many"}})


def no_namespace(backend: KubeflowBackend) -> KubeflowBackend:
    return replace(backend, namespace="nowhere")


def no_image(backend: KubeflowBackend) -> KubeflowBackend:
    return replace(backend, image=None)


def wrong_context(backend: KubeflowBackend) -> KubeflowBackend:
    return replace(backend, context="elsewhere")


def no_kubeconfig(backend: KubeflowBackend) -> KubeflowBackend:
    return replace(backend, kubeconfig="/nowhere/config")


def too_long_a_label(backend: KubeflowBackend) -> KubeflowBackend:
    return replace(backend, labels={"team": "x" * 64})


def more_gpus_than_asked(backend: KubeflowBackend) -> KubeflowBackend:
    container = {"name": "pytorch", "resources": {"limits": {"nvidia.com/gpu": "8"}}}
    worker = {"template": {"spec": {"containers": [container]}}}
    return replace(backend, requests=Resources(gpu="1"), spec={"pytorchReplicaSpecs": {"Worker": worker}})


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (unknown_field, ConfigError, "spec.runPolicy.colour: this cluster's PyTorchJob does not have it"),
        (wrong_type, ClusterError, r"not valid there \(422\)"),
        (no_namespace, ClusterError, "no namespace 'nowhere'"),
        (no_image, ConfigError, r"(?s)no image is named.*KubeflowBackend\(image="),
        (wrong_context, ConfigError, "context='elsewhere'"),
        (no_kubeconfig, ConfigError, "kubeconfig='/nowhere/config'"),
        (too_long_a_label, ClusterError, r"not valid there \(422\)"),
        (more_gpus_than_asked, ConfigError, "spec.* gives resources to the container 'pytorch'"),
    ],
)
def test_every_refusal_is_typed_and_leaves_nothing(
    api: Api,
    namespace: str,
    backend: KubeflowBackend,
    spoil: Callable[[KubeflowBackend], KubeflowBackend],
    error: type[Exception],
    words: str,
) -> None:
    """What, why and how to fix it; neither a PyTorchJob nor a folder is left."""
    with pytest.raises(error, match=words) as caught:
        started(spoil(backend))
    assert_explained(caught.value)
    assert nothing_is_created(api, namespace, backend)


@pytest.mark.parametrize("definitions", ["seen", "not seen"])
def test_a_cluster_without_the_operator(
    api: Api, namespace: str, backend: KubeflowBackend, front: Front, tmp_path: Path, definitions: str
) -> None:
    """The answers of the server for a group that it does not know, whether or not this user may see definitions."""

    def elsewhere(asked: Asked) -> Asked | int:
        if asked.resource == "customresourcedefinitions" and definitions == "not seen":
            return 403
        return replace(asked, path=asked.path.replace("kubeflow.org", "absent.example"))

    front.change = elsewhere
    there = replace(backend, kubeconfig=front.kubeconfig(tmp_path / "kubeconfig"))
    words = r"(?s)knows no PyTorchJob.*pytorchjobs\.kubeflow\.org is missing.*Fix: Install Kubeflow's training operator"
    with pytest.raises(ClusterError, match=words):
        started(there)
    assert nothing_is_created(api, namespace, backend)


def test_a_pod_template_with_more_gpus_than_are_asked_for(api: Api, namespace: str, backend: KubeflowBackend) -> None:
    """Nothing is created of a pod template that the task's own resources would contradict."""
    resources = V1ResourceRequirements(limits={"nvidia.com/gpu": "8"})
    containers = [V1Container(name="primary", resources=resources)]
    template = PodTemplate(pod_spec=V1PodSpec(containers=containers))
    config = Elastic(2, increase_shared_mem=False, backend=backend)
    with pytest.raises(ConfigError, match="gives resources to the primary container") as caught:
        task(task_config=config, pod_template=template, requests=Resources(gpu="1"))(train)(x=1)
    assert_explained(caught.value)
    assert nothing_is_created(api, namespace, backend)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ((), RunStatus.PENDING),
        (("Created",), RunStatus.PENDING),
        (("Created", "Running"), RunStatus.RUNNING),
        (("Created", "Restarting"), RunStatus.RUNNING),
        (("Created", "-Running", "Suspended"), RunStatus.PENDING),
        (("Created", "-Suspended", "Running"), RunStatus.RUNNING),
        (("Created", "-Running", "Succeeded"), RunStatus.LOST),
        (("Created", "-Running", "Failed"), RunStatus.LOST),
    ],
)
def test_every_condition_is_read(
    api: Api, namespace: str, backend: KubeflowBackend, conditions: tuple[str, ...], expected: RunStatus
) -> None:
    """The last one that holds counts; what is over without an outcome in the storage is lost."""
    run = started(backend)
    write_conditions(api, namespace, run, *conditions)
    assert run.status() is expected


@pytest.mark.parametrize(("nnodes", "expected"), [(2, RunStatus.LOST), ("1:2", RunStatus.RUNNING)])
def test_a_pod_that_will_never_come_up(
    api: Api, namespace: str, backend: KubeflowBackend, nnodes: int | str, expected: RunStatus
) -> None:
    """It ends a run that needs it, and not one that trains with fewer."""
    run = launch(train, 1, elastic=Elastic(nnodes, backend=backend), wait=False)
    write_conditions(api, namespace, run, "Created", "Running")
    waiting = {"state": {"waiting": {"reason": "InvalidImageName"}}, "name": "c", "image": "i", "imageID": ""}
    stuck = {"phase": "Pending", "containerStatuses": [{**waiting, "ready": False, "restartCount": 0}]}
    for index, status in enumerate(({"phase": "Running"}, stuck)):
        name = f"{run.run_id}-worker-{index}"
        meta = {"name": name, "labels": {"training.kubeflow.org/job-name": run.run_id}}
        # No scheduler takes it.
        spec = {"containers": [{"name": "c", "image": "i"}], "schedulerName": "none"}
        api.create("pods", namespace, {"metadata": meta, "spec": spec})
        assert api.patch("pods", namespace, f"{name}/status", {"status": status})
    assert run.status() is expected


def test_a_job_that_has_failed_without_a_word(api: Api, namespace: str, backend: KubeflowBackend) -> None:
    """The operator's message is the error's, here and for whoever asks later; the job is gone."""
    run = started(backend)
    write_conditions(api, namespace, run, "Failed", message="2 Worker replica(s) failed.")
    with pytest.raises(RunLostError, match=r"Failed: 2 Worker replica\(s\) failed"):
        run.result()
    assert not api.find("pytorchjobs", namespace)
    with pytest.raises(RunLostError, match=r"2 Worker replica\(s\) failed"):
        attach(run.run_id, storage=backend.storage, backend=backend).result()


def test_a_job_that_a_queue_holds_is_waited_for(
    api: Api, namespace: str, backend: KubeflowBackend, capsys: Any
) -> None:
    """However long: ``ready_timeout_s`` counts from its admission, not from its creation."""
    run = started(replace(backend, ready_timeout_s=1.0))
    write_conditions(api, namespace, run, "Created", "Suspended")
    with pytest.raises(RunPendingError):
        run.result(timeout=2.0)
    assert "is suspended: a queue has not admitted it yet" in capsys.readouterr().err
    # Admitted just now, on a machine of whatever speed.
    write_conditions(api, namespace, run, "Created", "-Suspended", startTime="2100-01-01T00:00:00Z")
    assert run.status() is RunStatus.PENDING
    write_conditions(api, namespace, run, "Created", "-Suspended", startTime="2020-01-01T00:00:00Z")
    with pytest.raises(PlacementTimeoutError, match="within 1 s") as caught:
        run.result()
    assert_explained(caught.value)
    assert not api.find("pytorchjobs", namespace)


def test_a_job_that_somebody_deletes_is_lost(api: Api, namespace: str, backend: KubeflowBackend) -> None:
    """Nobody will say any more how it ended."""
    run = started(backend)
    assert run.status() is RunStatus.PENDING
    api.delete("pytorchjobs", namespace, run.run_id)
    assert run.status() is RunStatus.LOST
    with pytest.raises(RunLostError, match="does not know it any more"):
        run.result()


def test_rights_that_are_missing_are_named(
    api: Api, namespace: str, backend: KubeflowBackend, stranger: str, allow: Callable[..., None]
) -> None:
    """Real RBAC's 403 names the rule for PyTorchJobs; with the Role of docs/operations.md a run needs no more."""
    there = replace(backend, kubeconfig=stranger)
    with pytest.raises(AuthenticationError, match=r"(?s)\(403\).*create and delete on pytorchjobs\.kubeflow\.org,"):
        started(there)
    assert nothing_is_created(api, namespace, backend)
    allow(*rules("Role"))
    run = started(there)
    assert run.status() is RunStatus.PENDING
    assert run.cancel() is RunStatus.STOPPED
