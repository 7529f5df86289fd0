"""Tasks of type ``ray``: two nodes of one worker each, which is what the cluster of these tests has."""

from __future__ import annotations

from typing import Any

from flytekit import Resources, task

from in_image import training
from kfpytorch_ray import Elastic, KubeRayBackend

STOP_GRACE_S = 30.0


def on_two_nodes(**options: Any) -> dict[str, Any]:
    """Arguments of ``@task``."""
    backend = KubeRayBackend(stop_grace_s=STOP_GRACE_S, logs="all")
    return {"task_config": Elastic(nnodes=2, backend=backend), "requests": Resources(cpu="1"), **options}


@task(**on_two_nodes(environment={"OF_THE_TASK": "yes"}, enable_deck=True))
def report(base: int) -> dict[str, str]:
    return training.report(base)


@task(**on_two_nodes(enable_deck=True))
def fail(message: str) -> int:
    return training.fail(message)


@task(**on_two_nodes(retries=1))
def resume(steps: int) -> int:
    return training.resume(steps)


@task(**on_two_nodes())
def leave_note(folder: str) -> None:
    training.leave_note(folder)


@task(**on_two_nodes())
def total(base: int) -> int:
    return training.sum_of_ranks(base)
