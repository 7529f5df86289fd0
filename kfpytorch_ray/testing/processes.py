"""Processes of this machine as /proc shows them. Whatever ends while it is looked at counts as gone."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

_PROC = Path("/proc")


def all_processes() -> Iterator[int]:
    """The ids of all processes."""
    return (int(entry.name) for entry in _PROC.glob("[0-9]*"))


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended: a zombie has."""
    return (status := _status(pid)) is not None and status[0] not in "ZX"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by SIGSTOP."""
    return (status := _status(pid)) is not None and status[0] == "T"


def parent(pid: int) -> int:
    """The parent's process id; 0 for a process that is gone."""
    return 0 if (status := _status(pid)) is None else int(status[1])


def command(pid: int) -> str:
    """The command line, or the title that the process gave itself; empty for one that is gone or somebody else's."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty for one that is gone or somebody else's."""
    try:
        entries = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode(errors="replace").split("=", 1) for entry in entries if b"=" in entry)


def descendants(pid: int) -> set[int]:
    """All processes under one, itself not included."""
    children: dict[int, list[int]] = defaultdict(list)
    for process in all_processes():
        children[parent(process)].append(process)
    found: set[int] = set()
    below = children[pid]
    while below:
        found.update(below)
        below = [child for process in below for child in children[process] if child not in found]
    return found


def in_network(namespace: str) -> set[int]:
    """All processes in a network namespace that has a name."""
    try:
        wanted = os.stat(f"/run/netns/{namespace}").st_ino
    except FileNotFoundError:
        return set()
    found = set()
    for process in all_processes():
        # Gone meanwhile.
        with contextlib.suppress(OSError):
            if os.stat(_PROC / str(process) / "ns" / "net").st_ino == wanted:
                found.add(process)
    return found


def send(pid: int, signum: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def kill_all(pids: Iterable[int]) -> None:
    """SIGKILL to each, but never to this process."""
    for pid in pids:
        if pid != os.getpid():
            send(pid, signal.SIGKILL)


def _status(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name: state, parent and so on."""
    try:
        return (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
