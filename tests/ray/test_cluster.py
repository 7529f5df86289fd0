"""Real clusters of several Ray nodes on this machine, each node with raylet and resources of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flytekit
import pytest
import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.cluster_utils import Cluster

from kfpytorch_ray import Elastic, InfeasibleError, PlacementTimeoutError, RayBackend, launch
from kfpytorch_ray.cluster import controller
from kfpytorch_ray.config import DEFAULT_CARRIED_ENVIRONMENT
from kfpytorch_ray.testing import meanwhile, wait_until
from kfpytorch_ray.testing.starting import start_ray


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without CPUs, as KubeRay has it, and two nodes with two GPUs each."""
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = start_ray(lambda: Cluster(initialize_head=True, head_node_args=head))
    for _ in range(2):
        start_ray(lambda: cluster.add_node(num_cpus=4, num_gpus=2))
    ray.init(address=cluster.address)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def whereabouts() -> dict[str, Any]:
    """Where a worker runs."""
    ancestor = os.getppid()
    while "ray::ElasticAgent" not in (title := Path(f"/proc/{ancestor}/cmdline").read_text()):
        ancestor = int(Path(f"/proc/{ancestor}/stat").read_text().rsplit(")", 1)[1].split()[1])
        assert ancestor > 1, title
    return {
        "agent": ancestor,
        "group": os.environ["GROUP_RANK"],
        "local": os.environ["LOCAL_RANK"],
        "world": os.environ["WORLD_SIZE"],
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def on(nnodes: int | str, nproc: int = 1, join_timeout: float = 60, **amounts: float) -> Elastic:
    """A job on the cluster."""
    resources = {"CPU": 1.0, **amounts}
    backend = RayBackend(resources_per_node=resources)
    # One node's agent may import for much longer than the other's.
    timeouts = {"join_timeout": join_timeout, "last_call_timeout": 120}
    return Elastic(nnodes=nnodes, nproc_per_node=nproc, rdzv_configs=timeouts, backend=backend)


def test_every_node_is_a_ray_node_of_its_own(two_nodes: Cluster) -> None:
    """One agent per Ray node although one could hold both, with the bundle's GPUs, which LOCAL_RANK indexes."""
    places = []

    def work() -> tuple[dict[str, Any], str]:
        raylet = Path(f"/proc/{whereabouts()['agent']}/stat").read_text().rsplit(")", 1)[1].split()[1]
        return whereabouts(), raylet

    import cloudpickle

    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["x"]))
    result = launch(work, elastic=on(2, nproc=2, GPU=2))
    places = [result[rank].return_value for rank in range(4)]
    assert [place["local"] for place, _ in places] == ["0", "1", "0", "1"]
    assert [place["group"] for place, _ in places] == ["0", "0", "1", "1"]
    assert {place["devices"] for place, _ in places} == {"0,1"}
    assert len({raylet for _, raylet in places}) == 2


def test_more_nodes_than_there_are_is_refused_at_once(two_nodes: Cluster) -> None:
    """The cluster could hold three agents, but not on three nodes."""
    with pytest.raises(InfeasibleError, match="3 nodes") as caught:
        launch(int, elastic=on(3))
    assert "3 Ray node(s)" in str(caught.value)


def test_range_starts_with_the_nodes_that_are_there(two_nodes: Cluster) -> None:
    """``nnodes="1:4"`` does not wait for four nodes."""

    def work() -> str:
        return os.environ["WORLD_SIZE"]

    assert launch(work, elastic=on("1:4"))[0].return_value == "2"


def test_busy_nodes_are_waited_for_and_named_at_the_join_timeout(
    two_nodes: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Demand that fits the cluster but not now ends with what is free, may be tried again, and was told all along."""
    monkeypatch.setattr(controller, "REPORT_INTERVAL_S", 0.2)
    holder = ray.util.placement_group([{"CPU": 4}])
    assert holder.wait(30)
    try:
        with pytest.raises(PlacementTimeoutError, match=r"0 of 2 nodes are placed: .* 1 would fit now") as caught:
            launch(int, elastic=on(2, join_timeout=5))
    finally:
        ray.util.remove_placement_group(holder)
    assert caught.value.retryable
    why = next(line for line in str(caught.value).splitlines() if line.startswith("Why: ")).removeprefix("Why: ")
    assert "Missing: 1 x {CPU: 1}; the nearest node has {" in why
    assert "the largest has {CPU: 4, GPU: 2" in why
    assert any(why in record.getMessage() for record in caplog.records)


def test_nodes_that_are_missing_are_demand_that_an_autoscaler_sees(two_nodes: Cluster, tmp_path: Path) -> None:
    """A range that runs with two of four nodes asks for the other two, as KubeRay's autoscaler reads it."""

    def work(folder: str) -> None:
        import time

        while not Path(folder, "seen").exists():
            time.sleep(0.02)

    def demanded() -> int:
        status = get_cluster_status(two_nodes.address)
        return sum(
            bundle.count
            for group in status.resource_demands.placement_group_demand
            for bundle in group.bundles_by_count
        )

    def look() -> None:
        wait_until(lambda: demanded() == 2, "the demand for two nodes", 60)
        Path(tmp_path, "seen").touch()

    with meanwhile(look):
        result = launch(work, str(tmp_path), elastic=on("1:4"))
    assert result.rounds[0].world_size == 2
    wait_until(lambda: demanded() == 0, "the end of the demand", 60)


def test_a_secret_that_is_carried_can_be_had_in_workers(two_nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Flyte gives it to the driver's pod as a variable; Ray's nodes, which were there before, have no such thing."""
    monkeypatch.setenv("_FSEC_WANDB_KEY", "hush")

    def work() -> str:
        try:
            return str(flytekit.current_context().secrets.get("wandb", "key"))
        except ValueError:
            return "none"

    config = on(1)
    assert launch(work, elastic=config)[0].return_value == "none"
    config.backend.carried_environment = (*DEFAULT_CARRIED_ENVIRONMENT, "_FSEC_*")  # type: ignore[union-attr]
    assert launch(work, elastic=config)[0].return_value == "hush"
