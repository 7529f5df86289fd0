"""The last hand of an agent: imported by its fork server, to clean up after an agent that was killed.

The fork server ends when its agent ends, however that happens. Before it does, the process groups of all its workers
are killed (data loaders included) and the agent's folders are removed. Importing this module anywhere else has no
effect, because the variable that names the folders is set for the fork server only.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
from pathlib import Path

FOLDERS_VARIABLE = "KFPYTORCH_RAY_GUARDED_FOLDERS"


def kill_group(leader: int, signum: signal.Signals) -> None:
    """Signal the process group of a worker, or the worker alone if it has not made its group yet."""
    try:
        os.killpg(leader, signum)
    except ProcessLookupError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signum)


def children_of(pid: int) -> tuple[int, ...]:
    """Process ids of the direct children of a process, as the kernel lists them."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.extend(int(child) for child in listing.read_text().split())
    return tuple(found)


def _clean_up(owner: int, folders: tuple[str, ...]) -> None:
    # A worker that leaves by sys.exit after a bare os.fork runs the handlers it inherited.
    if os.getpid() != owner:
        return
    for child in children_of(owner):
        kill_group(child, signal.SIGKILL)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if guarded := os.environ.pop(FOLDERS_VARIABLE, ""):
    atexit.register(_clean_up, os.getpid(), tuple(guarded.split(os.pathsep)))
