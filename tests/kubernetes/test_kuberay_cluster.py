"""Runs on a RayCluster that is there already, by all ways in: it is used, and stays; nothing of a run does."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from doubles.api import Api, Document
from doubles.operator import KubeRayOperator
from shell import Shell

from kfpytorch_ray import Elastic, KubeRayBackend, RunStatus, WorkerFailedError, launch
from kfpytorch_ray.runs import Outcome, list_runs, storage_of
from kfpytorch_ray.testing import wait_until

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]

LONG_S = 400.0
"""For Ray to start on a machine that is busy."""
CLUSTER = "mine"
WORKERS = 2
LEASE_S = 12
"""It is kept until training has begun, on a machine that is busy."""
OF_EVERY_NAMESPACE = {"kube-root-ca.crt"}


@pytest.fixture(scope="module")
def ray_cluster(api: Api, module_namespace: str, operator: KubeRayOperator) -> Iterator[str]:
    """Its name. What is created for a run is gone at the end of a module, and it is not."""
    api.create("rayclusters", module_namespace, body())
    wait_until(lambda: state(api, module_namespace) == "ready", "the RayCluster", LONG_S)
    before = names(api, module_namespace, "pods")
    yield CLUSTER
    wait_until(lambda: names(api, module_namespace, "pods") == before, "the runs' own pods to go")


def body() -> Document:
    """A RayCluster with a head without CPUs and workers with one each."""

    def group(name: str, params: dict[str, str]) -> Document:
        container = {"name": name, "image": "any", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}
        return {"rayStartParams": params, "template": {"spec": {"containers": [container]}}}

    amounts = {"replicas": WORKERS, "minReplicas": WORKERS, "maxReplicas": WORKERS}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": CLUSTER},
        "spec": {
            "headGroupSpec": group("ray-head", {"num-cpus": "0"}),
            "workerGroupSpecs": [{"groupName": "workers", **amounts, **group("ray-worker", {})}],
        },
    }


def state(api: Api, namespace: str) -> str:
    return str((api.get("rayclusters", namespace, CLUSTER) or {}).get("status", {}).get("state", ""))


def names(api: Api, namespace: str, resource: str) -> set[str]:
    return {one["metadata"]["name"] for one in api.find(resource, namespace)}


@pytest.fixture
def namespace(module_namespace: str) -> str:
    """The RayCluster's."""
    return module_namespace


@pytest.fixture
def backend(control_plane: Path, namespace: str, ray_cluster: str, shared_folder: str, project: Path) -> KubeRayBackend:
    """On the RayCluster."""
    return KubeRayBackend(
        image="registry.example/train:1",
        namespace=namespace,
        kubeconfig=str(control_plane),
        storage=shared_folder,
        cluster=ray_cluster,
        logs="all",
    )


def only_the_cluster_is_left(api: Api, namespace: str) -> bool:
    """Nothing that a run could have made; its pods are waited for at the end of the module."""
    return names(api, namespace, "rayclusters") == {CLUSTER} and not any(
        names(api, namespace, resource) - OF_EVERY_NAMESPACE
        for resource in ("rayjobs", "jobs", "secrets", "configmaps")
    )


def deployment(api: Api, namespace: str) -> str:
    """The jobDeploymentStatus of the one RayJob."""
    (job,) = api.find("rayjobs", namespace)
    return str(job.get("status", {}).get("jobDeploymentStatus", ""))


def test_a_cluster_that_is_there_is_used_and_stays(
    api: Api, namespace: str, trainings: ModuleType, backend: KubeRayBackend, capsys: Any
) -> None:
    """Both of its nodes; the RayJob and the pod that submitted it go."""
    result = launch(trainings.train, 10, elastic=Elastic(nnodes=2, backend=backend))
    assert [result[rank].return_value for rank in (0, 1)] == [(21, "0"), (21, "1")]
    assert "rank 1 of 2 sums to 21" in capsys.readouterr().out
    wait_until(lambda: only_the_cluster_is_left(api, namespace), "the RayJob to go")
    assert state(api, namespace) == "ready"


def test_the_operator_may_submit(
    api: Api, namespace: str, trainings: ModuleType, backend: KubeRayBackend, capsys: Any
) -> None:
    """HTTPMode: no pod submits; what was printed is shown at the end, and the user's exception comes home."""
    backend.submission_mode = "HTTPMode"
    with pytest.raises(WorkerFailedError, match="no training with 7") as caught:
        launch(trainings.fail, 7, elastic=Elastic(backend=backend))
    assert isinstance(caught.value.__cause__, ValueError)
    assert "no training with 7" in capsys.readouterr().out
    wait_until(lambda: only_the_cluster_is_left(api, namespace), "the RayJob to go")


WORK = """
from flytekit import task
from kfpytorch_ray import Elastic, KubeRayBackend, launch
from kuberay_trainings import hold

backend = KubeRayBackend(image="registry.example/train:1", namespace={namespace!r}, cluster={cluster!r}, logs="all")

@task(task_config=Elastic(nnodes=2, nproc_per_node=1, backend=backend))
def work(folder: str) -> str:
    return hold(folder)

if __name__ == "__main__":
    import sys
    if sys.argv[2:]:
        backend.lease_s = float(sys.argv[2])
    print(launch(hold, sys.argv[1], elastic=Elastic(nnodes=2, backend=backend))[0].return_value)
"""


@pytest.fixture
def shell(
    project: Path, backend: KubeRayBackend, shared_folder: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    work = WORK.format(namespace=backend.namespace, cluster=backend.cluster)
    yield Shell(project, "kuberay_trainings", work, backend, monkeypatch, LONG_S)
    # Of a test that fails, no rank may hold a node that the next one needs.
    Path(shared_folder, "go").touch()


def wait_for_training(folder: str) -> None:
    wait_until(lambda: all(Path(folder, f"begun-{rank}").exists() for rank in (0, 1)), "training to begin", LONG_S)


def test_a_run_outlives_who_launched_it(api: Api, namespace: str, shell: Shell, shared_folder: str) -> None:
    """SIGKILL; by the command line it is found, looked at, followed and taken by others, and then nothing is left."""
    launching = shell.start("jobs/work.py", shared_folder)
    wait_for_training(shared_folder)
    shell.kill(launching)
    (listed,) = json.loads(shell.command("list", "--json"))
    run = listed["run_id"]
    told = json.loads(shell.command("status", run, "--json"))
    assert (told["status"], told["backend"], told["address"]) == ("running", "kuberay", f"{namespace}@")
    following = shell.start("-m", "kfpytorch_ray.cli", "logs", "-f", run)
    shell.command("result", run, "--timeout", 0, ends_with=5)
    Path(shared_folder, "go").touch()
    assert shell.output_of(following).count("rank 1 has begun") == 1
    assert "rank 1 has begun" in shell.command("logs", run)
    assert shell.command("result", run) == "'let go as 0'\n"
    wait_until(lambda: only_the_cluster_is_left(api, namespace), "the RayJob to go")
    shell.command("result", run, ends_with=2)


def test_a_dead_clients_lease_ends_its_run(api: Api, namespace: str, shell: Shell, shared_folder: str) -> None:
    """SIGKILL; the driver stops its ranks, and says why. KubeRay keeps the RayJob, which gc removes."""
    launching = shell.start("jobs/work.py", shared_folder, LEASE_S)
    wait_for_training(shared_folder)
    shell.kill(launching)

    def outcome() -> Outcome | None:
        (known,) = list_runs(storage_of(shared_folder))
        return known.outcome

    wait_until(outcome, "the lease to run out", LONG_S)
    assert (ended := outcome()) is not None
    assert ended.state == RunStatus.STOPPED.value
    assert "no sign of life" in ended.message
    (job,) = api.find("rayjobs", namespace)
    wait_until(lambda: deployment(api, namespace) in ("Complete", "Failed"), "the RayJob to be over", LONG_S)
    assert shell.command("gc", "--older-than", "1s") == f"removed {job['metadata']['name']}\n"
    wait_until(lambda: only_the_cluster_is_left(api, namespace), "the RayJob to go")
    assert not list_runs(storage_of(shared_folder))


def test_an_interrupted_launch_leaves_nothing(api: Api, namespace: str, shell: Shell, shared_folder: str) -> None:
    """Ctrl-C where there is no terminal to ask: the run is stopped, and its RayJob is gone when the process is."""
    launching = shell.start("-m", "kfpytorch_ray.cli", "run", "jobs/work.py:work", "--arg", f"folder={shared_folder}")
    wait_for_training(shared_folder)
    launching.send_signal(signal.SIGINT)
    _, errors = launching.communicate(timeout=LONG_S)
    assert launching.returncode == 130
    assert "is stopped." in errors
    assert not api.find("rayjobs", namespace)
    wait_until(lambda: only_the_cluster_is_left(api, namespace), "its pods to go")
