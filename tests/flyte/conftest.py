"""Flyte end to end, as far as it goes without a Flyte: a folder for its bucket, and a Ray cluster for KubeRay's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from propeller import Attempt

from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
from kfpytorch_ray.testing import HeadCluster, nothing_left, wait_until

DEADLINE_S = 120.0
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@pytest.fixture(scope="session")
def image() -> dict[str, str]:
    """Variables of the image: its search path, with the tasks of these tests."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))}


@pytest.fixture(scope="module")
def head(image: dict[str, str]) -> Iterator[HeadCluster]:
    """The RayCluster of a task: a head that takes nothing but drivers, and two workers."""
    with HeadCluster(nodes=2, cpus=1, env=image) as started:
        yield started


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[..., Attempt]:
    """An attempt of a task; keywords are those of ``FlyteExecution``, and ``settings``."""

    def make(task: Any, settings: Any = None, **execution: Any) -> Attempt:
        prefix = (tmp_path / "metadata" / "n0" / "data").as_uri()
        return Attempt(task, FlyteExecution(prefix=prefix, **execution), settings)

    return make


@pytest.fixture(autouse=True)
def checked(nothing_left_behind: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves nothing behind: here, and on the cluster that it shares, where its jobs have ended as well."""
    with contextlib.ExitStack() as after:
        if "head" in request.fixturenames:
            head: HeadCluster = request.getfixturevalue("head")
            after.enter_context(nothing_left(head.temp_dir, DEADLINE_S))
            after.callback(wait_until, lambda: all_ended(head), "all jobs to end", DEADLINE_S)
        yield


def all_ended(head: HeadCluster) -> bool:
    """Whether no job runs."""
    return all(job["status"] in _ENDED for job in head.jobs())
