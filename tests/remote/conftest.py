"""A Ray cluster that is reached over HTTP alone, and a check that every test leaves nothing behind, there and here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfpytorch_ray.testing import HeadCluster, Laptop, nothing_left, unavailable, wait_until

DEADLINE_S = 120.0
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@pytest.fixture(scope="session")
def package() -> dict[str, str]:
    """The variable, if there is one, that has a cluster use the same kfpytorch_ray as these tests."""
    return {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


@pytest.fixture(scope="module")
def head(package: dict[str, str]) -> Iterator[HeadCluster]:
    """A head, and two nodes of four CPUs each. A test that breaks it starts one of its own."""
    with HeadCluster(nodes=2, cpus=4, env=package) as started:
        yield started


@pytest.fixture(scope="module")
def laptop() -> Iterator[Laptop]:
    """A place with a network of its own, whose link to ``far_head`` can be cut."""
    if reason := unavailable():
        pytest.skip(reason)
    with Laptop() as made:
        yield made


@pytest.fixture(scope="module")
def far_head(laptop: Laptop, package: dict[str, str]) -> Iterator[HeadCluster]:
    """A head like ``head``, which the laptop reaches as well."""
    with HeadCluster(nodes=2, cpus=4, env=package, host=laptop.gateway) as started:
        yield started


@pytest.fixture
def storage(tmp_path: Path) -> str:
    """A folder that this process and the cluster share, as a URI; it is not there yet."""
    return (tmp_path / "storage").as_uri()


@pytest.fixture(autouse=True)
def checked(nothing_left_behind: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves nothing behind: here, and on the cluster that it shares, where its jobs have ended as well."""
    with contextlib.ExitStack() as after:
        for name in {"head", "far_head"} & set(request.fixturenames):
            head: HeadCluster = request.getfixturevalue(name)
            after.enter_context(nothing_left(head.temp_dir, DEADLINE_S))
            after.callback(wait_until, lambda head=head: all_ended(head), "all jobs to end", DEADLINE_S)
        yield


def all_ended(head: HeadCluster) -> bool:
    """Whether no job runs."""
    return all(job["status"] in _ENDED for job in head.jobs())
