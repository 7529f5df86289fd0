"""Ray Train v2's TorchTrainer, on a Ray that is up."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

from benchmarks import trainings
from benchmarks.driver import serve
from benchmarks.lost_node import NODES, recovery
from benchmarks.marks import mark, wait_for

WORKERS = 4


@functools.cache
def _ray() -> None:
    import ray

    ray.init(address="local", num_cpus=16, include_dashboard=False, logging_level="ERROR", log_to_driver=False)


def loop(config: dict[str, str]) -> None:
    """What Train calls in every worker. It joins the process group itself, which the functions do as well."""
    import torch.distributed as dist
    from ray import train

    os.environ["RANK"] = str(train.get_context().get_world_rank())
    # The line is what a user's function begins with.
    mark(config["folder"], "user-line")
    dist.destroy_process_group()
    getattr(trainings, config["name"])(config["folder"])


def _fit(name: str, folder: str, workers: int, failures: int = 0, **placement: Any) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        loop,
        train_loop_config={"name": name, "folder": folder},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}, **placement),
        run_config=RunConfig(
            name=Path(folder).name, storage_path=f"{folder}-train", failure_config=FailureConfig(max_failures=failures)
        ),
    ).fit()


def start(folder: str) -> dict[str, float]:
    """Seconds from call to the last rank's first line, and to the return of a trivial task."""
    _ray()
    began = time.time()
    _fit("trivial", folder, WORKERS)
    whole = time.time() - began
    return {"line": wait_for(folder, "user-line", WORKERS)[-1].at - began, "whole": whole}


def restart(folder: str) -> float:
    """Seconds from SIGKILL of a rank to the first line of all ranks in the next round."""
    _ray()
    _fit("one_dies", folder, WORKERS, failures=3)
    (killed,) = wait_for(folder, "kill", 1)
    return wait_for(folder, "user-line", WORKERS, after=killed.at)[-1].at - killed.at


def lost_node(folder: str) -> dict[str, float]:
    """Seconds from SIGKILL of one of three raylets, and from Ray's report of it, to the next round's first line."""
    from kfpytorch_ray.testing.processes import descendants

    _ray.cache_clear()
    return recovery(
        folder,
        lambda: _fit("until_told", folder, NODES, failures=3, placement_strategy="SPREAD"),
        lambda pid, node: pid in descendants(node.raylet),
        "user-line",
        NODES,
    )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve({scenario.__name__: scenario for scenario in (start, restart, lost_node)})
