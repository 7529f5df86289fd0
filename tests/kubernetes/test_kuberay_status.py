"""KubeRay without Flyte on a real API server: what is created, how its status is read, what every refusal says.

Nobody acts on the RayJobs here: each test writes the status that KubeRay would write.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from doubles.api import Api, Document
from flytekit import PodTemplate, Resources
from kubernetes.client import V1Container, V1PodSpec, V1Toleration

from kfpytorch_ray import (
    ConfigError,
    Elastic,
    KubeRayBackend,
    RunLostError,
    RunStatus,
    RunStoppedError,
    attach,
    launch,
)
from kfpytorch_ray.cluster.kube import kuberay_job
from kfpytorch_ray.errors import AuthenticationError, ClusterError, ClusterUnreachableError, PlacementTimeoutError
from kfpytorch_ray.run import Run
from kfpytorch_ray.testing import wait_until

pytestmark = [
    pytest.mark.timeout(300),
    # The control plane of tests has no certificate that anybody has signed.
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]


def train(x: int) -> int:
    return x


@pytest.fixture(autouse=True)
def no_flyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is on a user's machine."""
    for variable in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "FLYTE_INTERNAL_EXECUTION_ID", "KUBECONFIG"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def backend(control_plane: Path, namespace: str, tmp_path: Path) -> KubeRayBackend:
    """Where the tests' RayJobs are created; no folder is sent."""
    return KubeRayBackend(
        image="registry.example/train:1",
        namespace=namespace,
        kubeconfig=str(control_plane),
        storage=str(tmp_path / "storage"),
        working_dir="",
        reconnect_timeout_s=5.0,
    )


def changed(backend: KubeRayBackend, **options: Any) -> KubeRayBackend:
    return KubeRayBackend(**{**vars(backend), **options})


def started(backend: KubeRayBackend, nnodes: int | str = 2) -> Run:
    return launch(train, 1, elastic=Elastic(nnodes, backend=backend), wait=False)


def write_status(api: Api, namespace: str, run: Run, **status: Any) -> None:
    assert api.patch("rayjobs", namespace, f"{run.run_id}/status", {"status": status})


def job_of(api: Api, namespace: str) -> Document:
    (found,) = api.find("rayjobs", namespace)
    return found


@contextlib.contextmanager
def nothing_is_created(api: Api, namespace: str, backend: KubeRayBackend) -> Iterator[None]:
    """Neither a RayJob nor a run's folder is left when the block ends."""
    yield
    assert not api.find("rayjobs", namespace)
    assert not list(Path(str(backend.storage)).glob("runs/*"))


def test_what_is_created_is_what_is_rendered(api: Api, namespace: str, backend: KubeRayBackend) -> None:
    """The API server keeps every field: nothing was pruned, and options and templates are where they belong."""
    worker = PodTemplate(
        pod_spec=V1PodSpec(
            containers=[V1Container(name="primary")],
            node_selector={"pool": "gpu"},
            tolerations=[V1Toleration(key="gpu", operator="Exists")],
        )
    )
    mine = changed(
        backend,
        requests=Resources(cpu="2", mem="3Gi", gpu="1"),
        labels={"kueue.x-k8s.io/queue-name": "team"},
        annotations={"note": "x"},
        service_account="robot",
        worker_pod_template=worker,
        spec={"rayClusterSpec": {"autoscalerOptions": {"version": "v2"}}},
    )
    run = started(mine, "2:3")
    job = job_of(api, namespace)
    assert job["metadata"]["name"] == run.run_id
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["metadata"]["annotations"] == {"note": "x"}
    spec = job["spec"]
    assert spec["entrypoint"].startswith(f"python -m kfpytorch_ray.cluster.kube.driver {run.run_id} ")
    cluster = spec["rayClusterSpec"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 3)
    pod = group["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "2", "memory": "3Gi", "nvidia.com/gpu": "1"}
    assert {pod["serviceAccountName"], cluster["headGroupSpec"]["template"]["spec"]["serviceAccountName"]} == {"robot"}
    run.cancel()
    assert not api.find("rayjobs", namespace)


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


def test_a_cluster_that_never_gets_ready(api: Api, namespace: str, backend: KubeRayBackend) -> None:
    """After ``ready_timeout_s`` the run ends with what it waited for, and nothing of it is left."""
    run = started(changed(backend, ready_timeout_s=1.0))
    write_status(api, namespace, run, jobDeploymentStatus="Initializing", rayClusterName="c")
    api.create("pods", namespace, waiting_pod("c", "c-head"))
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes fit"}
    assert api.patch("pods", namespace, "c-head/status", {"status": {"phase": "Pending", "conditions": [condition]}})
    with pytest.raises(PlacementTimeoutError, match=r"(?s)within 1 s.*c-head Unschedulable: 0/3 nodes fit.*Fix:"):
        run.result()
    assert not api.find("rayjobs", namespace)
    with pytest.raises(PlacementTimeoutError, match="within 1 s"):
        attach(run.run_id, storage=backend.storage, backend=backend).result()


def test_an_image_that_cannot_be_pulled(
    api: Api, namespace: str, backend: KubeRayBackend, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """It is said at once, and the run ends when it stays like that."""
    monkeypatch.setattr(kuberay_job, "_PATIENCE_S", 1.0)
    run = started(backend)
    write_status(api, namespace, run, jobDeploymentStatus="Initializing", rayClusterName="c")
    api.create("pods", namespace, waiting_pod("c", "c-head"))
    waiting = {"reason": "ImagePullBackOff", "message": "not found: registry.example/train:1"}
    container = {"name": "ray-head", "ready": False, "restartCount": 0, "image": "i", "imageID": ""}
    stuck = {"phase": "Pending", "containerStatuses": [{**container, "state": {"waiting": waiting}}]}
    assert api.patch("pods", namespace, "c-head/status", {"status": stuck})
    with pytest.raises(ClusterError, match=r"(?s)cannot come up.*ImagePullBackOff: not found"):
        run.result()
    assert "0 of 1 pods run; c-head/ray-head ImagePullBackOff" in capsys.readouterr().err
    assert not api.find("rayjobs", namespace)


def test_what_only_an_event_says_is_told(api: Api, namespace: str, backend: KubeRayBackend, capsys: Any) -> None:
    """A RayCluster that KubeRay refuses has no status: its Warning is all there is."""
    run = started(changed(backend, ready_timeout_s=2.0))
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


def wrong_context(backend: KubeRayBackend) -> KubeRayBackend:
    return changed(backend, context="elsewhere")


def no_kubeconfig(backend: KubeRayBackend) -> KubeRayBackend:
    return changed(backend, kubeconfig="/nowhere/config")


def nobody(backend: KubeRayBackend) -> KubeRayBackend:
    return changed(backend, context="nobody")


def unknown_user(backend: KubeRayBackend) -> KubeRayBackend:
    return changed(backend, kubeconfig=edited(backend, lambda c: c["users"][0]["user"].update(token="wrong")))


def nobody_answers(backend: KubeRayBackend) -> KubeRayBackend:
    return changed(
        backend,
        kubeconfig=edited(backend, lambda c: c["clusters"][0]["cluster"].update(server="https://127.0.0.1:1")),
    )


def no_namespace(backend: KubeRayBackend) -> KubeRayBackend:
    return changed(backend, namespace="nowhere")


def no_cluster(backend: KubeRayBackend) -> KubeRayBackend:
    return changed(backend, cluster="absent")


def unknown_field(backend: KubeRayBackend) -> KubeRayBackend:
    return changed(backend, spec={"rayClusterSpec": {"headGroupSpec": {"colour": "red"}}})


def bad_spec(backend: KubeRayBackend) -> KubeRayBackend:
    return changed(backend, spec={"suspend": True, "shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0})


def wrong_type(backend: KubeRayBackend) -> KubeRayBackend:
    return changed(backend, spec={"backoffLimit": "many"})


def edited(backend: KubeRayBackend, change: Callable[[Document], None]) -> str:
    """A kubeconfig of the test's own."""
    path = Path(str(backend.storage)).with_name("kubeconfig")
    settings = yaml.safe_load(Path(str(backend.kubeconfig)).read_text())
    change(settings)
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (wrong_context, ConfigError, "context='elsewhere'"),
        (no_kubeconfig, ConfigError, "kubeconfig='/nowhere/config'"),
        (nobody, AuthenticationError, r"\(403\)"),
        (unknown_user, AuthenticationError, r"does not know who asks \(401\)"),
        (nobody_answers, ClusterUnreachableError, "127.0.0.1:1 cannot be reached"),
        (no_namespace, ClusterError, "no namespace 'nowhere'"),
        (no_cluster, ClusterError, "no RayCluster 'absent'"),
        (unknown_field, ConfigError, "headGroupSpec.colour"),
        (bad_spec, ConfigError, "spec.suspend"),
        (wrong_type, ClusterError, r"not valid there \(422\)"),
    ],
)
def test_every_refusal_is_typed_and_leaves_nothing(
    api: Api,
    namespace: str,
    backend: KubeRayBackend,
    spoil: Callable[[KubeRayBackend], KubeRayBackend],
    error: type[Exception],
    words: str,
) -> None:
    """What, why and how to fix it; no token is repeated, and neither a RayJob nor a folder is left."""
    with nothing_is_created(api, namespace, backend), pytest.raises(error, match=words) as caught:
        started(spoil(backend))
    tokens = [user["user"]["token"] for user in yaml.safe_load(Path(str(backend.kubeconfig)).read_text())["users"]]
    assert not any(token in str(caught.value) for token in tokens)
    assert "Fix:" in str(caught.value) or isinstance(caught.value, ConfigError)


def test_a_quota_that_is_used_up(api: Api, namespace: str, backend: KubeRayBackend) -> None:
    """A real ResourceQuota: the API server's reason arrives."""
    quota = {"metadata": {"name": "q"}, "spec": {"hard": {"count/rayjobs.ray.io": "0"}}}
    api.create("resourcequotas", namespace, quota)
    wait_until(lambda: (api.get("resourcequotas", namespace, "q") or {}).get("status", {}).get("hard"), "the quota")
    with nothing_is_created(api, namespace, backend), pytest.raises(AuthenticationError, match="exceeded quota: q"):
        started(backend)


def waiting_pod(cluster: str, name: str) -> Document:
    labels = {"ray.io/cluster": cluster, "ray.io/node-type": "head"}
    containers = [{"name": "ray-head", "image": "i"}]
    # No node of a test may take it.
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"containers": containers, "schedulerName": f"none-{os.getpid()}"},
    }
