"""flytekitplugins.kfpytorch, as its task's execute runs on one machine."""

from __future__ import annotations

import time
from typing import Any

from benchmarks import trainings
from benchmarks.driver import serve
from benchmarks.marks import wait_for
from benchmarks.memory import PeakMemory

NPROC = 4


def call(name: str, folder: str) -> Any:
    """What the task's function is; ranks get it by its name here."""
    return getattr(trainings, name)(folder)


def _run(name: str, folder: str, start_method: str, interval_s: float | None, restarts: int = 0) -> Any:
    from flytekitplugins.kfpytorch import Elastic
    from flytekitplugins.kfpytorch.task import PytorchElasticFunctionTask

    config = Elastic(
        nnodes=1,
        nproc_per_node=NPROC,
        start_method=start_method,
        max_restarts=restarts,
        **({} if interval_s is None else {"monitor_interval": interval_s}),
    )
    return PytorchElasticFunctionTask(config, call).execute(name=name, folder=folder)


def start(folder: str, start_method: str = "spawn", interval_s: float | None = None) -> dict[str, float]:
    """Seconds from call to the last rank's first line, and to the return of a trivial task."""
    began = time.time()
    assert _run("trivial", folder, start_method, interval_s) == NPROC
    whole = time.time() - began
    return {"line": wait_for(folder, "line", NPROC)[-1].at - began, "whole": whole}


def restart(folder: str, interval_s: float | None = None) -> float:
    """Seconds from SIGKILL of a rank to the first line of all ranks in the next round."""
    _run("one_dies", folder, "spawn", interval_s, restarts=1)
    (killed,) = wait_for(folder, "kill", 1)
    return wait_for(folder, "line", NPROC, after=killed.at)[-1].at - killed.at


def state_dict(folder: str, start_method: str = "spawn") -> dict[str, float]:
    """Seconds and extra memory from the worker's return to a state dict of 1 GiB here."""
    with PeakMemory(lambda: bool(wait_for(folder, "return", 1))) as memory:
        value = _run("state_dict", folder, start_method, None)
        arrived = time.time()
    assert sum(part.nbytes for part in value.values()) == trainings.STATE_BYTES
    return {"seconds": arrived - wait_for(folder, "return", 1)[0].at, "extra": memory.extra_bytes}


if __name__ == "__main__":
    serve({scenario.__name__: scenario for scenario in (start, restart, state_dict)})
