"""What the backends say is lost on the way through Flyte."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from flytekit import PodTemplate, Resources, Secret, task
from flytekit.core.resources import ResourceSpec
from flytekit.extras.accelerators import A100

from kfpytorch_ray import (
    CleanPodPolicy,
    Elastic,
    KubeflowBackend,
    KubeRayBackend,
    Master,
    PyTorch,
    RayBackend,
    RunPolicy,
    Worker,
)
from kfpytorch_ray.adapters.kubeflow import KubeflowAdapter
from kfpytorch_ray.adapters.raycluster import RayAdapter
from kfpytorch_ray.config import DEFAULT_CARRIED_ENVIRONMENT
from kfpytorch_ray.rendering import render
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
        (Elastic(), {"pod_template_name": "gpu-nodes"}, "pod_template_name shapes the driver's pod only"),
        (Elastic(), {"shared_memory": True}, "shared_memory"),
        (Elastic(), {"secrets": (Secret("wandb", "key"),)}, "secret_requests: _FSEC_WANDB_KEY is in the driver's pod"),
    ],
)
def test_what_a_ray_that_is_there_loses(config: Any, arguments: dict[str, Any], words: str) -> None:
    """The pod is the driver's, and the nodes were made without the task."""
    (text,) = RayAdapter(RayBackend()).lost(config, TaskArguments(**arguments))
    assert words in text


AS_FILE = Secret("wandb", "key")
AS_VARIABLE = Secret("wandb", "key", mount_requirement=Secret.MountType.ENV_VAR)
NAMED = Secret("wandb", "key", mount_requirement=Secret.MountType.ENV_VAR, env_var="WANDB_API_KEY")
CARRIED = RayBackend(address="auto", carried_environment=(*DEFAULT_CARRIED_ENVIRONMENT, "_FSEC_*"))


def train() -> int:
    return 1


@pytest.mark.parametrize(
    ("secret", "backend", "arrives"),
    [
        (AS_FILE, RayBackend(address="auto"), False),
        (AS_VARIABLE, RayBackend(address="auto"), False),
        (AS_FILE, CARRIED, False),
        (AS_VARIABLE, CARRIED, True),
        (NAMED, RayBackend(address="auto"), True),
        (AS_FILE, RayBackend(address="local"), True),
    ],
)
def test_who_defines_a_task_is_told_of_secrets_that_workers_will_not_have(
    secret: Secret, backend: RayBackend, arrives: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Flyte gives them to the driver's pod; variables that are carried travel on, files do not."""
    with caplog.at_level(logging.WARNING, logger="kfpytorch_ray"):
        task(task_config=Elastic(backend=backend), secret_requests=[secret])(train)
    assert ("secret_requests" not in caplog.text) == arrives
    assert ("carried_environment=(*DEFAULT_CARRIED_ENVIRONMENT, '_FSEC_WANDB_KEY')" not in caplog.text) == arrives


@pytest.mark.parametrize("backend", [KubeRayBackend(image="i:1"), KubeflowBackend(image="i:1")])
def test_what_only_flyte_looks_up_is_lost_without_it(backend: Any) -> None:
    """Secrets and a PodTemplate of the cluster; and where to give them instead."""
    made = task(task_config=Elastic(2, backend=backend), secret_requests=[AS_FILE], pod_template_name="gpu")(train)
    lost = render(made, via="kubernetes").lost
    (named,) = [text for text in lost if "pod_template_name has no effect" in text]
    (secret,) = [text for text in lost if "secret_requests has no effect" in text]
    assert "'gpu'" in named
    assert "_FSEC_WANDB_KEY" in secret
    assert all("pod_template=PodTemplate(" in text for text in (named, secret))
