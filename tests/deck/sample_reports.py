"""Reports as runs make them, of any size: what is drawn is tested without running anything."""

from __future__ import annotations

import math

from kfpytorch_ray.report.data import (
    Activity,
    Budget,
    Failure,
    Metric,
    NodeFacts,
    Phase,
    RankSamples,
    ReportedNode,
    ReportedRank,
    ReportedRound,
    RunReport,
    Sample,
)

START = 1_790_000_000.0
MIB = 2**20
TRACEBACK = """Traceback (most recent call last):
  File "/root/train.py", line 41, in train
    loss = criterion(model(batch.to(device)), labels)
  File "/root/train.py", line 17, in criterion
    raise ValueError(f"labels go up to {labels.max()}, and the model has {classes} classes")
ValueError: labels go up to 10, and the model has 10 classes
"""
MESSAGE = "ValueError: labels go up to 10, and the model has 10 classes"


def node(number: int, nproc: int, *, gpus: bool = False) -> ReportedNode:
    """An agent that came up after a second."""
    resources: tuple[tuple[str, float], ...] = (("CPU", 4.0 * nproc), ("memory", 64.0 * 1024 * MIB))
    return ReportedNode(
        number=number,
        address=f"10.0.0.{number + 1}",
        started_at=START + 4.0,
        ready_at=START + 6.0 + number % 3 / 5,
        resources=(*resources, ("GPU", float(nproc))) if gpus else resources,
        facts=NodeFacts(
            hostname=f"worker-{number}",
            processor="Xeon 8480",
            cpus=4 * nproc,
            memory_bytes=64 * 1024 * MIB,
            devices=("NVIDIA H100 80GB HBM3",) * nproc if gpus else (),
            versions=(("torch", "2.13.0"), ("python", "3.11.9")),
        ),
    )


def ranks_of(
    nodes: int, nproc: int, began: float, ended: float, *, failing: int | None = None, message: str = MESSAGE
) -> tuple[ReportedRank, ...]:
    """The ranks of a round; with ``failing`` the others are stopped."""
    found = []
    for rank in range(nodes * nproc):
        failed = rank == failing
        outcome = "succeeded" if failing is None else "raised" if failed else "stopped"
        found.append(
            ReportedRank(
                rank=rank,
                local_rank=rank % nproc,
                node=rank // nproc,
                outcome=outcome,
                started_at=began + 0.1,
                called_at=began + 1.2 + rank % 5 / 10,
                ended_at=ended - 0.7 if failed else ended - 0.2,
                exit_code=1 if failed else 0 if failing is None else -15,
                message=message if failed else "stopped with the round" if failing is not None else "",
                traceback=TRACEBACK if failed else "",
                log_tail=tuple(f"epoch {epoch}: loss {2.0 / (epoch + 1):.3f}" for epoch in range(20)),
                step=140 if failed else None,
            )
        )
    return tuple(found)


def samples_of(
    ranks: int, rounds: tuple[ReportedRound, ...], count: int, *, gpus: bool = False
) -> tuple[RankSamples, ...]:
    """Uneven ranks; the last one needs more memory than the others."""
    return tuple(RankSamples(rank, tuple(_samples(rank, ranks, rounds, count, gpus))) for rank in range(ranks))


def _samples(rank: int, ranks: int, rounds: tuple[ReportedRound, ...], count: int, gpus: bool) -> list[Sample]:
    found = []
    for one in rounds:
        for index in range(count):
            part = (index + 0.5) / count
            grown = min(1.0, part * 4)
            found.append(
                Sample(
                    one.index,
                    one.started_at + 1.0 + part * (one.ended_at - one.started_at - 1.5),
                    95 + 20 * math.sin(index / 2 + rank) + 30 * (rank % 3),
                    int((900 + 600 * grown + (900 * part if rank == ranks - 1 else 0)) * MIB),
                    90 + 9 * math.sin(index / 3 + rank) if gpus else None,
                    int((20_000 + 40_000 * grown) * MIB) if gpus else None,
                )
            )
    return found


def loss_of(index: int, steps: range) -> Metric:
    """A loss that falls."""
    return Metric(
        "loss", 0, tuple((step, 2.3 * math.exp(-step / 90) + 0.05 * math.sin(step + index)) for step in steps)
    )


def success(nodes: int = 2, nproc: int = 2, *, gpus: bool = False, count: int = 40) -> RunReport:
    """One round, which succeeded, with metrics."""
    ended = START + 66.0
    accuracy = Metric("accuracy", 0, tuple((step, 1 - 0.9 * math.exp(-step / 60)) for step in range(0, 300, 5)))
    one = ReportedRound(
        index=0,
        started_at=START + 6.5,
        ended_at=ended,
        ending="every rank returned",
        succeeded=True,
        nodes=tuple(range(nodes)),
        ranks=ranks_of(nodes, nproc, START + 6.5, ended),
        metrics=(loss_of(0, range(300)), accuracy),
    )
    return RunReport(
        name="train_digits",
        run_id="launch-5f1c09aa",
        backend="ray",
        started_at=START,
        ended_at=ended + 0.8,
        nodes=tuple(node(number, nproc, gpus=gpus) for number in range(nodes)),
        phases=_phases(START + 6.5, ended),
        rounds=(one,),
        samples=samples_of(nodes * nproc, (one,), count, gpus=gpus),
        budgets=(Budget("max_restarts", 0, 3), Budget("max_node_failures", 0, 3)),
        versions=(("kfpytorch_ray", "0.1.0"), ("torch", "2.13.0"), ("ray", "2.60.0"), ("python", "3.11.9")),
    )


def failure(nodes: int = 2, nproc: int = 2, *, message: str = MESSAGE) -> RunReport:
    """Two rounds, the second of which failed, too, and spent the budget."""
    first, second = START + 30.0, START + 48.0
    world = nodes * nproc
    failing = world - 1
    rounds = (
        ReportedRound(
            0, START + 6.5, first, "a rank failed", False, tuple(range(nodes)),
            ranks_of(nodes, nproc, START + 6.5, first, failing=failing, message=message), failing,
            "1 of 1 restarts (max_restarts)", (loss_of(0, range(140)),),
        ),
        ReportedRound(
            1, first + 0.6, second, "a rank failed", False, tuple(range(nodes)),
            ranks_of(nodes, nproc, first + 0.6, second, failing=failing, message=message), failing,
            "not tried again: max_restarts is spent", (loss_of(1, range(100, 240)),),
        ),
    )  # fmt: skip
    text = (
        f"train_digits failed in round 1: rank {failing} (local rank {nproc - 1} on node {nodes - 1}, 10.0.0.{nodes}): "
        f"{message}\nWhy: it raised while running the function, exit code 1. 1 of {world} ranks failed this way.\n"
        "Fix: Correct what the message names. Restarts used: 1 of 1 (max_restarts); nodes lost: 0 of 3 "
        f"(max_node_failures).\n\nTraceback of rank {failing}:\n{TRACEBACK}"
    )
    return RunReport(
        name="train_digits",
        run_id="f3b1c2d4e5a697",
        backend="kuberay",
        started_at=START,
        ended_at=second + 0.8,
        nodes=tuple(node(number, nproc) for number in range(nodes)),
        phases=(*_phases(START + 6.5, second), Phase(Activity.WAITING, first, first + 0.6)),
        rounds=rounds,
        samples=samples_of(world, rounds, 20),
        budgets=(Budget("max_restarts", 1, 1), Budget("max_node_failures", 0, 3)),
        failure=Failure("WorkerFailedError", text, retryable=False),
        versions=(("kfpytorch_ray", "0.1.0"), ("torch", "2.12.0"), ("ray", "2.60.0"), ("python", "3.11.9")),
    )


def never_placed() -> RunReport:
    """No node was had."""
    text = "train_digits: 4 nodes were not ready within 60 s.\nWhy: 1 of 4 nodes are placed.\nFix: Ask for less."
    return RunReport(
        name="train_digits",
        run_id="launch-1",
        backend="ray",
        started_at=START,
        ended_at=START + 61.0,
        phases=(Phase(Activity.JOINING, START, START + 1.0), Phase(Activity.PLACING, START + 1.0, START + 61.0)),
        failure=Failure("PlacementTimeoutError", text, retryable=True),
    )


def _phases(first_round: float, last_end: float) -> tuple[Phase, ...]:
    return (
        Phase(Activity.JOINING, START, START + 2.4),
        Phase(Activity.PLACING, START + 2.4, START + 4.0),
        Phase(Activity.AGENTS, START + 4.0, first_round),
        Phase(Activity.ENDING, last_end, last_end + 0.8),
    )
