"""KubeRay without Flyte, end to end: a real API server, doubles of a node and of KubeRay, and real Ray in the Pods."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from doubles.api import Api
from doubles.operator import KubeRayOperator
from flytekit import Resources

from kfpytorch_ray import Elastic, KubeRayBackend, WorkerFailedError, launch
from kfpytorch_ray.testing import wait_until

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]

TRAINING = """
import os
import torch
import torch.distributed as dist


def train(base):
    dist.init_process_group("gloo")
    total = torch.tensor([base + dist.get_rank()])
    dist.all_reduce(total)
    print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "sums to", total.item())
    return total.item(), os.environ["GROUP_RANK"]


def fail(base):
    raise ValueError(f"no training with {base}")
"""


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A user's module, in a folder that is sent."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "training_on_kuberay.py").write_text(TRAINING)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    yield importlib.import_module("training_on_kuberay")
    del sys.modules["training_on_kuberay"]


@pytest.fixture
def storage() -> Iterator[str]:
    """A folder that this process and the Pods see: each of them has a /tmp of its own."""
    with tempfile.TemporaryDirectory(prefix="kfpytorch-ray-test-", dir="/var/tmp") as folder:
        yield folder


@pytest.fixture
def backend(control_plane: Path, namespace: str, operator: KubeRayOperator, storage: str) -> KubeRayBackend:
    """A cluster whose pods are small enough for this machine."""
    small = Resources(cpu="1", mem="1Gi")
    return KubeRayBackend(
        image="registry.example/train:1",
        namespace=namespace,
        kubeconfig=str(control_plane),
        storage=storage,
        requests=small,
        head_requests=small,
    )


def gone(api: Api, namespace: str) -> bool:
    """Whether nothing of a run is left in the cluster."""
    return not any(api.find(kind, namespace) for kind in ("rayjobs", "rayclusters", "jobs", "pods"))


def test_a_function_is_trained_and_its_results_come_home(
    api: Api, namespace: str, training: ModuleType, backend: KubeRayBackend, capsys: Any
) -> None:
    """Two nodes on two worker pods, the user's module sent; the log is followed, and everything is cleaned up."""
    result = launch(training.train, 10, elastic=Elastic(nnodes=2, nproc_per_node=1, backend=backend))
    assert [result[rank].return_value for rank in (0, 1)] == [(21, "0"), (21, "1")]
    output = capsys.readouterr().out
    assert output.count("rank 0 of 2 sums to 21") == 1
    assert output.count("rank 1 of 2 sums to 21") == 1
    wait_until(lambda: gone(api, namespace), "the cluster to be removed")


def test_the_users_exception_comes_home(
    api: Api, namespace: str, training: ModuleType, backend: KubeRayBackend
) -> None:
    """As from any other backend."""
    with pytest.raises(WorkerFailedError, match="no training with 7") as caught:
        launch(training.fail, 7, elastic=Elastic(nnodes=1, nproc_per_node=1, backend=backend))
    assert isinstance(caught.value.__cause__, ValueError)
    wait_until(lambda: gone(api, namespace), "the cluster to be removed")
