"""The user's modules in the fork server: imported once, and judged whether forks of them can be trusted.

A fork has one thread: what the others of its parent were doing stays undone, and locks that they held stay locked. A
CUDA context does not survive it at all. Loaded into the fork server after our own modules; what came of it is read in
its forks. The names come by the environment, because that is all that a fork server is given.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from kfpytorch_ray.cluster.environment import PRELOAD_VARIABLE
from kfpytorch_ray.cluster.worker import search_path

_DEVICES = "/dev/nvidia"


@dataclass(frozen=True, slots=True)
class Traces:
    """What a process has that a fork of it has not.

    Attributes:
        threads: Names of Python's threads.
        tasks: How many threads the kernel counts.
        openblas: OpenBLAS libraries that are loaded. Their threads are no harm: they mend themselves in a fork.
        cuda: Whether a GPU is in use.
    """

    threads: tuple[str, ...]
    tasks: int
    openblas: frozenset[str]
    cuda: bool

    @classmethod
    def now(cls, process: Path = Path("/proc/self")) -> Traces:
        """Of this process.

        Args:
            process: Its folder below ``/proc``.
        """
        mapped = {line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines() if "/" in line}
        torch = sys.modules.get("torch")
        return cls(
            threads=tuple(sorted(thread.name for thread in threading.enumerate())),
            tasks=len(os.listdir(process / "task")),
            openblas=frozenset(path for path in mapped if "openblas" in path.lower()),
            cuda=any(map(_is_device, (process / "fd").iterdir()))
            or (torch is not None and torch.cuda.is_initialized()),
        )


def why_refused(before: Traces, after: Traces) -> str:
    """What an import has begun that no fork can have; empty if nothing."""
    if after.cuda and not before.cuda:
        return "uses a GPU while it is imported"
    started = [name for name in after.threads if name not in before.threads]
    if started or len(after.threads) > len(before.threads):
        return f"starts threads while it is imported ({', '.join(started) or 'of names that were there'})"
    if after.tasks > before.tasks and after.openblas == before.openblas:
        return f"starts {after.tasks - before.tasks} threads of a native library while it is imported"
    return ""


def preload(names: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Import modules in their order, until one is refused.

    Returns:
        Those that cannot be imported; and why one is refused, by its name.
    """
    missing = []
    for name in names:
        before = Traces.now()
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 - whoever needs it imports it, and is told what is wrong with it
            missing.append(name)
        if reason := why_refused(before, Traces.now()):
            return tuple(missing), {name: reason}
    return tuple(missing), {}


def _is_device(descriptor: Path) -> bool:
    try:
        return os.readlink(descriptor).startswith(_DEVICES)
    except OSError:
        # Closed meanwhile; one is of this very look.
        return False


def _preload_what_is_asked() -> tuple[tuple[str, ...], dict[str, str]]:
    asked = json.loads(os.environ.pop(PRELOAD_VARIABLE, "{}"))
    own = [*sys.path]
    sys.path[:] = search_path(own, asked.get("sys_path", ()))
    try:
        return preload(tuple(asked.get("modules", ())))
    finally:
        sys.path[:] = own


MISSING, REFUSED = _preload_what_is_asked()

# What is imported stays, in every fork: a collection that looked through it would take a quarter of a second each time,
# and copy its pages.
gc.freeze()
gc.enable()
