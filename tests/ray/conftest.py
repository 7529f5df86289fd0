"""Real Ray on this machine: one for the tests that can share it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial

import pytest

from kfpytorch_ray.testing.starting import start_ray


@pytest.fixture(autouse=True)
def checked(nothing_left_behind: None) -> None:
    """Every test leaves nothing behind."""


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray that this process started, as a script's ``ray.init()`` does."""
    import ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    start = partial(ray.init, address="local", num_cpus=8, include_dashboard=False, _temp_dir=folder)
    start_ray(start, undo=ray.shutdown)
    yield
    assert [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"] == []
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
