"""What the controller costs the driver's processor in a round, by agent."""

from __future__ import annotations

import os
import time

from benchmarks import trainings
from benchmarks.driver import serve
from benchmarks.simulated import controller_cost

AGENTS = 16
SIMULATED = 1000


def real(folder: str) -> float:
    """Seconds for each of 16 warm agents of a whole launch, whose workers have nothing to do."""
    import ray

    from kfpytorch_ray import Elastic, RayBackend, launch

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=AGENTS, include_dashboard=False, logging_level="ERROR")
    backend = RayBackend(keep_warm_s=3600.0, logs="none", env={"OMP_NUM_THREADS": "1"})
    elastic = Elastic(nnodes=AGENTS, nproc_per_node=1, backend=backend)
    os.makedirs(f"{folder}-warm-up")
    launch(trainings.line, f"{folder}-warm-up", elastic=elastic)
    began = time.process_time()
    launch(trainings.line, folder, elastic=elastic)
    return (time.process_time() - began) / AGENTS


def simulated(folder: str) -> float:
    """Seconds for each of 1,000 agents that answer at once, of 8 workers each."""
    del folder
    return controller_cost(SIMULATED)["round"] / SIMULATED


def simulated_few(folder: str) -> float:
    """The same for 100 agents."""
    del folder
    return controller_cost(SIMULATED // 10)["round"] / (SIMULATED // 10)


if __name__ == "__main__":
    serve({scenario.__name__: scenario for scenario in (real, simulated, simulated_few)})
