"""torchrun, as a command; its ranks run this file, too: ``torchrun ... torchrun.py NAME FOLDER``."""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks import trainings
from benchmarks.driver import serve
from benchmarks.marks import wait_for

NPROC = 4


def _run(name: str, folder: str, nproc: int, restarts: int = 0) -> None:
    options = ["--nnodes", "1", "--nproc-per-node", str(nproc), "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, __file__, name, folder]
    subprocess.run(command, check=True)


def restart(folder: str) -> float:
    """Seconds from SIGKILL of a rank to the first line, after ``import torch``, of all ranks in the next round."""
    _run("one_dies", folder, NPROC, restarts=1)
    (killed,) = wait_for(folder, "kill", 1)
    return wait_for(folder, "line", NPROC, after=killed.at)[-1].at - killed.at


def steps(folder: str) -> float:
    """Steps per second of the digits CNN on two ranks."""
    _run("digits_steps", folder, 2)
    (rate,) = (each for each in _names(folder) if each.startswith("rate:"))
    return float(rate.partition(":")[2])


def _names(folder: str) -> set[str]:
    return {entry.partition(" ")[0] for entry in os.listdir(folder)}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        import torch  # noqa: F401

        getattr(trainings, sys.argv[1])(sys.argv[2])
    else:
        serve({scenario.__name__: scenario for scenario in (restart, steps)})
