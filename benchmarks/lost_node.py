"""One of three nodes is killed under a training, and how long it takes until the next round's first line."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from benchmarks.marks import mark, wait_for
from kfpytorch_ray.testing import LaptopCluster, Node, kill_raylet

NODES = 3


def recovery(
    folder: str, train: Callable[[], object], is_on: Callable[[int, Node], bool], line: str, ranks_after: int
) -> dict[str, float]:
    """Seconds from SIGKILL of a raylet, and from Ray's report of it, to the last first line of the next round.

    Args:
        folder: Of the marks.
        train: Runs ``trainings.until_told`` with one rank on each node of the Ray that is there then.
        is_on: Whether the process with this number belongs to a node.
        line: Mark of the first line.
        ranks_after: How many ranks the next round has.
    """
    import ray

    ray.shutdown()
    times: dict[str, float] = {}
    with LaptopCluster(nodes=NODES) as cluster:

        def kill() -> None:
            waiting = wait_for(folder, "waits", NODES)
            node = next(each for each in cluster.nodes if is_on(waiting[-1].pid, each))
            mark(folder, "kill")
            times["kill"] = time.time()
            kill_raylet(node)
            while sum(each["Alive"] for each in ray.nodes()) == NODES + 1:
                time.sleep(0.005)
            times["reported"] = time.time()

        killer = threading.Thread(target=kill)
        killer.start()
        train()
        killer.join()
    last = wait_for(folder, line, ranks_after, after=times["kill"])[-1].at
    return {"whole": last - times["kill"], "reported": last - times["reported"]}
