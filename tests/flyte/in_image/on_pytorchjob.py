"""Tasks of type ``pytorch``: two pods of one worker each."""

from __future__ import annotations

from typing import Any

from flytekit import task

from in_image import training
from kfpytorch_ray import Elastic, PyTorch, Worker


def on_two_pods(start_method: str = "spawn", **options: Any) -> dict[str, Any]:
    """Arguments of ``@task`` for torch elastic; forked workers import nothing anew: half of a test's time."""
    return {"task_config": Elastic(nnodes=2, monitor_interval=1, start_method=start_method), **options}


@task(**on_two_pods(environment={"OF_THE_TASK": "yes"}, enable_deck=True))
def report(base: int) -> dict[str, str]:
    return training.report(base)


@task(**on_two_pods(enable_deck=True))
def fail(message: str, rank: str, told: str) -> int:
    return training.fail(message, rank, told)


@task(**on_two_pods("fork", enable_deck=True))
def fail_forked(message: str, rank: str, told: str) -> int:
    return training.fail(message, rank, told)


@task(**on_two_pods("fork"))
def leave_note(folder: str) -> None:
    training.leave_note(folder)


@task(**on_two_pods("fork", retries=1))
def resume(steps: int, told: str) -> int:
    return training.resume_together(steps, told)


@task(**on_two_pods("fork"))
def train_for_ever(folder: str, goodbye_s: float) -> None:
    training.train_for_ever(folder, goodbye_s)


@task(**on_two_pods("fork"))
def total(base: int) -> int:
    return training.sum_of_ranks(base)


@task(task_config=PyTorch(worker=Worker(replicas=1)))
def total_of_replicas(base: int) -> int:
    return training.sum_of_ranks(base)
