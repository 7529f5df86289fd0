"""Importing the user's modules into a fork server, and judging whether forks of them can be trusted.

A fork has one thread: what the others of its parent were doing stays undone, and locks that they held stay locked. A
CUDA context does not survive it at all.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from kfpytorch_ray.errors import text_of

_DEVICES = "/dev/nvidia"
_JEMALLOC = "jemalloc_bg_thd"
"""What jemalloc calls its threads. pyarrow has them, which much imports that reads tables, torch._dynamo by pandas."""


@dataclass(frozen=True, slots=True)
class Uninheritable:
    """What a process has that a fork of it has not.

    Attributes:
        threads: Names of Python's threads.
        tasks: How many threads the kernel counts, without jemalloc's: it prepares for a fork and mends itself after it.
        openblas: OpenBLAS libraries that are loaded. Their threads are no harm: they mend themselves in a fork.
        cuda: Whether a GPU is in use.
    """

    threads: tuple[str, ...]
    tasks: int
    openblas: frozenset[str]
    cuda: bool

    @classmethod
    def now(cls, process: Path = Path("/proc/self")) -> Uninheritable:
        """Of this process.

        Args:
            process: Its folder below ``/proc``.
        """
        mapped = {line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines() if "/" in line}
        torch = sys.modules.get("torch")
        return cls(
            threads=tuple(sorted(thread.name for thread in threading.enumerate())),
            tasks=sum(_is_missed_by_fork(task) for task in (process / "task").iterdir()),
            openblas=frozenset(path for path in mapped if "openblas" in path.lower()),
            cuda=any(map(_is_device, (process / "fd").iterdir()))
            or (torch is not None and torch.cuda.is_initialized()),
        )


def why_refused(before: Uninheritable, after: Uninheritable) -> str:
    """What an import has begun that no fork can have; empty if nothing."""
    if after.cuda and not before.cuda:
        return "uses a GPU while it is imported"
    started = [name for name in after.threads if name not in before.threads]
    if started or len(after.threads) > len(before.threads):
        return f"starts threads while it is imported ({', '.join(started) or 'of names that were there'})"
    if after.tasks > before.tasks and after.openblas == before.openblas:
        return f"starts {after.tasks - before.tasks} threads of a native library while it is imported"
    return ""


def preload(names: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """Import modules in their order, until one is refused.

    Returns:
        Why some cannot be imported, by their names; and why one is refused.
    """
    missing = {}
    for name in names:
        before = Uninheritable.now()
        try:
            importlib.import_module(name)
        # A script that reads a command line leaves by SystemExit.
        except (Exception, SystemExit) as error:  # noqa: BLE001 - who needs it imports it, and is told what is wrong
            missing[name] = text_of(error)
        if reason := why_refused(before, Uninheritable.now()):
            return missing, {name: reason}
    return missing, {}


def _is_missed_by_fork(thread: Path) -> bool:
    try:
        return (thread / "comm").read_text().rstrip() != _JEMALLOC
    except OSError:
        # It has ended meanwhile.
        return False


def _is_device(descriptor: Path) -> bool:
    try:
        return os.readlink(descriptor).startswith(_DEVICES)
    except OSError:
        # Closed meanwhile; one is of this very look.
        return False
