"""What ranks run, the same for every contender. Only torch and the standard library, imported where they are used."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from benchmarks.marks import mark, marks

MIB = 2**20
STATE_BYTES = 1024 * MIB
SHARD_BYTES = 64 * MIB
_LAYERS = 16


def trivial(folder: str) -> float:
    """A line, and one all_reduce."""
    import torch
    import torch.distributed as dist

    mark(folder, "line")
    dist.init_process_group("gloo")
    value = torch.ones(1)
    dist.all_reduce(value)
    dist.destroy_process_group()
    return float(value)


def line(folder: str) -> None:
    """A line, after torch is imported."""
    import torch  # noqa: F401

    mark(folder, "line")


def one_dies(folder: str) -> None:
    """In the first round the last rank kills itself while the others wait for it in a collective."""
    import torch.distributed as dist

    mark(folder, "line")
    if marks(folder, "kill"):
        return
    dist.init_process_group("gloo")
    dist.barrier()
    if dist.get_rank() == dist.get_world_size() - 1:
        mark(folder, "kill")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def until_told(folder: str) -> None:
    """Waits in a collective until somebody leaves the mark ``kill``; comes back at once in later rounds."""
    import torch.distributed as dist

    mark(folder, "line")
    if marks(folder, "kill"):
        return
    dist.init_process_group("gloo")
    dist.barrier()
    mark(folder, "waits")
    if dist.get_rank() == 0:
        time.sleep(600)
    dist.barrier()


def state_dict(folder: str) -> Any:
    """Rank 0 returns a state dict of 1 GiB, the others nothing."""
    import torch

    if os.environ["RANK"] != "0":
        return None
    state = {f"layer-{number}": torch.ones(STATE_BYTES // _LAYERS // 4) for number in range(_LAYERS)}
    mark(folder, "return")
    return state


def shard(folder: str) -> Any:
    """Every rank returns 64 MiB."""
    import torch

    value = torch.ones(SHARD_BYTES // 4)
    mark(folder, "return")
    return value


def digits_steps(folder: str) -> float:
    """Steps per second of the digits CNN under DDP, after a few to warm up."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )
    model = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(model.parameters())
    images, labels = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    began, steps = 0.0, 600
    for step in range(-100, steps):
        if step == 0:
            dist.barrier()
            began = time.perf_counter()
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rate = steps / (time.perf_counter() - began)
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        mark(folder, f"rate:{rate:.6f}")
    return rate
