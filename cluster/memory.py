"""Whether the kernel's out-of-memory killer was at work: the counters of the cgroups that a process is in.

Reading of files only. Version 2 counts a kill in the victim's cgroup and in all above it, version 1 in the victim's
own. What a container sees of the tree is what is mounted in it, which may begin far below the tree's root.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PROC = Path("/proc")
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class _Mount:
    """Where a hierarchy that counts memory can be read.

    Attributes:
        folder: Where it is mounted.
        root: The cgroup that is seen there.
        events: The file of each cgroup that holds the counter.
        controller: As /proc/PID/cgroup names the hierarchy; empty for version 2.
    """

    folder: Path
    root: PurePosixPath
    events: str
    controller: str


class OutOfMemoryWatch:
    """Remembers the counters from before, so that it can tell of a process that died what may have killed it.

    The counters of this process's own cgroups are remembered at once: processes that it starts are in them at first.

    Args:
        proc: Where the proc file system is mounted.
    """

    def __init__(self, proc: Path = _PROC) -> None:
        self._proc = proc
        self._files: dict[int, tuple[Path, ...]] = {}
        self._before: dict[Path, int] = {}
        self.add(os.getpid())

    def add(self, pid: int) -> None:
        """Take note of the cgroups that a process is in now."""
        self._files[pid] = event_files(pid, self._proc)
        for file in self._files[pid]:
            if file not in self._before:
                self._before[file] = kills(file)

    def struck(self, pid: int) -> bool:
        """Whether processes were killed, since they were noted, in the cgroups that a process was in."""
        return any(kills(file) > self._before[file] for file in self._files.get(pid, ()))


def event_files(pid: int, proc: Path = _PROC) -> tuple[Path, ...]:
    """The files with the counters of a process's cgroups, its own first, then those above it as far as they are seen.

    Args:
        pid: The process; none are found for one that is gone.
        proc: Where the proc file system is mounted.
    """
    try:
        mountinfo = (proc / "self" / "mountinfo").read_text(errors="surrogateescape")
        cgroup = (proc / str(pid) / "cgroup").read_text(errors="surrogateescape")
    except OSError:
        return ()
    return tuple(
        file
        for mount in _mounts(mountinfo)
        if (path := _own_path(cgroup, mount.controller)) is not None
        for folder in _upwards(mount, path)
        if (file := folder / mount.events).is_file()
    )


def kills(file: Path) -> int:
    """How many processes a cgroup's event file says were killed; 0 where it is gone or does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _mounts(mountinfo: str) -> list[_Mount]:
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        folder, root = Path(_unescaped(fields[4])), PurePosixPath(_unescaped(fields[3]))
        if kind[0] == "cgroup2":
            found.append(_Mount(folder, root, "memory.events", ""))
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            found.append(_Mount(folder, root, "memory.oom_control", "memory"))
    return found


def _own_path(cgroup: str, controller: str) -> PurePosixPath | None:
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return PurePosixPath(path)
    return None


def _upwards(mount: _Mount, path: PurePosixPath) -> list[Path]:
    """The folder of a cgroup and those above it, down to where the hierarchy is mounted."""
    try:
        below = path.relative_to(mount.root)
    except ValueError:
        # Mounted from outside of what this container may see: its own cgroup is what it was given.
        return [mount.folder]
    if ".." in below.parts:
        return [mount.folder]
    return [mount.folder / below, *(mount.folder / parent for parent in below.parents)]


def _unescaped(field: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), field)
