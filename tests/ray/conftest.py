"""Real Ray on this machine: one for the tests that can share it, and a check that every test leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import pytest

from kfpytorch_ray.testing import nothing_left, wait_until

DEADLINE_S = 120.0

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")


@pytest.fixture
def eventually() -> Callable[[Callable[[], object], str], None]:
    """``wait_until`` for tests."""
    return wait_until


@pytest.fixture(scope="session", autouse=True)
def temporary_folder() -> Iterator[str]:
    """A folder for temporary files of these tests' own, so that they see their leftovers and nobody else's."""
    folder = tempfile.mkdtemp(prefix="k", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left_behind(temporary_folder: str) -> Iterator[None]:
    """Every test ends with the processes and files that were there before it."""
    with nothing_left(temporary_folder, DEADLINE_S):
        yield


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder with a path short enough for Ray's sockets."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray that this process started, as a script's ``ray.init()`` does."""
    import ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    ray.init(address="local", num_cpus=8, include_dashboard=False, _temp_dir=folder)
    yield
    assert [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"] == []
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
