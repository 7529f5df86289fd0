"""The walk through a folder that Ray will make when it packs it: every entry and what becomes of it.

Ray's own walk follows links in a circle and raises at the first thing that it cannot read, so it is made again here;
patterns are compiled and matched by Ray's code. A test holds both walks together. No file is read but ignore files.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ray._private import ray_constants
from ray._private.runtime_env import packaging
from ray._private.thirdparty.pathspec.pathspec import PathSpec

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF)
"""What pathlib, by which Ray looks, takes for "is not there"; everything else it raises."""

_PATTERN_ERRORS = (ValueError, IndexError, re.error)
"""What Ray's pattern code raises: no message of its own says that it is about a pattern."""


class Fate(Enum):
    """What becomes of an entry of the folder."""

    SENT = "sent"
    LEFT_OUT = "left out by a pattern"
    BROKEN_LINK = "a link to nothing"
    CIRCLE = "a link that leads back to itself or to a folder above it"
    SPECIAL = "a socket, fifo or device"
    UNREADABLE = "may not be read"
    BAD_NAME = "its name is not UTF-8"
    BAD_PATTERN = "a pattern that cannot be read"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a link, an empty folder, or a folder of which nothing is sent.

    Attributes:
        name: Relative to the folder and as in Ray's package, where ``/`` ends the name of an empty folder. ``"."`` is
            the folder itself.
        fate: What becomes of it.
        size_bytes: Of a file that is sent or left out; None where it has none.
        detail: What leaves it out (``"excludes"``, ``".gitignore"``, ``".rayignore"``), a link's target, what kind of
            thing it is, or what the system says.
    """

    name: str
    fate: Fate
    size_bytes: int | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Patterns:
    """Patterns of one source, compiled by Ray.

    Attributes:
        source: ``"excludes"`` or the name of an ignore file.
        folder: What they are relative to, as the name of an ``Entry``.
        spec: Ray's ``PathSpec``.
    """

    source: str
    folder: str
    spec: PathSpec

    def match(self, name: str) -> bool:
        relative = name if self.folder == "." else name[len(self.folder) + 1 :]
        return bool(self.spec.match_file(relative or "."))


_All = tuple[_Patterns, ...]
_Identity = tuple[int, int]


def entries_of(folder: Path, excludes: Sequence[str]) -> Iterator[Entry]:
    """Every entry, in the order of names; a folder that is left out, or cannot be read, is one entry.

    Args:
        folder: Absolute.
        excludes: gitignore patterns, as ``runtime_env["excludes"]``. Ray's own go before them, so that ``!venv`` takes
            one back.
    """
    # Older Ray has no patterns of its own.
    own: list[str] = getattr(ray_constants, "get_runtime_env_default_excludes", list)()
    patterns, problems = _compiled("excludes", ".", [*own, *excludes])
    yield from problems
    yield from _folder(str(folder), ".", os.stat(folder), patterns, frozenset())


def ignore_file_names() -> tuple[str, ...]:
    """The files in any folder whose patterns count for that folder and all below."""
    names: list[str] = []
    if os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1":
        names.append(".gitignore")
    # Ray 2.49 knows .gitignore only.
    if hasattr(packaging, "get_excludes_from_ignore_files"):
        names.append(".rayignore")
    return tuple(names)


def _folder(
    path: str, name: str, status: os.stat_result, patterns: _All, above: frozenset[_Identity]
) -> Iterator[Entry]:
    # As Ray has it: the ignore files of a folder count for the folder itself, and are read even where it is left out.
    try:
        found = [file for file in ignore_file_names() if Path(path, file).is_file()]
    except OSError as error:
        yield Entry(name, Fate.UNREADABLE, detail=_said(error))
        return
    for file in found:
        own, problems = _ignore_file(os.path.join(path, file), name, file)
        patterns += own
        yield from problems
    identity = (status.st_dev, status.st_ino)
    if by := _matching(name, patterns):
        yield Entry(name, Fate.LEFT_OUT, detail=by)
    elif identity in above:
        yield Entry(name, Fate.CIRCLE, detail=_target(path))
    elif not _is_utf8(name):
        yield Entry(name, Fate.BAD_NAME)
    else:
        yield from _inside(path, name, patterns, above | {identity})


def _inside(path: str, name: str, patterns: _All, above: frozenset[_Identity]) -> Iterator[Entry]:
    try:
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        yield Entry(name, Fate.UNREADABLE, detail=_said(error))
        return
    if not entries:
        yield Entry(f"{name}/", Fate.SENT, 0)
    for entry in entries:
        below = entry.name if name == "." else f"{name}/{entry.name}"
        try:
            status = entry.stat()
        except OSError as error:
            yield from _absent(entry, below, error, patterns)
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _folder(entry.path, below, status, patterns, above)
        else:
            yield _file(entry.path, below, status, patterns)


def _absent(entry: os.DirEntry[str], name: str, error: OSError, patterns: _All) -> Iterator[Entry]:
    """An entry that is there and cannot be looked at: most often a link."""
    if error.errno not in _ABSENT:
        # Ray meets this error before it looks at patterns.
        yield Entry(name, Fate.UNREADABLE, detail=_said(error))
    elif by := _matching(name, patterns):
        yield Entry(name, Fate.LEFT_OUT, detail=by)
    elif entry.is_symlink():
        yield Entry(name, Fate.CIRCLE if error.errno == errno.ELOOP else Fate.BROKEN_LINK, detail=_target(entry.path))
    # Else it was removed while we looked.


def _file(path: str, name: str, status: os.stat_result, patterns: _All) -> Entry:
    size_bytes = status.st_size if stat.S_ISREG(status.st_mode) else None
    if by := _matching(name, patterns):
        return Entry(name, Fate.LEFT_OUT, size_bytes, by)
    if size_bytes is None:
        return Entry(name, Fate.SPECIAL, detail=_kind(status.st_mode))
    if not _is_utf8(name):
        return Entry(name, Fate.BAD_NAME)
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        return Entry(name, Fate.UNREADABLE, detail=os.strerror(errno.EACCES))
    return Entry(name, Fate.SENT, size_bytes)


def _ignore_file(path: str, folder: str, source: str) -> tuple[_All, tuple[Entry, ...]]:
    name = source if folder == "." else f"{folder}/{source}"
    try:
        # Ray reads it in the encoding of the locale too.
        with open(path) as file:
            lines = file.readlines()
    except UnicodeDecodeError as error:
        return (), (Entry(name, Fate.BAD_PATTERN, detail=str(error)),)
    except OSError as error:
        return (), (Entry(name, Fate.UNREADABLE, detail=_said(error)),)
    patterns, problems = _compiled(source, folder, lines)
    return patterns, tuple(Entry(name, problem.fate, detail=problem.detail) for problem in problems)


def _compiled(source: str, folder: str, lines: Sequence[str]) -> tuple[_All, tuple[Entry, ...]]:
    """Patterns by Ray's own code, which compiles all or nothing."""
    try:
        spec = PathSpec.from_lines("gitwildmatch", lines)
    except _PATTERN_ERRORS:
        wrong = [line.strip() for line in lines if not _compiles(line)]
        return (), tuple(Entry(source, Fate.BAD_PATTERN, detail=repr(line)) for line in wrong)
    return (_Patterns(source, folder, spec),), ()


def _compiles(line: str) -> bool:
    try:
        PathSpec.from_lines("gitwildmatch", [line])
    except _PATTERN_ERRORS:
        return False
    return True


def _matching(name: str, patterns: _All) -> str:
    """Where the pattern that leaves an entry out comes from; empty if it is sent."""
    return next((each.source for each in patterns if each.match(name)), "")


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _is_utf8(name: str) -> bool:
    # Python shows other bytes as surrogates, which Ray cannot encode when it hashes names.
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "fifo"
    return "socket" if stat.S_ISSOCK(mode) else "device"


def _said(error: OSError) -> str:
    return error.strerror or str(error)
