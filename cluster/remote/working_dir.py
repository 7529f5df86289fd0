"""What of a working directory travels to a Ray cluster, and whether it can, known before anything is sent.

Left alone, Ray says little: a fifo hangs it, a link in a circle is packed forty times, broken links are left out
without a word, and a wrong ignore file is reported as a missing folder. The adapter asks here first.
"""

from __future__ import annotations

import heapq
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._private import ray_constants

from kfpytorch_ray.cluster.remote.packing import Entry, Fate, entries_of
from kfpytorch_ray.errors import WorkingDirError, explain

JOB_API_LIMIT_BYTES: int = getattr(ray_constants, "DASHBOARD_CLIENT_MAX_SIZE", 100 * 2**20)
"""Larger packages are refused by Ray's job server, after they were sent; its setting is a constant. What joins Ray by
``ray.init`` may send more, 512 MiB."""

_LARGEST = 5
_SHOWN = 8

_EMPTY_PACKAGE_BYTES = 22
_BYTES_PER_NAME = 76
"""Beside the name itself, twice. Ray does not compress, so that with these the size of its zip is known exactly."""

_EXCLUDES = "RayBackend(excludes=(*DEFAULT_WORKING_DIR_EXCLUDES, {}))"

_PROBLEMS = {
    Fate.BROKEN_LINK: (
        "Links that lead nowhere: {}",
        "Ray leaves such links out without a word, and workers would miss them.",
        "Mend or remove them, or leave them out: " + _EXCLUDES + ".",
    ),
    Fate.CIRCLE: (
        "Links that lead in a circle: {}",
        "Ray follows links, and packs what is behind it again and again until the system stops it.",
        "Remove the link, or leave it out: " + _EXCLUDES + ".",
    ),
    Fate.SPECIAL: (
        "Neither files nor folders: {}",
        "Sockets, fifos and devices cannot be sent; Ray waits forever at a fifo that nobody writes to.",
        "Move them elsewhere, or leave them out: " + _EXCLUDES + ".",
    ),
    Fate.UNREADABLE: (
        "What may not be read: {}",
        "Ray packs all that is not left out, and looks for ignore files in folders that are left out, too.",
        "Make them readable for this user, or move them elsewhere; RayBackend(excludes=...) can leave out files.",
    ),
    Fate.BAD_NAME: (
        "Names that are not UTF-8: {}",
        "Ray cannot send such names.",
        "Rename them.",
    ),
    Fate.BAD_PATTERN: (
        "What cannot be read as gitignore patterns: {}",
        "Ray reads the patterns of excludes and of all ignore files before it packs anything.",
        "Mend the pattern; a literal ! or # at its start is written with a backslash before it.",
    ),
}
"""What, why and fix of what cannot be sent. ``{}`` of the first is what was found, of the last a pattern for it."""


@dataclass(frozen=True, slots=True)
class WorkingDir:
    """What would be sent of a folder.

    Attributes:
        folder: Absolute.
        files: Number of files that are sent.
        size_bytes: Of the package that is sent: the files, which Ray does not compress, and their names.
        largest: The largest files that are sent, largest first.
        left_out: Files and folders at the top of the folder of which patterns leave out everything.
        problems: What Ray would choke on, or leave out without a word.
    """

    folder: Path
    files: int
    size_bytes: int
    largest: tuple[Entry, ...] = ()
    left_out: tuple[Entry, ...] = ()
    problems: tuple[Entry, ...] = ()

    def describe(self) -> str:
        """What is sent and what is not, in one line."""
        folder = _shown(str(self.folder))
        if self.left_out and self.left_out[0].name == ".":
            by = self.left_out[0].detail
            return f"Nothing of {folder} is sent to the cluster: a pattern of {by} matches the whole folder."
        count = "1 file" if self.files == 1 else f"{self.files} files"
        sent = f"Sending {folder} to the cluster: {count}, {_amount(self.size_bytes)}."
        return f"{sent} Left out: {_listed(map(_left_out, self.left_out))}." if self.left_out else sent


def survey(folder: str | os.PathLike[str], excludes: Sequence[str] = ()) -> WorkingDir:
    """Look at a folder as Ray will when it packs it: links are followed, ignore files are obeyed.

    Args:
        folder: The working directory.
        excludes: gitignore patterns, as ``runtime_env["excludes"]``; Ray's own are added.

    Raises:
        WorkingDirError: There is no such folder.
    """
    root = _existing(folder)
    files, size_bytes = 0, _EMPTY_PACKAGE_BYTES
    largest: list[tuple[int, str, Entry]] = []
    left_out: dict[str, Entry] = {}
    not_left_out: set[str] = set()
    # An ignore file that may not be read is met twice: on the way into its folder, and as a file.
    problems: dict[Entry, None] = {}
    for entry in entries_of(root, excludes):
        top = entry.name.partition("/")[0]
        if entry.fate is Fate.LEFT_OUT:
            left_out[top] = _together(left_out.get(top), entry, top)
            continue
        not_left_out.add(top)
        if entry.fate is not Fate.SENT:
            problems[entry] = None
            continue
        content_bytes = entry.size_bytes or 0
        size_bytes += content_bytes + _BYTES_PER_NAME + 2 * len(entry.name.encode())
        if not entry.name.endswith("/"):
            files += 1
            heapq.heappush(largest, (content_bytes, entry.name, entry))
            if len(largest) > _LARGEST:
                heapq.heappop(largest)
    return WorkingDir(
        root,
        files,
        size_bytes,
        tuple(entry for *_, entry in sorted(largest, reverse=True)),
        tuple(entry for top, entry in left_out.items() if top not in not_left_out),
        tuple(problems),
    )


def _together(before: Entry | None, entry: Entry, top: str) -> Entry:
    """What is left out of one folder at the top, as one entry: ``data/`` matches what is in a folder, not itself."""
    if before is None:
        return Entry(top, Fate.LEFT_OUT, entry.size_bytes, entry.detail)
    known = None not in (before.size_bytes, entry.size_bytes)
    size_bytes = (before.size_bytes or 0) + (entry.size_bytes or 0) if known else None
    return Entry(top, Fate.LEFT_OUT, size_bytes, before.detail)


def check(working_dir: WorkingDir, limit_bytes: int) -> None:
    """Refuse a folder that Ray would not send whole.

    Args:
        working_dir: As surveyed.
        limit_bytes: Largest size of the package, ``RayBackend(max_working_dir_bytes=...)``; no more than
            ``JOB_API_LIMIT_BYTES`` in any case.

    Raises:
        WorkingDirError: Lists every problem.
    """
    found = [_problem(fate, working_dir.problems) for fate in _PROBLEMS]
    problems = (*_too_large(working_dir, limit_bytes), *(problem for problem in found if problem))
    if problems:
        raise WorkingDirError(_subject(working_dir.folder), problems)


def _existing(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).absolute()
    fix = 'Name the folder that holds the modules of the training; RayBackend(working_dir="") sends nothing.'
    try:
        status = path.stat()
    except OSError as error:
        problem = explain(f"{_shown(str(path))} cannot be found.", error.strerror or str(error), fix)
        raise WorkingDirError(_subject(Path(folder)), (problem,)) from error
    if not stat.S_ISDIR(status.st_mode):
        problem = explain(f"{_shown(str(path))} is not a folder.", "Ray sends folders.", fix)
        raise WorkingDirError(_subject(Path(folder)), (problem,))
    return path


def _too_large(working_dir: WorkingDir, limit_bytes: int) -> tuple[str, ...]:
    size = _amount(working_dir.size_bytes)
    raised = ""
    if working_dir.size_bytes > JOB_API_LIMIT_BYTES:
        what = f"{size} would be sent, and Ray's job server takes no more than {_amount(JOB_API_LIMIT_BYTES)}."
    elif working_dir.size_bytes > limit_bytes:
        what = f"{size} would be sent, more than max_working_dir_bytes={limit_bytes} ({_amount(limit_bytes)})."
        raised = f", or allow more: RayBackend(max_working_dir_bytes={working_dir.size_bytes})"
    else:
        return ()
    largest = _listed(f"{_shown(entry.name)} ({_amount(entry.size_bytes or 0)})" for entry in working_dir.largest)
    first = working_dir.largest[0].name if working_dir.largest else ""
    return (
        explain(
            what,
            f"It holds {working_dir.files} files; the largest are {largest}.",
            f"Leave out what the training does not import, {_EXCLUDES.format(repr(pattern_for(first)))} or the same "
            f"pattern in .gitignore, and read data from storage{raised}.",
        ),
    )


def _problem(fate: Fate, entries: Iterable[Entry]) -> str:
    having = [entry for entry in entries if entry.fate is fate]
    if not having:
        return ""
    what, why, fix = _PROBLEMS[fate]
    found = _listed(_shown(entry.name) + _detail(entry) for entry in having)
    return explain(what.format(found), why, fix.format(repr(pattern_for(having[0].name))))


def pattern_for(name: str) -> str:
    """The gitignore pattern that matches one entry of the folder and nothing else."""
    escaped = re.sub(r"([\\*?\[\]!#])", r"\\\1", name)
    # Ray strips a space at the end, escaped or not.
    return "/" + re.sub(r"(\s)$", r"[\1]", escaped)


def _detail(entry: Entry) -> str:
    if not entry.detail:
        return ""
    arrow = " -> " if entry.fate in (Fate.BROKEN_LINK, Fate.CIRCLE) else ""
    return f"{arrow}{_shown(entry.detail)}" if arrow else f" ({entry.detail})"


def _left_out(entry: Entry) -> str:
    notes = [] if entry.size_bytes is None else [_amount(entry.size_bytes)]
    if entry.detail != "excludes":
        notes.append(f"by {entry.detail}")
    return f"{_shown(entry.name)} ({', '.join(notes)})" if notes else _shown(entry.name)


def _listed(names: Iterable[str]) -> str:
    everything = list(names)
    more = len(everything) - _SHOWN
    return ", ".join(everything[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shown(name: str) -> str:
    """A name in one line that any log takes."""
    return name if name.isprintable() else ascii(name)


def _subject(folder: Path) -> str:
    return f"RayBackend(working_dir={str(folder)!r})"


def _amount(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
