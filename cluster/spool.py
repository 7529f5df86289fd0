"""Result files: the parts of a pickled value (kfpytorch_ray.cluster.pickling) in one file, mapped and not read.

worker -> file in shared memory -> agent maps it -> object store -> driver maps it again. Layout: magic, number of
parts, then offset and size of each part; the parts follow, aligned. No torch here: the agent's actor does without.
"""

from __future__ import annotations

import errno
import mmap
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_MAGIC = b"KFRSPOOL"
_HEAD = struct.Struct("<8sQ")
_PART = struct.Struct("<QQ")
_ALIGNMENT = 64
_SPARE_SHARE = 0.9
"""Share of a folder's free space that a result may take: object store and data loaders live there as well."""

Spooled = npt.NDArray[np.uint8]
"""A result file as one array."""


def spool(parts: Sequence[memoryview], directories: Sequence[str], name: str) -> Path:
    """Write parts into the first of ``directories`` that has room for them, the last one in any case.

    Raises:
        OSError: The last folder is full.
    """
    offset = _aligned(_HEAD.size + _PART.size * len(parts))
    table = []
    for part in parts:
        table.append((offset, part.nbytes))
        offset = _aligned(offset + part.nbytes)

    *preferred, last = (Path(directory) / name for directory in directories)
    for path in preferred:
        if path.parent.is_dir() and shutil.disk_usage(path.parent).free * _SPARE_SHARE > offset:
            try:
                _write(path, table, parts)
            except OSError as error:
                # Other ranks saw the same free space and were quicker.
                path.unlink(missing_ok=True)
                if error.errno != errno.ENOSPC:
                    raise
            else:
                return path
    _write(last, table, parts)
    return last


def _write(path: Path, table: Sequence[tuple[int, int]], parts: Sequence[memoryview]) -> None:
    with path.open("wb") as file:
        file.write(_HEAD.pack(_MAGIC, len(parts)))
        for entry in table:
            file.write(_PART.pack(*entry))
        for (start, _), part in zip(table, parts, strict=True):
            file.seek(start)
            file.write(part)


def map_spooled(path: Path, *, writable: bool = False) -> Spooled:
    """Map a result file; the file may be removed at once, the memory lives as long as the array.

    Args:
        path: The file.
        writable: Whether the memory may be written to, which does not change the file.
    """
    access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=access), dtype=np.uint8)


def parts_of(spooled: Spooled) -> list[memoryview]:
    """The parts of a result, as views of its memory.

    Raises:
        ValueError: It is no spooled result.
    """
    view = spooled.data.cast("B")
    try:
        magic, count = _HEAD.unpack_from(view)
        table = [_PART.unpack_from(view, _HEAD.size + index * _PART.size) for index in range(count)]
    except struct.error as error:
        msg = f"not a spooled result, or a part of one: {error}"
        raise ValueError(msg) from error
    if magic != _MAGIC or any(size and start + size > view.nbytes for start, size in table):
        msg = f"not a spooled result, or a part of one: it starts with {magic!r} and has {view.nbytes} bytes"
        raise ValueError(msg)
    return [view[start : start + size] for start, size in table]


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
