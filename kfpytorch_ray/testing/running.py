"""What runs on this machine: agents, found by the mark that their processes carry, and ranks, by their heartbeat."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from kfpytorch_ray.heartbeat import MARK_VARIABLE, PAGE_NAME, HeartbeatPage
from kfpytorch_ray.testing.processes import all_processes, command, environment, is_running, parent


@dataclass(frozen=True, slots=True)
class RunningAgent:
    """An agent that lives on this machine.

    Attributes:
        pid: Of its actor's process.
        raylet: Process id of its Ray node.
        folders: Its own, the first of which holds the heartbeat page.
    """

    pid: int
    raylet: int
    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunningRank:
    """A worker process that lives on this machine.

    Attributes:
        rank: Global rank.
        local_rank: Rank on its node.
        node_rank: Rank of its node.
        pid: Its process id; it leads a process group of its own.
        round_index: Of the round that it belongs to.
        step: The last one that it told ``kfpytorch_ray.progress()`` in this round; None if it told none.
        agent: The agent that it belongs to.
    """

    rank: int
    local_rank: int
    node_rank: int
    pid: int
    round_index: int
    step: int | None
    agent: RunningAgent


def running_agents(address: str | None = None) -> tuple[RunningAgent, ...]:
    """The agents on this machine, by process id.

    Args:
        address: Of the Ray cluster (``HOST:PORT`` of its GCS). None: the one that this process has joined, else any.
    """
    cluster = address or _joined_address()
    return tuple(agent for agent in _all_agents() if cluster is None or _belongs(agent.raylet, cluster))


def agents_of(raylet: int) -> tuple[RunningAgent, ...]:
    """The agents of one Ray node, by process id."""
    return tuple(agent for agent in _all_agents() if agent.raylet == raylet)


def processes_of(agent: RunningAgent) -> set[int]:
    """The process of an agent that lives, and everything that carries its mark, also when it is gone."""
    mark = os.pathsep.join((str(agent.pid), *agent.folders))
    marked = {process for process, value in marks().items() if value == mark and is_running(process)}
    return marked | ({agent.pid} if is_running(agent.pid) else set())


def running_ranks(address: str | None = None) -> tuple[RunningRank, ...]:
    """The worker processes on this machine that run now, by rank.

    Args:
        address: As in ``running_agents``.
    """
    found = [rank for agent in running_agents(address) for rank in _ranks_of(agent)]
    return tuple(sorted(found, key=lambda rank: (rank.rank, rank.pid)))


def marks() -> dict[int, str]:
    """The mark of every process that carries one, an agent's guardian included."""
    found = {process: environment(process).get(MARK_VARIABLE) or _guarded(process) for process in all_processes()}
    return {process: mark for process, mark in found.items() if mark}


def reached(step: int, world_size: int, address: str | None = None) -> bool:
    """Whether ``world_size`` ranks run, and each has told ``kfpytorch_ray.progress()`` this step or a later one.

    Args:
        step: The step.
        world_size: Number of ranks, all on this machine.
        address: As in ``running_agents``.
    """
    ranks = running_ranks(address)
    return len(ranks) == world_size and all(rank.step is not None and rank.step >= step for rank in ranks)


def _all_agents() -> list[RunningAgent]:
    found = []
    for mark in set(marks().values()):
        agent, *folders = mark.split(os.pathsep)
        if is_running(pid := int(agent)):
            found.append(RunningAgent(pid, parent(pid), tuple(folders)))
    return sorted(found, key=lambda agent: agent.pid)


def _ranks_of(agent: RunningAgent) -> list[RunningRank]:
    # Somebody else's, or gone meanwhile.
    with contextlib.suppress(OSError, ValueError), HeartbeatPage.open(Path(agent.folders[0], PAGE_NAME)) as page:
        round_index = page.round_index
        beats = page.read()
        if round_index is not None:
            return [
                RunningRank(
                    rank=beat.rank,
                    local_rank=local_rank,
                    # Every node has as many workers.
                    node_rank=(beat.rank - local_rank) // len(beats),
                    pid=beat.pid,
                    round_index=round_index,
                    step=beat.step,
                    agent=agent,
                )
                for local_rank, beat in enumerate(beats)
                if beat.rank is not None and beat.pid is not None and is_running(beat.pid)
            ]
    return []


def _guarded(process: int) -> str:
    """What a guardian guards: it is under no agent, and is told the mark as an argument."""
    _, _, mark = command(process).partition(f" {MARK_VARIABLE}=")
    return mark.partition(" ")[0]


def _belongs(raylet: int, address: str) -> bool:
    return f"--gcs-address={address}" in command(raylet).split()


def _joined_address() -> str | None:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    return str(ray.get_runtime_context().gcs_address)
