"""Results that the object store has no room for: they come home all the same, more slowly."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial

import pytest
import ray
import torch

from kfpytorch_ray import Elastic, RayBackend, launch
from kfpytorch_ray.testing.starting import start_ray

pytestmark = pytest.mark.timeout(300)

MIB = 2**20
STORE_BYTES = 80 * MIB


@pytest.fixture(scope="module", autouse=True)
def small_store() -> Iterator[None]:
    """A Ray whose object store holds one of the results below, and no more."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    start = partial(
        ray.init,
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        _temp_dir=folder,
    )
    start_ray(start, undo=ray.shutdown)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def filled(size_bytes: int) -> torch.Tensor:
    return torch.full((size_bytes,), int(os.environ["RANK"]) + 1, dtype=torch.uint8)


def test_all_together_are_larger_than_the_store() -> None:
    """Each waits for room or goes to disk; none is lost, whichever is asked for first."""
    elastic = Elastic(nnodes=2, nproc_per_node=2, backend=RayBackend())
    result = launch(filled, 48 * MIB, elastic=elastic)
    for rank in (3, 0, 2, 1):
        value = result[rank].return_value
        assert value.nbytes == 48 * MIB
        assert bool((value == rank + 1).all())


def test_one_alone_is_larger_than_the_store() -> None:
    """And one of nothing comes beside it."""
    elastic = Elastic(nnodes=2, backend=RayBackend())
    result = launch(lambda: filled(2 * STORE_BYTES if os.environ["RANK"] == "0" else 0), elastic=elastic)
    large, nothing = (result[rank].return_value for rank in range(2))
    assert large.nbytes == 2 * STORE_BYTES
    assert bool((large == 1).all())
    assert nothing.shape == (0,)
