"""What tests train on KubeRay: copied into the folder that is sent."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist


def train(base: int) -> tuple[int, str]:
    """The sum of ``base`` and the rank over all ranks, and this rank's node."""
    dist.init_process_group("gloo")
    total = torch.tensor([base + dist.get_rank()])
    dist.all_reduce(total)
    print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "sums to", total.item())
    return int(total.item()), os.environ["GROUP_RANK"]


def fail(base: int) -> None:
    raise ValueError(f"no training with {base}")


def hold(folder: str) -> str:
    """Begins, and ends when it is let go."""
    rank = os.environ["RANK"]
    print("rank", rank, "has begun", flush=True)
    Path(folder, f"begun-{rank}").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.05)
    return f"let go as {rank}"


def grow(folder: str) -> int:
    """Ends in the first round with more than one worker."""
    world = int(os.environ["WORLD_SIZE"])
    Path(folder, f"world-{world}").touch()
    while world == 1:
        time.sleep(0.05)
    return world
