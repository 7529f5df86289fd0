"""Nodes that are not there when a launch begins."""

from __future__ import annotations

import pytest
import ray
from training import job

from kfpytorch_ray import InfeasibleError, PlacementTimeoutError, launch
from kfpytorch_ray.testing import LaptopCluster


@pytest.mark.row("not enough nodes within join_timeout")
def test_nodes_are_busy(whole: LaptopCluster) -> None:
    """The error says what is missing and what there is, and Flyte may try again."""
    holder = ray.util.placement_group([{"CPU": 4}])
    assert holder.wait(30)
    try:
        with pytest.raises(PlacementTimeoutError, match="CPU") as caught:
            launch(int, elastic=job(3, join_timeout_s=2))
    finally:
        ray.util.remove_placement_group(holder)
    assert caught.value.retryable


@pytest.mark.row("no node of the cluster can ever hold what is asked")
def test_demand_is_infeasible(whole: LaptopCluster) -> None:
    """It fails at once: more nodes than there are, and more on a node than any has."""
    with pytest.raises(InfeasibleError) as caught:
        launch(int, elastic=job(4, join_timeout_s=100))
    assert not caught.value.retryable
    with pytest.raises(InfeasibleError, match="1000"):
        launch(int, elastic=job(1, join_timeout_s=100, resources_per_node={"CPU": 1000.0}))
