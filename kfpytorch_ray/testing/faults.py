"""Faults to inject into a launch that runs on this machine: ranks, agents and nodes that die, stop or are slow.

A rank and an agent are named as users know them and found through their processes, so these work from a thread beside
``launch()``, from another process, and on any Ray whose nodes are on this machine. Cutting a link needs a network of
its own: kfpytorch_ray.testing.NetworkCluster.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from kfpytorch_ray.errors import explain
from kfpytorch_ray.testing.node import Node
from kfpytorch_ray.testing.processes import is_stopped, send
from kfpytorch_ray.testing.running import RunningAgent, RunningRank, running_agents, running_ranks
from kfpytorch_ray.testing.waiting import FaultError, wait_until

_PERIOD_S = 0.1


def kill_rank(rank: int, signum: int = signal.SIGKILL, *, address: str | None = None) -> RunningRank:
    """Send a signal to the worker process of a rank.

    Args:
        rank: Global rank.
        signum: The signal.
        address: Of the Ray cluster meant (``HOST:PORT`` of its GCS). None: the one that this process has joined, else
            any on this machine.

    Returns:
        The rank as it was.

    Raises:
        FaultError: The rank does not run, or more than one launch has such a rank.
    """
    found = find_rank(rank, address=address)
    send(found.pid, signum)
    return found


def kill_agent(node_rank: int, signum: int = signal.SIGKILL, *, address: str | None = None) -> RunningAgent:
    """Send a signal to the process of the agent with a node rank; what is under it is left to end of itself.

    Args:
        node_rank: Of the round that runs now.
        signum: The signal.
        address: As in ``kill_rank``.

    Returns:
        The agent as it was.

    Raises:
        FaultError: No such agent runs workers now, or more than one launch has one.
    """
    found = find_agent(node_rank, address=address)
    send(found.pid, signum)
    return found


def kill_node(node: Node) -> None:
    """Power off a node: SIGKILL to its raylet and at once to everything on it; the files of its agents go with it."""
    node.power_off()


def kill_raylet(node: Node) -> None:
    """SIGKILL to a node's raylet alone: what is under it has to end of itself."""
    send(node.raylet, signal.SIGKILL)


@contextlib.contextmanager
def stop_rank(rank: int, *, address: str | None = None) -> Iterator[RunningRank]:
    """Hold the worker process of a rank by SIGSTOP while the block runs, as if it hung.

    Args:
        rank: Global rank.
        address: As in ``kill_rank``.

    Raises:
        FaultError: As in ``kill_rank``.
    """
    found = find_rank(rank, address=address)
    send(found.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: is_stopped(found.pid), f"rank {rank} to stop", timeout_s=10)
        yield found
    finally:
        send(found.pid, signal.SIGCONT)


@contextlib.contextmanager
def slow_rank(rank: int, share: float = 0.1, *, address: str | None = None) -> Iterator[RunningRank]:
    """Let the worker process of a rank run for a share of the time while the block runs: a straggler.

    Args:
        rank: Global rank.
        share: Of every 0.1 s, more than 0 and less than 1.
        address: As in ``kill_rank``.

    Raises:
        FaultError: As in ``kill_rank``.
        ValueError: ``share`` is out of range.
    """
    if not 0 < share < 1:
        msg = f"share={share!r} is out of range: it is the share of the time that the rank may run, between 0 and 1"
        raise ValueError(msg)
    found = find_rank(rank, address=address)
    over = threading.Event()

    def pulse() -> None:
        while not over.is_set():
            send(found.pid, signal.SIGSTOP)
            time.sleep(_PERIOD_S * (1 - share))
            send(found.pid, signal.SIGCONT)
            over.wait(_PERIOD_S * share)

    thread = threading.Thread(target=pulse, name=f"slow-rank-{rank}", daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        send(found.pid, signal.SIGCONT)


def drain_node(node: Node, *, deadline_s: float = 60.0, preempted: bool = True) -> None:
    """Tell Ray that a node will be taken away, as a cloud's notice of pre-emption does.

    The node stays until what runs on it has ended, at most for ``deadline_s``; then it leaves the cluster. This process
    has to have joined the cluster.

    Args:
        node: The node.
        deadline_s: Seconds until it is gone whatever runs on it.
        preempted: Whether it is pre-empted; otherwise it is idle, and Ray refuses where something runs on it.

    Raises:
        FaultError: Ray refused.
    """
    import ray
    from ray.core.generated import autoscaler_pb2

    reason = "DRAIN_NODE_REASON_PREEMPTION" if preempted else "DRAIN_NODE_REASON_IDLE_TERMINATION"
    gcs: Any = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    accepted, refusal = gcs.drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.Value(reason),  # type: ignore[attr-defined]
        "injected by kfpytorch_ray.testing",
        int((time.time() + deadline_s) * 1000),
    )
    if not accepted:
        raise FaultError(
            explain(
                f"Node {node.node_id} is not drained.", str(refusal), "Drain a node that lives and is not drained yet."
            )
        )


def find_rank(rank: int, *, address: str | None = None) -> RunningRank:
    """The worker process of a rank.

    Args:
        rank: Global rank.
        address: As in ``kill_rank``.

    Raises:
        FaultError: The rank does not run, or more than one launch has such a rank.
    """
    there = running_ranks(address)
    found = [one for one in there if one.rank == rank]
    if len(found) == 1:
        return found[0]
    if found:
        raise _ambiguous(f"Rank {rank}", [one.pid for one in found])
    shown = ", ".join(str(one.rank) for one in there) or "none"
    raise FaultError(
        explain(
            f"Rank {rank} is not running.",
            f"Ranks that run on this machine now: {shown}.",
            "Wait until it runs: wait_until(lambda: reached(step=0, world_size=...), ...).",
        )
    )


def find_agent(node_rank: int, *, address: str | None = None) -> RunningAgent:
    """The agent whose workers have a node rank in the round that runs now.

    Args:
        node_rank: Of the round that runs now.
        address: As in ``kill_rank``.

    Raises:
        FaultError: No such agent runs workers now, or more than one launch has one.
    """
    ranks = running_ranks(address)
    there = {rank.agent.pid: rank.agent for rank in ranks if rank.node_rank == node_rank}
    if len(there) == 1:
        return next(iter(there.values()))
    if there:
        raise _ambiguous(f"The agent with node rank {node_rank}", sorted(there))
    shown = ", ".join(map(str, sorted({rank.node_rank for rank in ranks}))) or "none"
    raise FaultError(
        explain(
            f"No agent with node rank {node_rank} runs workers.",
            f"Node ranks that do now: {shown}; agents on this machine: {len(running_agents(address))}.",
            "Wait until it runs: wait_until(lambda: reached(step=0, world_size=...), ...).",
        )
    )


def _ambiguous(what: str, pids: list[int]) -> FaultError:
    return FaultError(
        explain(
            f"{what} is not one process.",
            f"Several launches run on this machine; it could be any of the processes {pids}.",
            "Name the cluster by address=..., and run one launch on it at a time.",
        )
    )
