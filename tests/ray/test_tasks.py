"""Flyte tasks on Ray: what reaches a worker of the task's context, and what comes home."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import flytekit
import pytest
from flytekit import Deck, Resources, task
from flytekit.core.checkpointer import SyncCheckpoint
from flytekit.core.context_manager import FlyteContextManager, OutputMetadata, OutputMetadataTracker
from flytekit.deck.deck import TimeLineDeck
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException

from kfpytorch_ray import ConfigError, Elastic, Master, PyTorch, RayBackend, RestartPolicy, RunPolicy, Worker

pytestmark = pytest.mark.usefixtures("local_ray")


def test_task_brings_home_value_decks_and_metadata(tmp_path: Path) -> None:
    """Rank 0's value, decks (not its timeline) and output metadata become the task's; checkpoints are the attempt's."""

    @task(
        task_config=Elastic(nnodes=2, nproc_per_node=2, backend="ray"),
        environment={"OF_THE_TASK": "yes"},
        requests=Resources(cpu="2"),
        enable_deck=True,
    )
    def train(steps: int) -> dict[str, str]:
        context = flytekit.current_context()
        rank = os.environ["RANK"]
        Deck("curve", f"<p>rank {rank}</p>")
        earlier = now = None
        if rank == "0":
            earlier = context.checkpoint.read()
            context.checkpoint.write(f"step {steps}".encode())
            now = context.checkpoint.read()
        value = {
            "rank": rank,
            "environment": os.environ["OF_THE_TASK"],
            "prefix": context.raw_output_prefix,
            "earlier": str(earlier),
            "now": str(now),
            "execution": context.execution_id.name,
        }
        FlyteContextManager.current_context().output_metadata_tracker.add(
            value,
            OutputMetadata(
                artifact=None, dynamic_partitions={"rank": rank}, time_partition=None, additional_items=None
            ),
        )
        return value

    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "checkpoint").write_bytes(b"step 3")
    context = FlyteContextManager.current_context()
    parameters = context.user_space_params.builder()
    parameters.checkpoint = SyncCheckpoint(str(tmp_path / "now"), str(earlier / "checkpoint"))
    parameters.raw_output_prefix = str(tmp_path / "raw")
    parameters.decks = []
    tracker = OutputMetadataTracker()
    state = context.execution_state.with_params(user_space_params=parameters.build())
    builder = context.with_execution_state(state).with_output_metadata_tracker(tracker)

    with FlyteContextManager.with_context(builder) as inside:
        value = train.execute(steps=4)
        decks = inside.user_space_params.decks

    assert value["rank"] == "0"
    assert value["environment"] == "yes"
    assert value["prefix"] == str(tmp_path / "raw")
    assert (value["earlier"], value["now"]) == (str(b"step 3"), str(b"step 4"))
    assert [deck.name for deck in decks] == ["curve"]
    assert "rank 0" in decks[0].html
    assert not any(isinstance(deck, TimeLineDeck) for deck in decks)
    assert tracker.get(value).dynamic_partitions == {"rank": "0"}
    assert (tmp_path / "now").exists() or list(tmp_path.glob("now*"))


def test_task_errors_are_flytes() -> None:
    """A user's exception ends as FlyteUserRuntimeException with itself as the cause, a recoverable one as its kind."""

    @task(task_config=Elastic(nproc_per_node=1, backend="ray"))
    def fail(recoverable: bool) -> None:
        if recoverable:
            raise FlyteRecoverableException("later perhaps")
        raise ZeroDivisionError("by hand")

    with pytest.raises(FlyteUserRuntimeException, match=r"rank 0.*ZeroDivisionError: by hand") as caught:
        fail(recoverable=False)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(FlyteRecoverableException, match="later perhaps"):
        fail(recoverable=True)


def test_pytorch_job_finds_what_the_operator_gives() -> None:
    """One process per replica, rank 0 the master with its own resources, the operator's variables, no torchrun."""

    @task(
        task_config=PyTorch(
            master=Master(requests=Resources(cpu="2")),
            worker=Worker(replicas=2, requests=Resources(cpu="1"), restart_policy=RestartPolicy.FAILURE),
            run_policy=RunPolicy(backoff_limit=1),
            backend="ray",
        )
    )
    def train(folder: str) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo")
        first = Path(folder, "failed")
        if dist.get_rank() == 2 and not first.exists():
            first.touch()
            raise RuntimeError("once")
        total = torch.ones(1)
        dist.all_reduce(total)
        names = ("RANK", "WORLD_SIZE", "PET_NNODES", "PET_NODE_RANK", "PYTHONUNBUFFERED")
        return {
            **{name: os.environ[name] for name in names},
            "addresses": os.environ["MASTER_ADDR"] == os.environ["PET_MASTER_ADDR"],
            "ports": os.environ["MASTER_PORT"] == os.environ["PET_MASTER_PORT"],
            "torchelastic": dist.is_torchelastic_launched(),
            "sum": float(total),
        }

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        assert train(folder=folder) == {
            "RANK": "0",
            "WORLD_SIZE": "3",
            "PET_NNODES": "3",
            "PET_NODE_RANK": "0",
            "PYTHONUNBUFFERED": "1",
            "addresses": True,
            "ports": True,
            "torchelastic": False,
            "sum": 3.0,
        }


def test_what_ray_cannot_honour_is_refused_by_name() -> None:
    """Images of replicas, restarts of finished ones and unlimited restarts are problems, reported at once."""
    config = PyTorch(
        master=Master(image="other:latest", restart_policy=RestartPolicy.ALWAYS),
        worker=Worker(replicas=1, restart_policy=RestartPolicy.FAILURE),
        backend=RayBackend(stop_grace_s=-1),
    )
    with pytest.raises(ConfigError) as caught:

        @task(task_config=config)
        def train() -> None: ...

    for field in ("master.image", "master.restart_policy ALWAYS", "run_policy.backoff_limit", "stop_grace_s"):
        assert field in str(caught.value)
