"""Runs on a RayCluster that is there already, by all ways in: it is used, and stays; nothing of a run does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from doubles.api import Api, Document
from doubles.operator import KubeRayOperator

from kfpytorch_ray import Elastic, KubeRayBackend, RunStatus, WorkerFailedError, attach, launch
from kfpytorch_ray.runs import list_runs, storage_of
from kfpytorch_ray.testing import wait_until

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]

LONG_S = 400.0
"""For Ray to start on a machine that is busy."""
CLUSTER = "mine"
WORKERS = 2


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
    return names(api, namespace, "rayclusters") == {CLUSTER} and not any(
        api.find(resource, namespace) for resource in ("rayjobs", "jobs")
    )


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
    print(launch(hold, sys.argv[1], elastic=Elastic(nnodes=2, backend=backend))[0].return_value)
"""


class Shell:
    """Where a person works: above the folder of what is launched, with cluster and storage in the environment."""

    def __init__(self, project: Path, backend: KubeRayBackend) -> None:
        jobs = project / "jobs"
        jobs.mkdir()
        (project / "kuberay_trainings.py").rename(jobs / "kuberay_trainings.py")
        (jobs / "work.py").write_text(WORK.format(namespace=backend.namespace, cluster=backend.cluster))
        self._project = project
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(backend.kubeconfig),
            "KFPYTORCH_RAY_STORAGE": str(backend.storage),
            "PYTHONUNBUFFERED": "1",
            # For a control plane of tests, whose certificate nobody has signed.
            "PYTHONWARNINGS": "ignore",
        }

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start Python."""
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=self._project,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def command(self, *arguments: object, ends_with: int = 0) -> str:
        """What kfpytorch-ray prints on standard output."""
        process = self.start("-m", "kfpytorch_ray.cli", *arguments)
        output, errors = process.communicate(timeout=LONG_S)
        assert process.returncode == ends_with, errors
        return output


@pytest.fixture
def shell(project: Path, backend: KubeRayBackend) -> Shell:
    return Shell(project, backend)


def wait_for_training(folder: str) -> None:
    wait_until(lambda: all(Path(folder, f"begun-{rank}").exists() for rank in (0, 1)), "training to begin", LONG_S)


def test_a_run_from_begin_to_end_by_the_command_line(
    api: Api, namespace: str, shell: Shell, shared_folder: str
) -> None:
    """Launched by one process, looked at, followed and taken by others, which find the cluster by the run."""
    run = shell.command("run", "jobs/work.py:work", "--arg", f"folder={shared_folder}", "--detach").strip()
    wait_for_training(shared_folder)
    told = json.loads(shell.command("status", run, "--json"))
    assert (told["status"], told["backend"], told["address"]) == ("running", "kuberay", f"{namespace}@")
    following = shell.start("-m", "kfpytorch_ray.cli", "logs", "-f", run)
    shell.command("result", run, "--timeout", 0, ends_with=5)
    Path(shared_folder, "go").touch()
    lines, errors = following.communicate(timeout=LONG_S)
    assert following.returncode == 0, errors
    assert lines.count("rank 1 has begun") == 1
    assert "rank 1 has begun" in shell.command("logs", run)
    assert shell.command("result", run) == "'let go as 0'\n"
    wait_until(lambda: only_the_cluster_is_left(api, namespace), "the RayJob to go")
    shell.command("result", run, ends_with=2)


def test_a_run_is_cancelled_by_the_command_line(api: Api, namespace: str, shell: Shell, shared_folder: str) -> None:
    """It is over when the command is, and its RayJob gone; its ranks had time to end."""
    run = shell.command("run", "jobs/work.py:work", "--arg", f"folder={shared_folder}", "--detach").strip()
    wait_for_training(shared_folder)
    assert shell.command("cancel", run) == "stopped\n"
    assert not api.find("rayjobs", namespace)
    shell.command("result", run, ends_with=6)
    wait_until(lambda: only_the_cluster_is_left(api, namespace), "its pods to go")


def test_a_run_outlives_who_launched_it(
    api: Api, namespace: str, backend: KubeRayBackend, shell: Shell, shared_folder: str
) -> None:
    """SIGKILL; it is found again by its id, and when its result was taken nothing is left."""
    launching = shell.start("jobs/work.py", shared_folder)
    wait_for_training(shared_folder)
    launching.kill()
    launching.communicate()
    (known,) = list_runs(storage_of(shared_folder))
    run = attach(known.manifest.run_id, storage=shared_folder, backend=KubeRayBackend(kubeconfig=backend.kubeconfig))
    assert run.status() is RunStatus.RUNNING
    Path(shared_folder, "go").touch()
    result = run.result()
    assert [result[rank].return_value for rank in (0, 1)] == ["let go as 0", "let go as 1"]
    wait_until(lambda: only_the_cluster_is_left(api, namespace), "the RayJob to go")


def test_an_interrupted_launch_leaves_nothing(api: Api, namespace: str, shell: Shell, shared_folder: str) -> None:
    """Ctrl-C where there is no terminal to ask: the run is stopped, and its RayJob is gone when the process is."""
    launching = shell.start("jobs/work.py", shared_folder)
    wait_for_training(shared_folder)
    launching.send_signal(signal.SIGINT)
    _, errors = launching.communicate(timeout=LONG_S)
    assert launching.returncode != 0
    assert "is stopped." in errors
    assert not api.find("rayjobs", namespace)
    wait_until(lambda: only_the_cluster_is_left(api, namespace), "its pods to go")
