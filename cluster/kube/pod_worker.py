"""What torch elastic starts in a pod of a PyTorchJob for every rank, and what a ``PyTorch`` job's process is itself.

The function is unpickled and called here, under the run's Flyte context; its result is left as a file that the pod's
own process uploads, a failure as another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfpytorch_ray.cluster.pickling import dump_result_parts
from kfpytorch_ray.cluster.spool import spool
from kfpytorch_ray.cluster.worker_failure import failures_written
from kfpytorch_ray.flyte_files import upload_files
from kfpytorch_ray.flyte_worker import run_in_flyte_context
from kfpytorch_ray.plan import FlyteContext
from kfpytorch_ray.results import Stage


@dataclass(frozen=True, slots=True)
class Returned:
    """A rank that has returned.

    Attributes:
        rank: Global rank.
        local_rank: On its node.
        node_rank: Of its node.
        world_size: Ranks of the round.
        restarts: Of the worker group before this round.
        result: File with its spooled result.
    """

    rank: int
    local_rank: int
    node_rank: int
    world_size: int
    restarts: int
    result: str


@dataclass(frozen=True, slots=True)
class Places:
    """Where a rank leaves things.

    Attributes:
        failures: Folder for failures.
        results: Folders for results, best first.
    """

    failures: str
    results: tuple[str, ...]

    @property
    def world(self) -> Path:
        """The file with the number of ranks of the last round."""
        return Path(self.failures, "world")

    def failure(self, rank: int) -> Path:
        """The file with a rank's failure."""
        return Path(self.failures, f"failure-{rank}")


def train(load: Callable[[], Callable[[], Any]], flyte: FlyteContext, places: Places) -> Returned:
    """Call the user's function in this process, whose environment says which rank it is.

    Args:
        load: Unpickles the call.
        flyte: The Flyte context.
        places: Where its result, or its failure, is left.

    Raises:
        Exception: What the function raises.
    """
    rank = int(os.environ["RANK"])
    failure = places.failure(rank)
    # Of the round before.
    failure.unlink(missing_ok=True)
    places.world.write_text(os.environ["WORLD_SIZE"])

    def load_and_call() -> Any:
        with failures_written(failure, Stage.LOAD):
            call = load()
        return call()

    with failures_written(failure, Stage.CALL):
        result = run_in_flyte_context(load_and_call, flyte, upload_files)
    with failures_written(failure, Stage.RESULT):
        path = spool(dump_result_parts(result), places.results, f"rank-{rank}")
    return Returned(
        rank=rank,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        node_rank=int(os.environ.get("GROUP_RANK", rank)),
        world_size=int(os.environ["WORLD_SIZE"]),
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        result=str(path),
    )
