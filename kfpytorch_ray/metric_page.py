"""The mapped file through which a node's first worker tells its agent of steps and metrics, and nobody waits.

The worker writes points into a ring and counts them; the agent copies those that it has not seen. A point that was
overwritten meanwhile is left out, so a function may tell of every step. Names of metrics stand in a table, each once.
Standard library only.
"""

from __future__ import annotations

import logging
import mmap
import os
import struct
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kfpytorch_ray.metrics import MetricPoint

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics"
"""The file's name, beside the heartbeat page."""

MOST_METRICS = 16
_NAME_BYTES = 48
_POINTS = 512

_SEAL = int.from_bytes(b"KFPRAYM\x01", "big")
_HEADER = struct.Struct("4q")
_SEAL_FIELD, _ROUND_FIELD, _COUNT_FIELD, _NAMES_FIELD = range(4)
_NAMES_AT = _HEADER.size
_POINT = struct.Struct(f"qdqq{MOST_METRICS}d")
_POINTS_AT = _NAMES_AT + MOST_METRICS * _NAME_BYTES
_SIZE_BYTES = _POINTS_AT + _POINTS * _POINT.size

_NO_TOTAL = -1
_MOST = 2**63 - 1


class MetricPage:
    """The file as either side holds it. Made by ``create()`` or ``open()``."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        # Native: counted up in one piece.
        self._header = memoryview(mapping)[: _HEADER.size].cast("q")
        self._names: dict[str, int] = {}
        self._full = False
        self._cut = False

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Self:
        """Make the file, readable and writable by this user only.

        Raises:
            OSError: It exists, or there is no room for it.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Reserved, because a store to a hole in the file kills the process where the disk is full.
            os.posix_fallocate(descriptor, 0, _SIZE_BYTES)
            page = cls(mmap.mmap(descriptor, _SIZE_BYTES))
        finally:
            os.close(descriptor)
        page._header[_SEAL_FIELD] = _SEAL
        return page

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map a page that another process has made.

        Raises:
            OSError: There is no such file.
            ValueError: It is not a page.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            whole = os.fstat(descriptor).st_size == _SIZE_BYTES
            page = cls(mmap.mmap(descriptor, _SIZE_BYTES)) if whole else None
        finally:
            os.close(descriptor)
        if page is None or page._header[_SEAL_FIELD] != _SEAL:
            msg = f"{os.fspath(path)} is not a page of metrics of this version of kfpytorch_ray"
            raise ValueError(msg)
        return page

    def close(self) -> None:
        """Let go of the mapping; the file stays."""
        self._header.release()
        self._mapping.close()

    def start_round(self, round_index: int) -> None:
        """Begin a round: whatever an earlier one left is forgotten. No worker may be writing."""
        header = self._header
        header[_ROUND_FIELD] = 0
        header[_COUNT_FIELD] = 0
        header[_NAMES_FIELD] = 0
        header[_ROUND_FIELD] = round_index + 1

    def append(self, step: int, total: int | None, values: Mapping[str, float]) -> None:
        """Tell of a step; only one worker does."""
        ring = [0.0] * MOST_METRICS
        known = 0
        for name, value in values.items():
            index = self._names.get(name)
            if index is None and (index := self._new_name(name)) is None:
                continue
            ring[index] = value
            known |= 1 << index
        count = self._header[_COUNT_FIELD]
        offset = _POINTS_AT + count % _POINTS * _POINT.size
        total = _NO_TOTAL if total is None else min(total, _MOST)
        _POINT.pack_into(self._mapping, offset, step, time.time(), total, known, *ring)
        # Last: by it the point is there.
        self._header[_COUNT_FIELD] = count + 1

    def _new_name(self, name: str) -> int | None:
        index = self._header[_NAMES_FIELD]
        if index >= MOST_METRICS:
            if not self._full:
                self._full = True
                logger.warning("progress() shows %s metrics; %r and what else comes is left out.", MOST_METRICS, name)
            return None
        shown = self._free_name(name)
        if shown != name and not self._cut:
            self._cut = True
            message = "progress() shows %s bytes of a metric's name: %r is cut to %r, other long ones likewise."
            logger.warning(message, _NAME_BYTES, name, shown)
        offset = _NAMES_AT + index * _NAME_BYTES
        self._mapping[offset : offset + _NAME_BYTES] = shown.encode().ljust(_NAME_BYTES, b"\0")
        self._header[_NAMES_FIELD] = index + 1
        self._names[name] = index
        return index

    def _free_name(self, name: str) -> str:
        """What of a name there is room for; numbered where another one is shown so already."""
        taken = {self._name(index) for index in self._names.values()}
        shown = _cut(name, _NAME_BYTES)
        for number in range(2, MOST_METRICS + 1):
            if shown not in taken:
                break
            ending = f"~{number}"
            shown = _cut(name, _NAME_BYTES - len(ending)) + ending
        return shown

    def read(self, round_index: int, after: int) -> list[MetricPoint]:
        """Points of a round from the one with number ``after`` on; those that are overwritten are left out."""
        header = self._header
        if header[_ROUND_FIELD] != round_index + 1:
            return []
        count = header[_COUNT_FIELD]
        first = max(after, count - _POINTS)
        copies = [
            (number, _POINT.unpack_from(self._mapping, _POINTS_AT + number % _POINTS * _POINT.size))
            for number in range(first, count)
        ]
        names = [self._name(index) for index in range(header[_NAMES_FIELD])]
        # The one that is being written now is one more than what is counted.
        overwritten = header[_COUNT_FIELD] - _POINTS
        if header[_ROUND_FIELD] != round_index + 1:
            return []
        return [
            MetricPoint(
                round_index=round_index,
                number=number,
                step=step,
                at=at,
                total=None if total == _NO_TOTAL else total,
                values={name: values[index] for index, name in enumerate(names) if known & (1 << index)},
            )
            for number, (step, at, total, known, *values) in copies
            if number > overwritten
        ]

    def _name(self, index: int) -> str:
        offset = _NAMES_AT + index * _NAME_BYTES
        return self._mapping[offset : offset + _NAME_BYTES].rstrip(b"\0").decode(errors="ignore")


def _cut(name: str, most_bytes: int) -> str:
    """Whole characters only."""
    return name.encode(errors="replace")[:most_bytes].decode(errors="ignore")
