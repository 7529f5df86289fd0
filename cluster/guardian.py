"""The last hand of an agent: cleans up after it, however it ended.

Imported first by an agent's fork server, this module leaves a small watching process there. When the agent or the
server is gone, that process kills everything that carries the agent's mark (workers, their data loaders, whatever they
started) and removes the agent's folders. Ray kills the children of an actor that ends, with SIGKILL, so the server
itself gets no chance to do it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import time
from pathlib import Path

from kfpytorch_ray.cluster.protocol import MARK_VARIABLE

_RETRY_S = 0.02


def marked_processes(value: str) -> set[int]:
    """Processes that were started under an agent, but this one."""
    entry = f"{MARK_VARIABLE}={value}".encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        # Gone meanwhile, or somebody else's.
        with contextlib.suppress(OSError):
            if entry in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found - {os.getpid()}


def _leave_watcher() -> None:
    value = os.environ.get(MARK_VARIABLE, "")
    agent, *folders = value.split(os.pathsep)
    # Only in the agent's own child: workers and their children carry the mark as well.
    if agent != str(os.getppid()) or os.fork():
        return
    try:
        _watch(int(agent), os.getppid(), value, folders)
    finally:
        os._exit(0)


def _watch(agent: int, server: int, value: str, folders: list[str]) -> None:
    os.setsid()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    with contextlib.suppress(ProcessLookupError):
        ends = [os.pidfd_open(process) for process in (agent, server)]
        select.select(ends, [], [])
    untouchable: set[int] = set()
    while left := marked_processes(value) - untouchable:
        untouchable |= {process for process in left if not _kill(process)}
        # A process in the kernel's hands ends a moment later.
        time.sleep(_RETRY_S)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _kill(process: int) -> bool:
    """Whether the process was ours to kill; one that changed its user is not."""
    try:
        os.kill(process, signal.SIGKILL)
    except PermissionError:
        return False
    except ProcessLookupError:
        return True
    return True


_leave_watcher()
