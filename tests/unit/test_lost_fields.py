"""What the backends say is lost on the way through Flyte."""

from __future__ import annotations

from typing import Any

import pytest
from flytekit import PodTemplate, Resources
from flytekit.core.resources import ResourceSpec
from flytekit.extras.accelerators import A100

from kfpytorch_ray import CleanPodPolicy, Elastic, Master, PyTorch, RayBackend, RunPolicy, Worker
from kfpytorch_ray.adapters.kubeflow import KubeflowAdapter
from kfpytorch_ray.adapters.raycluster import RayAdapter
from kfpytorch_ray.task_arguments import TaskArguments


def asking(**resources: Any) -> dict[str, Any]:
    return {"resources": ResourceSpec(requests=Resources(**resources), limits=Resources())}


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        (Elastic(run_policy=RunPolicy()), {}, "nnodes=1"),
        (Elastic(2, run_policy=RunPolicy(ttl_seconds_after_finished=0)), {}, "ttl_seconds_after_finished=0"),
        (Elastic(2, run_policy=RunPolicy(backoff_limit=0)), {}, "backoff_limit=0"),
        (Elastic(2), {"accelerator": A100}, "accelerator"),
        (PyTorch(Master(requests=Resources(cpu="1")), Worker(replicas=1)), asking(cpu="4"), "do not reach the worker"),
        (PyTorch(worker=Worker(requests=Resources(mem="1Gi"), replicas=1)), asking(mem="4Gi"), "reach the master"),
    ],
)
def test_what_kubeflow_loses(config: Any, arguments: dict[str, Any], words: str) -> None:
    """As upstream's plugin does; said when it is rendered."""
    assert any(words in text for text in KubeflowAdapter().lost(config, TaskArguments(**arguments)))


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (Elastic(), {}),
        (Elastic(1, run_policy=None), asking(cpu="4")),
        (Elastic(2, run_policy=RunPolicy(CleanPodPolicy.ALL, 1, 1, 1)), {"accelerator": A100, **asking(gpu="1")}),
        (PyTorch(worker=Worker(replicas=1)), asking(gpu="1")),
    ],
)
def test_what_kubeflow_does_not_lose(config: Any, arguments: dict[str, Any]) -> None:
    """Nothing is said of what arrives."""
    assert KubeflowAdapter().lost(config, TaskArguments(**arguments)) == ()


@pytest.mark.parametrize(
    ("config", "arguments", "words"),
    [
        (Elastic(run_policy=RunPolicy(ttl_seconds_after_finished=1)), {}, "ttl_seconds_after_finished"),
        (Elastic(), asking(ephemeral_storage="1Gi"), "ephemeral_storage"),
        (Elastic(), {"accelerator": A100}, "accelerator"),
        (Elastic(), {"pod_template": PodTemplate()}, "pod_template"),
        (Elastic(), {"shared_memory": True}, "shared_memory"),
    ],
)
def test_what_a_ray_that_is_there_loses(config: Any, arguments: dict[str, Any], words: str) -> None:
    """The pod is the driver's, and the nodes were made without the task."""
    (text,) = RayAdapter(RayBackend()).lost(config, TaskArguments(**arguments))
    assert words in text
