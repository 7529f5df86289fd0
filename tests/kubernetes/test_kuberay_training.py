"""KubeRay without Flyte, end to end: a real API server, doubles of a node and of KubeRay, and real Ray in the Pods."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from doubles.api import Api
from doubles.node import Node
from doubles.operator import KubeRayOperator
from flytekit import Resources

from kfpytorch_ray import Elastic, KubeRayBackend, RunLostError, launch
from kfpytorch_ray.testing import meanwhile, wait_until

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]

LONG_S = 400.0
"""For Ray to start on a machine that is busy."""


@pytest.fixture
def backend(
    control_plane: Path, namespace: str, operator: KubeRayOperator, shared_folder: str, project: Path
) -> KubeRayBackend:
    """A cluster whose pods are small enough for this machine."""
    small = Resources(cpu="1", mem="1Gi")
    return KubeRayBackend(
        image="registry.example/train:1",
        namespace=namespace,
        kubeconfig=str(control_plane),
        storage=shared_folder,
        requests=small,
        head_requests=small,
        grow_cooldown_s=1.0,
        logs="all",
    )


def gone(api: Api, namespace: str) -> bool:
    """Whether nothing of a run is left in the cluster."""
    return not any(api.find(kind, namespace) for kind in ("rayjobs", "rayclusters", "jobs", "services", "pods"))


def pods(api: Api, namespace: str, labels: str, phase: str = "Running") -> list[str]:
    found = api.find("pods", namespace, labels)
    return [pod["metadata"]["name"] for pod in found if pod["status"].get("phase") == phase]


def test_a_function_is_trained_and_its_results_come_home(
    api: Api, namespace: str, trainings: ModuleType, backend: KubeRayBackend, node: Node, capsys: Any
) -> None:
    """Two nodes on two worker pods, the user's module sent; the log is followed, and everything is cleaned up."""
    result = launch(trainings.train, 10, elastic=Elastic(nnodes=2, nproc_per_node=1, backend=backend))
    assert [result[rank].return_value for rank in (0, 1)] == [(21, "0"), (21, "1")]
    output = capsys.readouterr().out
    assert output.count("rank 0 of 2 sums to 21") == 1
    assert output.count("rank 1 of 2 sums to 21") == 1
    wait_until(lambda: gone(api, namespace), "the cluster to be removed")
    wait_until(lambda: not node.running, "what ran in its pods to end")


def test_a_run_grows_when_a_pod_comes(
    api: Api, namespace: str, trainings: ModuleType, backend: KubeRayBackend, node: Node, shared_folder: str
) -> None:
    """A range starts with its fewest nodes; the demand for more brings a pod, and a round begins that includes it."""

    def act() -> None:
        try:
            wait_until(lambda: pods(api, namespace, "job-name"), "the submitter", LONG_S)
            node.cordoned = True
            worker = "ray.io/node-type=worker"
            wait_until(lambda: pods(api, namespace, worker, "Pending"), "a pod that has no room", LONG_S)
            wait_until(Path(shared_folder, "world-1").exists, "a round with one node", LONG_S)
        finally:
            node.cordoned = False

    elastic = Elastic(
        nnodes="1:2", nproc_per_node=1, backend=backend, rdzv_configs={"join_timeout": 300, "last_call_timeout": 1}
    )
    with meanwhile(act):
        result = launch(trainings.grow, shared_folder, elastic=elastic)
    assert [result[rank].return_value for rank in (0, 1)] == [2, 2]
    assert [len(one.ranks) for one in result.rounds] == [1, 2]
    wait_until(lambda: gone(api, namespace), "the cluster to be removed")


def test_a_head_that_dies_ends_the_run(
    api: Api, namespace: str, trainings: ModuleType, backend: KubeRayBackend, node: Node, shared_folder: str
) -> None:
    """Its container is killed and started again, where nobody knows of the run: that is said, and nothing is left."""

    def kill() -> None:
        wait_until(Path(shared_folder, "begun-0").exists, "training to begin", LONG_S)
        (head,) = pods(api, namespace, "ray.io/node-type=head")
        node.kill_container(namespace, head)

    with meanwhile(kill), pytest.raises(RunLostError, match=r"head pod of the run .* is lost"):
        launch(trainings.hold, shared_folder, elastic=Elastic(nnodes=1, nproc_per_node=1, backend=backend))
    wait_until(lambda: gone(api, namespace), "the cluster to be removed")
