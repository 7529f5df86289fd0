"""Starting Ray from this process, again where a busy machine was too slow: Ray gives a node 30 s, and one try."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kfpytorch_ray.testing.processes import all_processes, command, descendants, kill_all, parent

logger = logging.getLogger(__name__)

TRIES = 3

T = TypeVar("T")


def start_ray(start: Callable[[], T], undo: Callable[[], object] | None = None) -> T:
    """Have Ray started, ``TRIES`` times at most.

    Ray forgets the processes of a node that was not there in time, and the node may join later: they are killed.

    Args:
        start: Starts a Ray node, or a Ray; not in another thread at the same time.
        undo: Called after every failure: ``ray.shutdown`` where this process joins what it starts.

    Returns:
        What ``start`` has returned.
    """
    tries_left = TRIES
    while True:
        before = _started_here()
        tries_left -= 1
        try:
            return start()
        except BaseException as error:
            if undo is not None:
                undo()
            for process in _started_here() - before:
                kill_all({process, *descendants(process)})
            if not tries_left or not isinstance(error, Exception):
                raise
            logger.warning("Ray did not start, and is started again: %s", error)


def _started_here() -> set[int]:
    """Ray's own processes that this one has started. All of them name a file of Ray's."""
    import ray

    folder = f"{Path(ray.__file__).parent}{os.sep}"
    return {process for process in all_processes() if parent(process) == os.getpid() and folder in command(process)}
