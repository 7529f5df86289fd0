"""examples/rayjob.yaml: valid, lawful, of the shape that its script asks for, and near to what ``render`` gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from crd_schema import ray_job_crds

from kfpytorch_ray import Elastic, KubeRayBackend
from kfpytorch_ray.backends import BACKEND_VARIABLE
from kfpytorch_ray.cluster.kube.kuberay_rules import problems
from kfpytorch_ray.rendering import render

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MANIFEST = yaml.safe_load((EXAMPLES / "rayjob.yaml").read_text())
CLUSTER = MANIFEST["spec"]["rayClusterSpec"]


def script() -> Any:
    """The module that the manifest runs, without running it."""
    name = Path(MANIFEST["spec"]["entrypoint"].split()[-1]).name
    spec = importlib.util.spec_from_file_location("script", EXAMPLES / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_valid_for_every_kuberay(crds: Path) -> None:
    """By the definition of each version, in which unknown fields are mistakes."""
    assert {version: crd.problems(MANIFEST) for version, crd in ray_job_crds().items()} == {
        version: [] for version in ray_job_crds()
    }


def test_kuberay_would_run_it() -> None:
    """By KubeRay's own rules, which its schema does not say."""
    assert problems(MANIFEST) == ()


def test_it_has_the_nodes_that_its_script_asks_for() -> None:
    """A worker pod for each node, with a CPU for each rank; the head can hold none."""
    asked = script().ELASTIC
    (group,) = CLUSTER["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert (group["replicas"], int(container["resources"]["requests"]["cpu"])) == (asked.nnodes, asked.nproc_per_node)
    assert CLUSTER["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


def test_it_has_the_cluster_that_render_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods and counts are those of a task with the same nodes and resources; only how the code gets there differs."""
    from flytekit import Resources, task

    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    backend = KubeRayBackend(image="registry.example/train:1", storage="s3://bucket/prefix", ray_version="2.60.0")
    amounts = Resources(cpu="2", mem="4Gi")

    @task(task_config=Elastic(nnodes=2, nproc_per_node=2, backend=backend), requests=amounts, limits=amounts)
    def train() -> None:
        pass

    (rendered,) = render(train, None, "kubernetes").manifests
    assert skeleton(rendered["spec"]["rayClusterSpec"]) == skeleton(CLUSTER)
    for name in ("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit"):
        assert rendered["spec"][name] == MANIFEST["spec"][name]


def skeleton(cluster: dict[str, Any]) -> list[Any]:
    """Of a cluster, without what is a matter of taste."""
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [
        [group.get("replicas"), group["rayStartParams"], container["name"], container["image"], container["resources"]]
        for group in groups
        for container in group["template"]["spec"]["containers"]
    ]
