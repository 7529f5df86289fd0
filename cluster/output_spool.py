"""Lines of ranks on their way from the supervisor to the driver: files that the supervisor fills and the agent empties.

The driver asks for what is there and says with that what it has (a cursor), so that nothing is lost with an answer,
and a slow terminal holds up nobody. Ray's log monitor is not used: it passes on a hundred lines at a time, merges lines
that differ by numbers only, and leaves out what piles up.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

_SEGMENT_BYTES = 4 * 2**20
_MOST_SEGMENTS = 16
"""What nobody takes is bounded by 64 MiB; the oldest goes first, and is still in the rank's own file."""
_MOST_BYTES = 2**20
"""Of one answer."""
_LOOK_S = 0.05

_STDOUT, _STDERR = "O", "E"


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the spool: everything before it has arrived.

    Attributes:
        segment: Number of a file.
        offset: In it, in bytes.
    """

    segment: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class OutputChunk:
    """Some lines.

    Attributes:
        cursor: Behind them.
        texts: Whole lines, and whether they are of standard error, in their order.
        left_out: Whether lines before these are lost, because nobody took them for too long.
        ended: Whether there will be no more.
    """

    cursor: Cursor
    texts: tuple[tuple[bool, str], ...] = ()
    left_out: bool = False
    ended: bool = False


class OutputSpool:
    """The supervisor's end. Several threads may write.

    Args:
        folder: Of the files; it is there.
        segment_bytes: Size at which the next file is begun.
    """

    def __init__(self, folder: Path, segment_bytes: int = _SEGMENT_BYTES) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._number = 0
        self._size = 0
        self._lock = threading.Lock()

    def write(self, text: str, *, error: bool) -> None:
        """Take whole lines.

        Raises:
            OSError: There is no room for them.
        """
        tag = _STDERR if error else _STDOUT
        # Not splitlines(), which takes other characters for line ends as well.
        data = "".join(f"{tag}{line}\n" for line in text.removesuffix("\n").split("\n")).encode(errors="replace")
        with self._lock:
            with (self._folder / str(self._number)).open("ab", buffering=0) as file:
                file.write(data)
            self._size += len(data)
            if self._size >= self._segment_bytes:
                self._number += 1
                self._size = 0
                (self._folder / str(self._number - _MOST_SEGMENTS)).unlink(missing_ok=True)


class OutputSource:
    """The agent's end.

    Args:
        folder: Of the files; it is there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._over = threading.Event()

    def end(self) -> None:
        """Nobody writes any more."""
        self._over.set()

    def read(self, cursor: Cursor, wait_s: float) -> OutputChunk:
        """What is behind the cursor, as soon as there is something, or after ``wait_s``.

        What is before it has arrived, and is removed.
        """
        deadline = time.monotonic() + wait_s
        while True:
            # Before the look: what was written until then is seen by it.
            over = self._over.is_set()
            chunk = self._look(cursor)
            if chunk.texts or chunk.cursor != cursor:
                return chunk
            if over:
                return OutputChunk(cursor, ended=True)
            if time.monotonic() >= deadline:
                return chunk
            self._over.wait(_LOOK_S)

    def _look(self, cursor: Cursor) -> OutputChunk:
        numbers = sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())
        for number in numbers:
            if number < cursor.segment:
                (self._folder / str(number)).unlink(missing_ok=True)
        numbers = [number for number in numbers if number >= cursor.segment]
        left_out = bool(numbers) and numbers[0] > cursor.segment
        for number in numbers:
            start = cursor.offset if number == cursor.segment else 0
            with contextlib.suppress(FileNotFoundError), (self._folder / str(number)).open("rb") as file:
                file.seek(start)
                data = file.read(_MOST_BYTES)
                data = data[: data.rfind(b"\n") + 1]
                if data:
                    return OutputChunk(Cursor(number, start + len(data)), tuple(_texts(data)), left_out)
        return OutputChunk(cursor)


def _texts(data: bytes) -> Iterator[tuple[bool, str]]:
    lines = data.decode(errors="replace").removesuffix("\n").split("\n")
    for tag, group in groupby(lines, key=lambda line: line[:1]):
        yield tag == _STDERR, "".join(f"{line[1:]}\n" for line in group)
