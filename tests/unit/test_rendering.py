"""``render()``: what becomes of a task, and that nothing of the task changes by asking."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import flytekitplugins.kfpytorch as upstream
import pytest
from flytekit import Resources, map_task, task, workflow
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.tools.translator import get_serializable

from kfpytorch_ray import ConfigError, Elastic, KubeRayBackend, PyTorch, RunPolicy, Worker
from kfpytorch_ray.backends import BACKEND_VARIABLE
from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
from kfpytorch_ray.cluster.kube.flyte_rayjob import ray_job
from kfpytorch_ray.rendering import render, task_template
from kfpytorch_ray.task import PytorchElasticFunctionTask

IMAGE = Image(name="default", fqn="registry.example/train", tag="1")
SETTINGS = SerializationSettings(
    project="p", domain="d", version="v1", image_config=ImageConfig(default_image=IMAGE, images=[IMAGE])
)


def train(x: int) -> int:
    """Train."""
    return x


@pytest.mark.parametrize(
    ("config", "backend", "kind"),
    [
        (Elastic(2), None, "PyTorchJob"),
        (Elastic(1), None, "Pod"),
        (PyTorch(worker=Worker(replicas=1)), None, "PyTorchJob"),
        (Elastic(2), "kuberay", "RayJob"),
        (Elastic(2, backend="kuberay"), None, "RayJob"),
        (Elastic(2, backend="kuberay"), "kubeflow", "PyTorchJob"),
        (Elastic(2), KubeRayBackend(idle_timeout_s=9), "RayJob"),
        (Elastic(2), "ray", "Pod"),
    ],
)
def test_each_backend_has_its_kind(config: Any, backend: Any, kind: str) -> None:
    """The backend that is asked for wins over the task's own."""
    (manifest,) = render(task(task_config=config)(train), backend).manifests
    assert manifest["kind"] == kind


def test_the_task_stays_as_it_is() -> None:
    """What is registered afterwards is what would have been without asking."""
    made: Any = task(task_config=Elastic(2), environment={BACKEND_VARIABLE: "kubeflow"})(train)
    before = render(made)
    moved = render(made, "kuberay")
    assert {"name": BACKEND_VARIABLE, "value": "kuberay"} in moved.manifests[0]["spec"]["submitterPodTemplate"]["spec"][
        "containers"
    ][0]["env"]
    assert moved.lost != before.lost
    assert render(made) == before
    assert made.task_config == Elastic(2)


def test_upstreams_config_moves_by_name() -> None:
    """It has no field for a backend, so the choice is in the environment."""
    made = PytorchElasticFunctionTask(upstream.Elastic(nnodes=2), train)
    (manifest,) = render(made, "kuberay").manifests
    assert manifest["kind"] == "RayJob"
    assert render(made).manifests[0]["kind"] == "PyTorchJob"


def test_the_options_of_the_backend_are_rendered() -> None:
    """An options object does what it does in the config."""
    made: Any = task(task_config=Elastic(2))(train)
    backend = KubeRayBackend(head_requests=Resources(cpu="3", mem="5Gi"))
    cluster = render(made, backend).manifests[0]["spec"]["rayClusterSpec"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert head["resources"]["requests"] == {"cpu": "3", "memory": "5Gi"}


@pytest.mark.parametrize("backend", ["kubeflow", "kuberay"])
@pytest.mark.parametrize("via", ["flyte", "kubernetes"])
def test_a_deadline_of_0_is_none(backend: str, via: Any) -> None:
    """As Flyte takes it, whose messages cannot tell it from one that is not given; what is lost with one is not."""
    zero, none = (
        render(task(task_config=Elastic(2, run_policy=RunPolicy(active_deadline_seconds=seconds)))(train), backend, via)
        for seconds in (0, None)
    )
    assert zero.manifests == none.manifests
    assert [line for line in zero.lost if "=0 has no effect" not in line] == list(none.lost)


def test_what_cannot_be_rendered_is_refused(double: Any) -> None:
    """No such task, no such way, a backend that says nothing of Flyte, a config that the backend refuses."""
    plain: Any = task(train)
    made: Any = task(task_config=Elastic(start_method="fork"))(train)
    for arguments, words in (
        ((plain,), "no task with"),
        ((train,), "no task with"),
        ((made, None, "pigeon"), "via='pigeon'"),
        ((made, "double"), "creates nothing on the way 'flyte'"),
        ((made, "ray", "kubernetes"), "creates nothing on the way 'kubernetes'"),
        ((made, KubeRayBackend(idle_timeout_s=0)), "idle_timeout_s"),
    ):
        with pytest.raises(ConfigError, match=words):
            render(*arguments)


def test_rendering_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    """It works where tasks are registered."""
    code = """
import sys
from flytekit import task
from kfpytorch_ray import Elastic
from kfpytorch_ray.rendering import render
def train(x: int) -> int:
    return x
for backend in ("kuberay", "kubeflow", "ray"):
    render(task(task_config=Elastic(2))(train), backend)
render(task(task_config=Elastic(2))(train), "kuberay", "kubernetes")
print(sorted({"ray", "torch"} & set(sys.modules)))
"""
    script = tmp_path / "flow.py"  # flytekit reads a task's source
    script.write_text(code)
    command = [sys.executable, "-c", "import flow"]
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_map_of_a_task_is_the_same_rayjob() -> None:
    """flytekit's map task hands on what the task says; its empty arguments survive the shell."""
    made: Any = task(task_config=Elastic(2, backend="kuberay"), requests=Resources(gpu="1"))(train)
    template = task_template(map_task(made))
    job = ray_job(template, FlyteExecution())
    assert template["type"] == "ray"
    assert " -- vars '' resolver " in job["spec"]["entrypoint"]
    own = render(made).manifests[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == own["replicas"] == 2


def test_a_nodes_overrides_reach_the_submitting_pod_only() -> None:
    """As ``render`` says of every task on KubeRay: flytekit sends them beside the task's template."""
    made: Any = task(task_config=Elastic(2, backend="kuberay"), requests=Resources(cpu="4", mem="8Gi"))(train)

    @workflow
    def flow() -> int:
        result: int = made(x=1).with_overrides(requests=Resources(cpu="9"), limits=Resources(cpu="9"))
        return result

    (node,) = get_serializable(OrderedDict(), SETTINGS, flow).template.nodes
    assert node.task_node.overrides.resources.requests[0].value == "9"
    worker = render(made, settings=SETTINGS).manifests[0]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == {"cpu": "4", "memory": "8Gi"}
