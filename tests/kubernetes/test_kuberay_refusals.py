"""KubeRay without Flyte on a real API server: what is created there, and what every refusal says."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from blocks import rules
from doubles.api import Api, Document
from doubles.front import Asked, Front
from explained import assert_explained
from flytekit import PodTemplate, Resources
from kubernetes.client import V1Container, V1PodSpec, V1ResourceRequirements, V1Toleration

from kfpytorch_ray import (
    ConfigError,
    Elastic,
    KubeRayBackend,
    RunStatus,
    launch,
)
from kfpytorch_ray.errors import AuthenticationError, ClusterError, ClusterUnreachableError
from kfpytorch_ray.run import Run
from kfpytorch_ray.runs import REQUEST, run_folder, storage_of
from kfpytorch_ray.testing import wait_until

pytestmark = [
    pytest.mark.timeout(300),
    # The control plane of tests has no certificate that anybody has signed.
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]


def train(x: int) -> int:
    return x


def started(backend: KubeRayBackend, nnodes: int | str = 2) -> Run:
    return launch(train, 1, elastic=Elastic(nnodes, backend=backend), wait=False)


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
    """The API server keeps every field, and options and templates are where they belong."""
    worker = PodTemplate(
        pod_spec=V1PodSpec(
            containers=[V1Container(name="primary")],
            node_selector={"pool": "gpu"},
            tolerations=[V1Toleration(key="gpu", operator="Exists")],
        )
    )
    mine = replace(
        backend,
        requests=Resources(cpu="2", mem="3Gi", gpu="1"),
        labels={"kueue.x-k8s.io/queue-name": "team"},
        annotations={"note": "x"},
        service_account="robot",
        worker_pod_template=worker,
        spec={"rayClusterSpec": {"autoscalerOptions": {"upscalingMode": "Conservative"}}},
    )
    run = started(mine, "2:3")
    job = job_of(api, namespace)
    assert job["metadata"]["name"] == run.run_id
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["metadata"]["annotations"] == {"note": "x"}
    spec = job["spec"]
    assert spec["entrypoint"].startswith(f"python -m kfpytorch_ray.cluster.kube.driver {run.run_id} ")
    cluster = spec["rayClusterSpec"]
    assert cluster["autoscalerOptions"]["upscalingMode"] == "Conservative"
    (group,) = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (2, 2, 3)
    pod = group["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "2", "memory": "3Gi", "nvidia.com/gpu": "1"}
    assert {pod["serviceAccountName"], cluster["headGroupSpec"]["template"]["spec"]["serviceAccountName"]} == {"robot"}
    run.cancel()
    assert not api.find("rayjobs", namespace)


@pytest.mark.parametrize("autoscales", [True, False])
def test_a_cluster_that_is_there_grows_if_it_does(
    api: Api, namespace: str, backend: KubeRayBackend, autoscales: bool
) -> None:
    """The driver waits for nodes that may come, and refuses at once what can never be where none will."""
    head = {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "ray-head", "image": "i"}]}}}
    spec = {"headGroupSpec": head, "enableInTreeAutoscaling": autoscales}
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "mine"}, "spec": spec}
    api.create("rayclusters", namespace, cluster)
    run = started(replace(backend, cluster="mine"))
    assert job_of(api, namespace)["spec"]["clusterSelector"] == {"ray.io/cluster": "mine"}
    request = run_folder(storage_of(backend.storage), run.run_id).read(REQUEST)
    assert request is not None
    _, inside = pickle.loads(request)
    assert inside.autoscaling is autoscales
    run.cancel()


def wrong_context(backend: KubeRayBackend) -> KubeRayBackend:
    return replace(backend, context="elsewhere")


def no_kubeconfig(backend: KubeRayBackend) -> KubeRayBackend:
    return replace(backend, kubeconfig="/nowhere/config")


def unknown_user(backend: KubeRayBackend) -> KubeRayBackend:
    return replace(
        backend, kubeconfig=edited(backend, lambda c: [user.update(user={"token": "wrong"}) for user in c["users"]])
    )


def nobody_answers(backend: KubeRayBackend) -> KubeRayBackend:
    return replace(
        backend,
        kubeconfig=edited(
            backend, lambda c: [one["cluster"].update(server="https://127.0.0.1:1") for one in c["clusters"]]
        ),
    )


def no_namespace(backend: KubeRayBackend) -> KubeRayBackend:
    return replace(backend, namespace="nowhere")


def no_cluster(backend: KubeRayBackend) -> KubeRayBackend:
    return replace(backend, cluster="absent")


def unknown_field(backend: KubeRayBackend) -> KubeRayBackend:
    return replace(backend, spec={"rayClusterSpec": {"headGroupSpec": {"colour": "red"}}})


def bad_spec(backend: KubeRayBackend) -> KubeRayBackend:
    return replace(backend, spec={"suspend": True, "shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0})


def wrong_type(backend: KubeRayBackend) -> KubeRayBackend:
    return replace(backend, spec={"backoffLimit": "many"})


def too_long_a_label(backend: KubeRayBackend) -> KubeRayBackend:
    return replace(backend, labels={"team": "x" * 64})


def too_long_a_name(backend: KubeRayBackend) -> KubeRayBackend:
    group = {"groupName": "worker", "labels": {"team": "x" * 64}}
    return replace(backend, spec={"rayClusterSpec": {"workerGroupSpecs": [group]}})


def more_gpus_by_spec(backend: KubeRayBackend) -> KubeRayBackend:
    container = {"name": "ray-worker", "resources": {"limits": {"nvidia.com/gpu": "8"}}}
    group = {"groupName": "worker", "template": {"spec": {"containers": [container]}}}
    return replace(backend, requests=Resources(gpu="1"), spec={"rayClusterSpec": {"workerGroupSpecs": [group]}})


def a_container_before_rays(backend: KubeRayBackend) -> KubeRayBackend:
    containers = [V1Container(name="sidecar", image="i"), V1Container(name="primary")]
    return replace(backend, worker_pod_template=PodTemplate(pod_spec=V1PodSpec(containers=containers)))


def more_gpus_than_asked(backend: KubeRayBackend) -> KubeRayBackend:
    resources = V1ResourceRequirements(limits={"nvidia.com/gpu": "8"})
    containers = [V1Container(name="primary", resources=resources)]
    template = PodTemplate(pod_spec=V1PodSpec(containers=containers))
    return replace(backend, requests=Resources(gpu="1"), worker_pod_template=template)


def edited(backend: KubeRayBackend, change: Callable[[Document], object]) -> str:
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
        (unknown_user, AuthenticationError, r"does not know who asks \(401\)"),
        (nobody_answers, ClusterUnreachableError, "127.0.0.1:1 cannot be reached"),
        (no_namespace, ClusterError, "no namespace 'nowhere'"),
        (no_cluster, ClusterError, "no RayCluster 'absent'"),
        (unknown_field, ConfigError, "headGroupSpec.colour"),
        (bad_spec, ConfigError, "spec.suspend"),
        (wrong_type, ClusterError, r"not valid there \(422\)"),
        (a_container_before_rays, ConfigError, "sidecar"),
        (more_gpus_than_asked, ConfigError, "worker_pod_template.*resources"),
        (more_gpus_by_spec, ConfigError, "spec.* gives resources to the container 'ray-worker'"),
        (too_long_a_label, ClusterError, r"not valid there \(422\)"),
        (too_long_a_name, ConfigError, r"workerGroupSpecs\[0\]\.labels\.team.*no value of a label"),
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
    users = yaml.safe_load(Path(str(backend.kubeconfig)).read_text())["users"]
    assert not any(user["user"].get("token", "?") in str(caught.value) for user in users)
    assert_explained(caught.value)


def test_a_user_without_rights_is_told_which_are_needed(
    api: Api, namespace: str, backend: KubeRayBackend, stranger: str
) -> None:
    """Real RBAC's 403."""
    with (
        nothing_is_created(api, namespace, backend),
        pytest.raises(AuthenticationError, match=r"(?s)\(403\).*Fix: Ask for a Role with get, list, watch, create"),
    ):
        started(replace(backend, kubeconfig=stranger))


def test_who_may_do_what_the_documentation_names_needs_no_more(
    api: Api, namespace: str, backend: KubeRayBackend, stranger: str, allow: Callable[..., None]
) -> None:
    """The Role of docs/operations.md, without the right to see definitions: a run is launched and cancelled."""
    allow(*rules("Role"))
    run = started(replace(backend, kubeconfig=stranger))
    assert run.status() is RunStatus.PENDING
    assert run.cancel() is RunStatus.STOPPED
    assert not api.find("rayjobs", namespace)


@pytest.mark.parametrize("definitions", ["seen", "not seen"])
def test_a_cluster_without_kuberay(
    api: Api, namespace: str, backend: KubeRayBackend, front: Front, tmp_path: Path, definitions: str
) -> None:
    """The answers of the server for a group that it does not know, whether or not this user may see definitions."""

    def elsewhere(asked: Asked) -> Asked | int:
        if asked.resource == "customresourcedefinitions" and definitions == "not seen":
            return 403
        return replace(asked, path=asked.path.replace("ray.io", "absent.example"))

    front.change = elsewhere
    there = replace(backend, kubeconfig=front.kubeconfig(tmp_path / "kubeconfig"))
    words = r"(?s)knows no RayJob.*rayjobs\.ray\.io is missing.*Fix: Install KubeRay"
    with nothing_is_created(api, namespace, backend), pytest.raises(ClusterError, match=words):
        started(there)


def exceeded(backend: KubeRayBackend) -> bool:
    """Whether the API server counts by the quota already: it refuses before that, too."""
    try:
        started(backend)
    except AuthenticationError as error:
        return "exceeded quota" in str(error)
    return True


def test_a_quota_that_is_used_up(api: Api, namespace: str, backend: KubeRayBackend) -> None:
    """A real ResourceQuota: the API server's reason arrives."""
    hard = {"count/rayjobs.ray.io": "0"}
    api.create("resourcequotas", namespace, {"metadata": {"name": "q"}, "spec": {"hard": hard}})
    # Their controller counts what is of a definition that is new to it after a minute or more.
    assert api.patch("resourcequotas", namespace, "q/status", {"status": {"hard": hard, "used": hard}})
    wait_until(lambda: exceeded(backend), "the quota to be known to the API server")
    with nothing_is_created(api, namespace, backend), pytest.raises(AuthenticationError, match="exceeded quota: q"):
        started(backend)
