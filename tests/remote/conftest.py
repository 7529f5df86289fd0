"""A Ray cluster that is reached over HTTP alone, and a check that every test leaves nothing behind, there and here."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfpytorch_ray.runs import CLUSTERS
from kfpytorch_ray.testing import HeadCluster, Laptop, nothing_left, unavailable, wait_until

DEADLINE_S = 120.0
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_HERE = Path(__file__).parent
_heads: list[HeadCluster] = []
_shared = contextlib.ExitStack()
"""What ends with the last test of this folder that comes in one go."""


@pytest.fixture(scope="session")
def package() -> dict[str, str]:
    """The variable, if there is one, that has a cluster use the same kfpytorch_ray as these tests."""
    return {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


@pytest.fixture
def head(package: dict[str, str]) -> HeadCluster:
    """A head, and two nodes of four CPUs each, for all files. A test that breaks it starts one of its own."""
    if not _heads:
        _heads.append(_shared.enter_context(HeadCluster(nodes=2, cpus=4, env=package)))
    return _heads[0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The head costs 13 s of a core to start and one in 20 s to keep: it stays as long as tests of this folder come."""
    if nextitem is None or nextitem.path.parent != _HERE:
        _heads.clear()
        _shared.close()


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


@pytest.fixture(scope="session")
def known_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the storage is that clusters are not asked about again."""
    return tmp_path_factory.mktemp("known")


@pytest.fixture
def storage(known_folder: Path) -> str:
    """A folder that this process and clusters share, as a URI, with nothing but what these have answered about it.

    Only the first launch on each has to ask.
    """
    # Before a test and not after it: its jobs may write until they have ended.
    storage = known_folder / "storage"
    for left in (*known_folder.iterdir(), *storage.glob("*")):
        if left not in (storage, storage / CLUSTERS):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    return storage.as_uri()


@pytest.fixture
def new_storage(tmp_path: Path) -> str:
    """One about which no cluster was asked; it is not there yet."""
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
