"""PyTorchJobs without Flyte, end to end: a real API server, doubles of a node and of the operator, and real torch."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from doubles.api import Api
from doubles.kubelet import MISSING_IMAGE
from doubles.training_operator import TrainingOperator
from flytekit import task
from shell import Shell

from kfpytorch_ray import (
    Elastic,
    KubeflowBackend,
    PyTorch,
    RunPolicy,
    RunStatus,
    RunStoppedError,
    Worker,
    WorkerFailedError,
    attach,
    launch,
)
from kfpytorch_ray.errors import DeadlineExceededError, PlacementTimeoutError
from kfpytorch_ray.runs import CODE, INPUTS, LEASE, REQUEST, RESULTS, list_runs, storage_of
from kfpytorch_ray.testing import wait_until

pytestmark = [
    pytest.mark.timeout(300),
    # The control plane of tests has no certificate that anybody has signed.
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]

STAGED = {CODE, INPUTS, LEASE, REQUEST, RESULTS}
LEASE_S = 12
"""It is kept until training has begun, on a machine that is busy."""
OF_EVERY_NAMESPACE = {"kube-root-ca.crt"}
LONG_S = 200.0
"""For torch to start on a machine that is busy."""


@pytest.fixture
def backend(
    control_plane: Path, namespace: str, training_operator: TrainingOperator, shared_folder: str, project: Path
) -> KubeflowBackend:
    """Where the doubles run what is created."""
    return KubeflowBackend(
        image="registry.example/train:1", namespace=namespace, kubeconfig=str(control_plane), storage=shared_folder
    )


@pytest.fixture
def trainings(project: Path) -> Iterator[ModuleType]:
    """A user's module in the folder that is sent."""
    yield import_module("pytorchjob_trainings")
    del sys.modules["pytorchjob_trainings"]


def on(backend: KubeflowBackend, nodes: int | str = 2, workers: int = 1, **options: Any) -> Elastic:
    """A config whose workers start fast: forked from the pod's process, which has imported torch."""
    return Elastic(nodes, workers, backend=backend, start_method="fork", monitor_interval=1, **options)


def gone(api: Api, namespace: str) -> bool:
    """Whether nothing of a run is left in the cluster."""
    kinds = ("pytorchjobs", "pods", "services", "secrets", "configmaps")
    found = {one["metadata"]["name"] for kind in kinds for one in api.find(kind, namespace)}
    return not found - OF_EVERY_NAMESPACE


def left(folder: str) -> set[str]:
    """Names of what runs have left in the storage."""
    return {path.name for path in Path(folder).glob("runs/*/*")}


def wait_for_training(folder: str, ranks: int = 2) -> None:
    wait_until(lambda: all(Path(folder, f"begun-{rank}").exists() for rank in range(ranks)), "training", LONG_S)


def test_a_function_is_trained_and_its_results_come_home(
    api: Api, namespace: str, trainings: ModuleType, backend: KubeflowBackend, shared_folder: str, capsys: Any
) -> None:
    """Two pods of two ranks: value and deck of each, every line once, nothing left but that it was taken."""
    result = launch(trainings.train, 10, elastic=on(backend, 2, 2))
    assert [result[rank].return_value["sum"] for rank in range(4)] == [46] * 4
    pods = {result[rank].return_value["pod"] for rank in range(4)}
    assert pods == {f"{result.run_id}-worker-{index}" for index in (0, 1)}
    assert "drawn by rank 3" in result[3].decks[0].html
    (ended,) = result.rounds
    assert [rank.rank for rank in ended.ranks] == [0, 1, 2, 3]
    output = capsys.readouterr().out
    for rank in range(4):
        assert output.count(f"[rank {rank}] rank {rank} of 4 sums to 46") == 1
    wait_until(lambda: gone(api, namespace), "the job to be removed")
    # They have ended by themselves, however soon their results were taken.
    reports = [json.loads(path.read_text()) for path in Path(shared_folder).glob("runs/*/pods/*/report.json")]
    assert [report["state"] for report in reports] == ["succeeded", "succeeded"]
    del result
    wait_until(lambda: not left(shared_folder) & STAGED, "the results to go")


def test_the_users_exception_is_the_cause(
    api: Api, namespace: str, trainings: ModuleType, backend: KubeflowBackend, shared_folder: str, capsys: Any
) -> None:
    """Whichever pod reports first: that another rank lost its connection follows from it. Of spawned ranks, as well."""
    elastic = replace(on(backend), start_method="spawn")
    with pytest.raises(WorkerFailedError, match="no such column: 'price'") as caught:
        launch(trainings.fail, "1", elastic=elastic)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "rank 1" in str(caught.value).splitlines()[0]
    assert "no such column" in capsys.readouterr().out
    wait_until(lambda: gone(api, namespace), "the job to be removed")
    (known,) = list_runs(storage_of(shared_folder))
    with pytest.raises(WorkerFailedError, match="no such column"):
        attach(known.manifest.run_id, storage=shared_folder, backend=backend).result()


def test_master_and_workers_are_ranks(
    api: Api, namespace: str, trainings: ModuleType, backend: KubeflowBackend, capsys: Any
) -> None:
    """A ``PyTorch`` config: one process for each replica, whose lines are marked here."""
    config = PyTorch(worker=Worker(replicas=1), backend=backend)
    assert task(task_config=config)(trainings.total)(base=10) == 21
    output = capsys.readouterr().out
    for rank in (0, 1):
        assert output.count(f"[rank {rank}] rank {rank} of 2 sums to 21") == 1
    wait_until(lambda: gone(api, namespace), "the job to be removed")


def test_a_run_is_cancelled(
    api: Api, namespace: str, trainings: ModuleType, backend: KubeflowBackend, shared_folder: str
) -> None:
    """Its ranks are told, and when it returns nothing is left: no job, pod, Service, nor anything staged."""
    run = launch(trainings.hold, shared_folder, elastic=on(backend), wait=False)
    wait_for_training(shared_folder)
    assert run.status() is RunStatus.RUNNING
    assert run.cancel() is RunStatus.STOPPED
    assert all(Path(shared_folder, f"stopped-{rank}").exists() for rank in (0, 1))
    assert gone(api, namespace)
    assert not left(shared_folder) & STAGED


def test_an_image_that_cannot_be_pulled(
    api: Api, namespace: str, trainings: ModuleType, backend: KubeflowBackend, capsys: Any
) -> None:
    """It is named while the run waits, and in the error that ends it."""
    waits = replace(backend, image=f"registry.example/{MISSING_IMAGE}:1", ready_timeout_s=3.0)
    with pytest.raises(PlacementTimeoutError, match=r"(?s)within 3 s.*ImagePullBackOff.*Fix:"):
        launch(trainings.train, 1, elastic=on(waits))
    assert "waits for its pods: 0 of 2 run" in (said := capsys.readouterr().err)
    assert "ImagePullBackOff" in said
    wait_until(lambda: gone(api, namespace), "the job to be removed")


def test_a_deadline_ends_the_run(api: Api, namespace: str, trainings: ModuleType, backend: KubeflowBackend) -> None:
    """The operator's: what has ended it is said, whether its pods have begun or not."""
    waits = replace(backend, image=f"registry.example/{MISSING_IMAGE}:1")
    with pytest.raises(DeadlineExceededError, match=r"active longer than.*\n?.*active_deadline_seconds"):
        launch(trainings.train, 1, elastic=on(waits, run_policy=RunPolicy(active_deadline_seconds=2)))
    wait_until(lambda: gone(api, namespace), "the job to be removed")


WORK = """
from kfpytorch_ray import Elastic, KubeflowBackend, RunPolicy, launch
from pytorchjob_trainings import hold

backend = KubeflowBackend(image="registry.example/train:1", namespace={namespace!r})
elastic = Elastic(nnodes=1, nproc_per_node=2, start_method="fork", monitor_interval=1, backend=backend)

if __name__ == "__main__":
    import sys
    if sys.argv[2:]:
        backend.lease_s = float(sys.argv[2])
        elastic.run_policy = RunPolicy(ttl_seconds_after_finished=2)
    print(launch(hold, sys.argv[1], elastic=elastic)[0].return_value)
"""


@pytest.fixture
def shell(
    project: Path, backend: KubeflowBackend, shared_folder: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    work = WORK.format(namespace=backend.namespace)
    yield Shell(project, "pytorchjob_trainings", work, backend, monkeypatch, LONG_S)
    # Of a test that fails, no rank may hold a node that the next one needs.
    Path(shared_folder, "go").touch()


def test_a_run_from_begin_to_end_by_the_command_line(
    api: Api, namespace: str, backend: KubeflowBackend, shell: Shell, shared_folder: str
) -> None:
    """A plain function, launched and left alone; looked at, followed, filtered by rank and taken by others."""
    pods = ("--image", "registry.example/train:1", "--namespace", namespace, "--resources", "CPU=0.5,memory=1Gi")
    ranks = ("--nproc-per-node", 2, "--arg", f"folder={shared_folder}")
    begin = ("run", "jobs/pytorchjob_trainings.py:hold", "--backend", "kubeflow", *pods, *ranks, "--detach")
    run = shell.output_of(shell.start("-m", "kfpytorch_ray.cli", *begin)).strip()
    wait_for_training(shared_folder)
    (pod,) = api.find("pods", namespace)
    assert pod["spec"]["containers"][0]["resources"]["requests"] == {"cpu": "500m", "memory": str(2**30)}
    following = shell.start("-m", "kfpytorch_ray.cli", "logs", "-f", run)
    (listed,) = json.loads(shell.command("list", "--json"))
    assert (listed["run_id"], listed["status"]) == (run, "running")
    assert (listed["backend"], listed["address"]) == ("kubeflow", f"{namespace}@")
    again = attach(run, storage=shared_folder, backend=KubeflowBackend(kubeconfig=backend.kubeconfig))
    # A rank's lines reach its pod's log a moment after it has gone on.
    wait_until(lambda: [*again.logs(rank=1)] == ["[rank 1] rank 1 has begun"], "the line of rank 1")
    Path(shared_folder, "go").touch()
    lines = shell.output_of(following)
    for rank in (0, 1):
        assert lines.count(f"[rank {rank}] rank {rank} has begun") == 1
        assert lines.count(f"[rank {rank}] rank {rank} goes on") == 1
    assert again.status() is RunStatus.SUCCEEDED
    result = again.result()
    assert [result[rank].return_value for rank in (0, 1)] == ["let go as 0", "let go as 1"]
    wait_until(lambda: gone(api, namespace), "the job to be removed")
    # Its pods are gone, and their lines are not.
    assert {line.partition("]")[0] for line in again.logs(rank=1)} == {"[rank 1"}


def test_an_interrupted_launch_leaves_nothing(api: Api, namespace: str, shell: Shell, shared_folder: str) -> None:
    """Ctrl-C where there is no terminal to ask: the run is stopped, and all is gone when the process is."""
    launching = shell.start("jobs/work.py", shared_folder)
    wait_for_training(shared_folder)
    launching.send_signal(signal.SIGINT)
    _, errors = launching.communicate(timeout=LONG_S)
    assert launching.returncode != 0
    assert "is stopped." in errors
    assert gone(api, namespace)
    assert not left(shared_folder) & STAGED


def test_a_dead_clients_lease_ends_its_run(
    api: Api, namespace: str, backend: KubeflowBackend, shell: Shell, shared_folder: str
) -> None:
    """SIGKILL; its pod stops its ranks, and the operator removes the job after its time to live: nobody else has to."""
    launching = shell.start("jobs/work.py", shared_folder, LEASE_S)
    wait_for_training(shared_folder)
    shell.kill(launching)
    wait_until(lambda: gone(api, namespace), "the job to be removed", LONG_S)
    assert all(Path(shared_folder, f"stopped-{rank}").exists() for rank in (0, 1))
    (known,) = list_runs(storage_of(shared_folder))
    again = attach(known.manifest.run_id, storage=shared_folder, backend=KubeflowBackend(kubeconfig=backend.kubeconfig))
    assert again.status() is RunStatus.STOPPED
    with pytest.raises(RunStoppedError, match="no sign of life"):
        again.result()
    assert not left(shared_folder) & STAGED
