"""This project, on a Ray that is up."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from typing import Any

from benchmarks import trainings
from benchmarks.driver import serve
from benchmarks.lost_node import recovery
from benchmarks.marks import mark, wait_for
from benchmarks.memory import PeakMemory

NPROC = 2


@functools.cache
def _ray() -> None:
    import ray

    ray.init(address="local", num_cpus=16, include_dashboard=False, logging_level="ERROR")


def _elastic(warm: bool, *, nnodes: int | str = 2, nproc: int = NPROC, restarts: int = 0, **options: Any) -> Any:
    from kfpytorch_ray import Elastic, RayBackend

    keep_s = 3600.0 if warm else 0.0
    backend = RayBackend(keep_warm_s=keep_s, logs="none", env={"OMP_NUM_THREADS": "1"}, **options)
    return Elastic(nnodes=nnodes, nproc_per_node=nproc, max_restarts=restarts, backend=backend)


def _warm_up(folder: str, **shape: Any) -> Any:
    """Agents of a shape that are warm."""
    from kfpytorch_ray import launch

    elastic = _elastic(True, **shape)
    os.makedirs(f"{folder}-warm-up", exist_ok=True)
    launch(trainings.line, f"{folder}-warm-up", elastic=elastic)
    return elastic


def start(folder: str, warm: bool) -> dict[str, float]:
    """Seconds from call to the last rank's first line, and to the return of a trivial task."""
    from kfpytorch_ray import launch
    from kfpytorch_ray.cluster import warm as kept

    _ray()
    if warm:
        elastic = _warm_up(folder)
    else:
        kept.release_all()
        elastic = _elastic(False)
    began = time.time()
    result = launch(trainings.trivial, folder, elastic=elastic)
    assert result[0].return_value == 2 * NPROC
    whole = time.time() - began
    return {"line": wait_for(folder, "line", 2 * NPROC)[-1].at - began, "whole": whole}


def restart(folder: str) -> float:
    """Seconds from SIGKILL of a rank to the first line of all ranks in the next round."""
    from kfpytorch_ray import launch

    _ray()
    launch(trainings.one_dies, folder, elastic=_warm_up(folder, restarts=1))
    (killed,) = wait_for(folder, "kill", 1)
    return wait_for(folder, "line", 2 * NPROC, after=killed.at)[-1].at - killed.at


def last_death(folder: str) -> float:
    """Seconds from one rank's death to that of the last, on two nodes, all in a collective."""
    from kfpytorch_ray import launch

    _ray()
    elastic = _warm_up(folder, restarts=1)
    ended: dict[int, float] = {}

    def kill() -> None:
        waiting = wait_for(folder, "waits", 2 * NPROC)
        handles = {os.pidfd_open(each.pid): each.pid for each in waiting}
        mark(folder, "kill")
        ended[-1] = time.time()
        os.kill(waiting[-1].pid, signal.SIGKILL)
        import select

        poll = select.poll()
        for handle in handles:
            poll.register(handle, select.POLLIN)
        while len(ended) <= len(handles):
            for handle, _ in poll.poll():
                ended[handles[handle]] = time.time()
                poll.unregister(handle)

    killer = threading.Thread(target=kill)
    killer.start()
    launch(trainings.until_told, folder, elastic=elastic)
    killer.join()
    return max(ended.values()) - ended[-1]


def state_dict(folder: str) -> dict[str, float]:
    """Seconds and extra memory from the worker's return to a state dict of 1 GiB here."""
    from kfpytorch_ray import launch

    _ray()
    elastic = _warm_up(folder)
    with PeakMemory(lambda: bool(wait_for(folder, "return", 1))) as memory:
        result = launch(trainings.state_dict, folder, elastic=elastic)
        value = result[0].return_value
        arrived = time.time()
    assert sum(part.nbytes for part in value.values()) == trainings.STATE_BYTES
    return {"seconds": arrived - wait_for(folder, "return", 1)[0].at, "extra": memory.extra_bytes}


def shards(folder: str) -> float:
    """Seconds from the last of eight workers' return to 64 MiB of each here."""
    from kfpytorch_ray import launch

    _ray()
    elastic = _warm_up(folder, nproc=4)
    result = launch(trainings.shard, folder, elastic=elastic)
    values = [result[rank].return_value for rank in range(8)]
    arrived = time.time()
    assert sum(value.nbytes for value in values) == 8 * trainings.SHARD_BYTES
    return arrived - wait_for(folder, "return", 8)[-1].at


def steps(folder: str) -> float:
    """Steps per second of the digits CNN on two ranks."""
    from kfpytorch_ray import launch

    _ray()
    rate: float = launch(trainings.digits_steps, folder, elastic=_elastic(False, nproc=1))[0].return_value
    return rate


def lost_node(folder: str) -> dict[str, float]:
    """Seconds from SIGKILL of one of three raylets, and from Ray's report of it, to the next round's first line."""
    from kfpytorch_ray import launch
    from kfpytorch_ray.cluster import warm as kept

    kept.release_all()
    _ray.cache_clear()
    elastic = _elastic(False, nnodes="2:3", nproc=1)
    return recovery(folder, lambda: launch(trainings.until_told, folder, elastic=elastic), _is_on, "line", 2)


def _is_on(pid: int, node: Any) -> bool:
    from kfpytorch_ray.testing import running_ranks

    return any(rank.pid == pid and rank.agent.raylet == node.raylet for rank in running_ranks())


if __name__ == "__main__":
    serve(
        {scenario.__name__: scenario for scenario in (start, restart, last_death, state_dict, shards, steps, lost_node)}
    )
