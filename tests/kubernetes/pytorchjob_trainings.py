"""What tests train as PyTorchJobs: copied into the folder that is sent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import flytekit
import torch
import torch.distributed as dist


def train(base: int) -> dict[str, Any]:
    """The sum of ``base`` and the rank over all ranks, where this rank is, and a deck."""
    dist.init_process_group("gloo")
    total = torch.tensor([base + dist.get_rank()])
    dist.all_reduce(total)
    dist.destroy_process_group()
    flytekit.Deck("curve", f"<p>drawn by rank {os.environ['RANK']}</p>")
    print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "sums to", total.item(), flush=True)
    return {"sum": int(total.item()), "pod": os.uname().nodename}


def total(base: int) -> int:
    """The sum alone."""
    found: int = train(base)["sum"]
    return found


def fail(rank: str) -> None:
    """One rank raises while the others wait for it, which fail as well: they lose their connection to it."""
    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["RANK"] == rank:
        raise ValueError("no such column: 'price'")
    dist.all_reduce(torch.ones(1))


def hold(folder: str) -> str:
    """Begins, and ends when it is let go, or when it is told to stop."""
    rank = os.environ["RANK"]

    def stop(_number: int, _frame: object) -> None:
        Path(folder, f"stopped-{rank}").touch()
        raise SystemExit(1)

    signal.signal(signal.SIGTERM, stop)
    print("rank", rank, "has begun", flush=True)
    Path(folder, f"begun-{rank}").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.05)
    print("rank", rank, "goes on", flush=True)
    return f"let go as {rank}"
