"""The file with what one rank has printed in one round: both streams, whole lines, at most so many bytes.

What is most often looked for stands at the beginning (versions, settings) and at the end (why it failed), so these are
kept: the first half of the bound, and at least the last quarter. While the rank runs, the end is in two files beside
(``rank-3.log.1`` and, newer, ``rank-3.log.2``); when it is over they become part of the first. Nothing here knows
processes.
"""

from __future__ import annotations

from pathlib import Path

ROUND_FOLDER = "round-{round_index}"
RANK_FILE = "rank-{rank}.log"

_OLDER, _NEWER = ".1", ".2"


def log_name(round_index: int, rank: int) -> str:
    """Of a rank's file, below the folder of all logs."""
    return f"{ROUND_FOLDER.format(round_index=round_index)}/{RANK_FILE.format(rank=rank)}"


class RankLog:
    """One such file. Only one thread may write.

    Args:
        path: Of the file; its folder is made.
        limit_bytes: Largest size in all, but for the line that says what is left out.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._head = path.open("ab", buffering=0)
        self._head_left = limit_bytes // 2
        self._part_bytes = max(1, limit_bytes // 4)
        self._part = self._part_of(_NEWER)
        self._older = self._part_of(_OLDER)
        self._newer_bytes = 0
        self._dropped_bytes = 0
        self._dropped_lines = 0

    def _part_of(self, suffix: str) -> Path:
        return self._path.with_name(self._path.name + suffix)

    def write(self, text: str) -> None:
        """Take whole lines.

        Raises:
            OSError: There is no room for them.
        """
        data = text.encode(errors="replace")
        if self._head_left:
            cut = len(data) if len(data) <= self._head_left else data.rfind(b"\n", 0, self._head_left) + 1
            self._head.write(data[:cut])
            self._head_left -= cut
            if cut == len(data):
                return
            # From here on all goes to the end, lest later lines stand before earlier ones.
            self._head_left = 0
            data = data[cut:]
        self._write_end(data)

    def _write_end(self, data: bytes) -> None:
        if len(data) > self._part_bytes:
            # All that is left out lies between beginning and end.
            self._drop_part(self._older)
            self._drop_part(self._part)
            self._newer_bytes = 0
            start = data.find(b"\n", len(data) - self._part_bytes - 1) + 1
            if start == len(data):
                # The last line is longer than what is kept: its end is.
                start -= self._part_bytes
            self._drop(data[:start])
            data = data[start:]
        if self._newer_bytes + len(data) > self._part_bytes:
            self._drop_part(self._older)
            self._part.replace(self._older)
            self._newer_bytes = 0
        with self._part.open("ab", buffering=0) as file:
            file.write(data)
        self._newer_bytes += len(data)

    def _drop_part(self, part: Path) -> None:
        if part.exists():
            self._drop(part.read_bytes())
            part.unlink()

    def _drop(self, data: bytes) -> None:
        self._dropped_bytes += len(data)
        self._dropped_lines += data.count(b"\n")

    def finish(self) -> None:
        """Nobody writes any more: make it one file.

        Raises:
            OSError: There is no room for it.
        """
        if self._dropped_bytes:
            left_out = f"{self._dropped_lines} lines ({self._dropped_bytes} bytes)"
            self._head.write(f"... {left_out} are left out here (max_log_bytes) ...\n".encode())
        for part in (self._older, self._part):
            if part.exists():
                self._head.write(part.read_bytes())
                part.unlink()
        self._head.close()
