"""What the tasks do, whoever runs them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import flytekit
from flytekit import Deck
from flytekit.exceptions.user import FlyteRecoverableException

VARIABLES = ("RANK", "WORLD_SIZE", "OF_THE_TASK", "FLYTE_INTERNAL_EXECUTION_ID", "FLYTE_ATTEMPT_NUMBER")


def sum_of_ranks(base: int) -> int:
    """What all ranks have together; every one of them takes part."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([base + dist.get_rank()])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return int(total.item())


def of_all_ranks(value: str) -> list[str]:
    """What each rank gives, by rank; every one of them takes part."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    values = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    dist.destroy_process_group()
    return values


def report(base: int) -> dict[str, str]:
    """The sum, and what a rank sees of Flyte."""
    context = flytekit.current_context()
    rank = os.environ["RANK"]
    Deck("curve", f"<p>drawn by rank {rank}</p>")
    print("a line that every rank says")
    return {
        "sum": str(sum_of_ranks(base)),
        "execution": context.execution_id.name,
        "raw": context.raw_output_prefix,
        **{name: os.environ.get(name, "unset") for name in VARIABLES},
    }


def resume(steps: int) -> int:
    """Rank 0 writes a checkpoint of ``steps``, and its node is lost; a later attempt returns what was written."""
    if os.environ["RANK"] != "0":
        return 0
    checkpoint = flytekit.current_context().checkpoint
    saved = checkpoint.read()
    if saved is not None:
        return int(saved)
    checkpoint.write(str(steps).encode())
    raise FlyteRecoverableException("the node is pre-empted")


def resume_together(steps: int, told: str) -> int:
    """As ``resume``, but that the others wait for rank 0: they fail as well, once it has told Flyte.

    Args:
        steps: As of ``resume``.
        told: Where rank 0's pod tells of its failure.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    done = torch.tensor(resume(steps))
    try:
        dist.all_reduce(done)
    except RuntimeError:
        while not Path(told).exists():
            time.sleep(0.05)
        raise
    return int(done.item())


def fail(message: str, rank: str = "1", told: str = "") -> int:
    """One rank fails while the others wait for it: they fail as well, because they lose their connection to it.

    Args:
        message: Of the rank that fails.
        rank: Which one.
        told: Where its pod tells of it, without which the others do not fail. They may as soon as they like if empty.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if os.environ["RANK"] == rank:
        raise ValueError(message)
    try:
        dist.all_reduce(torch.ones(1))
    finally:
        while told and not Path(told).exists():
            time.sleep(0.05)
    return 0


def leave_note(folder: str) -> None:
    """Every rank leaves a file."""
    Path(folder, f"rank-{os.environ['RANK']}").touch()


def train_for_ever(folder: str, goodbye_s: float) -> NoReturn:
    """Leaves a file at its start, and one at its end, when it has been asked and taken its time."""
    rank = os.environ["RANK"]

    def say_goodbye(_number: int, _frame: FrameType | None) -> None:
        time.sleep(goodbye_s)
        Path(folder, f"ended-{rank}").touch()
        raise SystemExit(1)

    signal.signal(signal.SIGTERM, say_goodbye)
    Path(folder, f"began-{rank}").touch()
    while True:
        signal.pause()
