"""What the ranks do in these tests: they train in step, and note every step where the test can read it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flytekit.exceptions.user import FlyteRecoverableException

import kfpytorch_ray
from kfpytorch_ray import Elastic, RayBackend

_WORK_S = 0.02


@dataclass(frozen=True)
class Trained:
    """One round as its ranks noted it."""

    world_size: int
    restarts: int
    first_step: int
    last_step: int
    pids: dict[int, int]
    left_when_asked: frozenset[int]


class Log:
    """A folder of one launch: the ranks' notes, the checkpoint, and the file that tells them to finish."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def note(self, **what: Any) -> None:
        """Add a line; short ones are not torn apart."""
        with open(Path(self.folder, "notes"), "a") as notes:
            notes.write(json.dumps({"time": time.time(), **what}) + "\n")

    def notes(self) -> list[dict[str, Any]]:
        """All lines that are whole."""
        path = Path(self.folder, "notes")
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def rounds(self) -> list[Trained]:
        """The rounds in which rank 0 made a step, in their order. A round is known by rank 0's process."""
        by_round: dict[int, list[dict[str, Any]]] = {}
        for note in self.notes():
            by_round.setdefault(note["round"], []).append(note)
        return [
            Trained(
                world_size=notes[0]["world"],
                restarts=notes[0]["restarts"],
                first_step=min(note["step"] for note in notes),
                last_step=max(note["step"] for note in notes),
                pids={note["rank"]: note["pid"] for note in notes},
                left_when_asked=frozenset(note["rank"] for note in notes if note["asked"]),
            )
            for notes in by_round.values()
        ]

    def trained(self, rounds: int, world_size: int, steps: int = 3) -> bool:
        """Whether this many rounds have begun, and the last one has this size and made some steps."""
        seen = self.rounds()
        last = seen[-1] if len(seen) == rounds else None
        return (
            last is not None
            and last.world_size == world_size == len(last.pids)
            and last.last_step - last.first_step >= steps
        )

    def finish(self) -> None:
        """Tell the ranks to return."""
        Path(self.folder, "finish").touch()

    @property
    def finished(self) -> bool:
        return Path(self.folder, "finish").exists()

    @property
    def checkpoint(self) -> int:
        path = Path(self.folder, "checkpoint")
        return int(path.read_text()) if path.exists() else 0

    @checkpoint.setter
    def checkpoint(self, step: int) -> None:
        partial = Path(self.folder, f"checkpoint-{os.getpid()}")
        partial.write_text(str(step))
        partial.rename(Path(self.folder, "checkpoint"))

    def at_most_one_step_was_lost(self) -> bool:
        """Whether every round went on where the one before stopped, or one step earlier."""
        return all(
            after.first_step in (before.last_step, before.last_step + 1)
            for before, after in itertools.pairwise(self.rounds())
        )


def train(
    log: Log,
    steps: int | None = None,
    misbehave: Callable[[int, int, int], None] | None = None,
    asking: frozenset[int] | None = None,
) -> int:
    """Count steps together until told to finish or asked to stop; rank 0 writes each to a checkpoint.

    Args:
        log: Where to note them.
        steps: How many; None: until ``log.finish()``.
        misbehave: Called before every step with rank, step and restarts so far.
        asking: The ranks that ask whether they should stop; None: all. They agree on it anyway.

    Returns:
        The last step.
    """
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    step = log.checkpoint
    # A round is known by rank 0's process.
    this_round = torch.tensor(os.getpid())
    dist.broadcast(this_round, 0)
    note = partial(log.note, rank=rank, world=world, pid=os.getpid(), restarts=restarts, round=int(this_round))
    while True:
        asked = (asking is None or rank in asking) and kfpytorch_ray.stop_requested()
        over = log.finished or step == steps
        votes = torch.tensor([int(asked), int(over), 1])
        dist.all_reduce(votes)
        assert votes[2] == world
        if votes[0] or votes[1]:
            break
        if misbehave is not None:
            misbehave(rank, step, restarts)
        step += 1
        # Before the checkpoint: killed in between, the next round makes this step again, and misses none in the notes.
        note(step=step, asked=False)
        if rank == 0:
            log.checkpoint = step
        kfpytorch_ray.progress(step)
        time.sleep(_WORK_S)
    if votes[0]:
        note(step=step, asked=True)
        print(f"leaves after step {step}")
    dist.destroy_process_group()
    return step


def raise_once(rank: int, step: int, restarts: int) -> None:
    """A rank raises in the first round."""
    if (rank, step, restarts) == (1, 3, 0):
        raise ValueError("the data are broken")


def raise_recoverable(rank: int, step: int, restarts: int) -> None:
    """A rank raises in every round, each time further on."""
    if (rank, step) == (1, 3 + 2 * restarts):
        raise FlyteRecoverableException("the data server is away")


def raise_at_once(rank: int, step: int, restarts: int) -> None:
    """A rank raises in every round, before its first step."""
    if rank == 1:
        raise ValueError("no such column")


def wait_for_a_lock_that_nobody_releases(rank: int, step: int, restarts: int) -> None:
    """A rank hangs."""
    if (rank, step) == (1, 3):
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()


def leave_with_zero() -> int:
    """Rank 1 calls sys.exit(0)."""
    if os.environ["RANK"] == "1":
        sys.exit(0)
    return 7


def return_a_lock() -> Any:
    """Rank 1 returns what cannot be pickled."""
    return threading.Lock() if os.environ["RANK"] == "1" else 7


def raise_beside_the_deaf(log: Log) -> None:
    """Rank 1 and a child of its ignore SIGTERM; rank 0 raises once they do."""
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.fork()
        log.note(pid=os.getpid())
        while True:
            signal.pause()
    while len(log.notes()) < 2:
        time.sleep(_WORK_S)
    raise ValueError("the data are broken")


def job(
    nnodes: int | str, *, max_restarts: int = 0, join_timeout_s: float = 120, nproc: int = 1, **options: Any
) -> Elastic:
    """A job on the cluster, with short limits."""
    limits = {"silence_timeout_s": 15.0, "stop_grace_s": 2.0, "checkpoint_grace_s": 20.0, "working_dir": ""}
    backend = RayBackend(**{"resources_per_node": {"CPU": 1.0}, **limits, **options})
    return Elastic(
        nnodes=nnodes,
        nproc_per_node=nproc,
        max_restarts=max_restarts,
        # A range begins with all its nodes: one's agent may import for much longer than another's.
        rdzv_configs={"join_timeout": join_timeout_s, "last_call_timeout": 120},
        backend=backend,
    )
