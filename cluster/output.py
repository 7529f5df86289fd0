"""What ranks print, on its way from the files that they write to the rank's own file, and to the driver if it wants it.

Workers write to files and not to pipes: nobody slows them, and what one wrote before it crashed is there. Whole lines
are passed on, to the driver each with its rank before it. Unlike torch's tails, this does not sleep when the ranks have
ended, so that nothing of theirs is left behind it. What has been passed on is given back to the disk.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import io
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from kfpytorch_ray.cluster.output_spool import OutputSpool
from kfpytorch_ray.cluster.rank_log import RankLog, log_name

logger = logging.getLogger(__name__)

LOGS = "logs"
SPOOL = "output"
"""Folders below an agent's: the files of all ranks, and lines on their way to the driver."""

_LOOK_S = 0.1
_PIECE_BYTES = 2**20
_LONGEST_LINE = 2**16
"""Characters; a longer line is passed on in pieces."""
_KEPT_BYTES = 2**20
"""What stays of a file that was passed on: the last lines are looked up there when its rank has failed."""
_FREED_BYTES = 8 * 2**20
"""Given back to the disk at a time."""

_PUNCH_HOLE = 0x01 | 0x02
"""FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE."""


def prefix_of(rank: int, node_rank: int) -> str:
    """What every line of a rank starts with in the driver's output."""
    return f"[rank {rank} | node {node_rank}] "


def shows(logs: str, rank: int) -> bool:
    """Whether the option ``logs`` has the driver print the lines of this rank."""
    return logs == "all" or (logs == "rank0" and rank == 0)


class Tail:
    """One file of one rank.

    Args:
        path: The file; it need not be there yet.
        takers: Take whole lines.
    """

    def __init__(self, path: str, takers: Iterable[Callable[[str], None]]) -> None:
        self._path = Path(path)
        self._takers = tuple(takers)
        self._descriptor: int | None = None
        self._passed_on = 0
        self._freed = 0
        self._pending = ""
        # As a text file: progress bars that return to the start of their line make lines.
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder = io.IncrementalNewlineDecoder(decode, translate=True)

    def pass_on(self, *, last: bool = False) -> None:
        """Pass on what is in the file now; with ``last`` also a line without an end."""
        if self._descriptor is None:
            with contextlib.suppress(FileNotFoundError):
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        if self._descriptor is None:
            return
        # Somebody may write on and on.
        left = os.fstat(self._descriptor).st_size - self._passed_on
        while left > 0 and (data := os.pread(self._descriptor, min(left, _PIECE_BYTES), self._passed_on)):
            left -= len(data)
            self._passed_on += len(data)
            self._take(self._decoder.decode(data))
        if last:
            self._take(self._decoder.decode(b"", final=True), last=True)
            os.close(self._descriptor)
        elif self._passed_on - self._freed >= _FREED_BYTES + _KEPT_BYTES:
            _give_back(self._descriptor, self._freed, _FREED_BYTES)
            self._freed += _FREED_BYTES

    def _take(self, text: str, *, last: bool = False) -> None:
        *lines, self._pending = (self._pending + text).split("\n")
        if self._pending and (last or len(self._pending) > _LONGEST_LINE):
            lines.append(self._pending)
            self._pending = ""
        if not lines:
            return
        whole = "".join(f"{piece}\n" for line in lines for piece in _pieces(line))
        for taker in self._takers:
            # A full disk, most likely, where nobody could be told. The others are not to suffer.
            with contextlib.suppress(OSError):
                taker(whole)


def _pieces(line: str) -> Iterator[str]:
    """A line as lines that whoever takes them can hold in memory."""
    for start in range(0, max(len(line), 1), _LONGEST_LINE):
        yield line[start : start + _LONGEST_LINE]


def _give_back(descriptor: int, start: int, length: int) -> None:
    """Make a hole in a file. Where the file system cannot, the file keeps its size until the round is over."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate(descriptor, _PUNCH_HOLE, ctypes.c_int64(start), ctypes.c_int64(length))


class Tails:
    """Passes on, in a thread of its own, what the files of one round's ranks get, until it is finished.

    Args:
        tails: The files.
        when_done: Called when everything is passed on.
    """

    def __init__(self, tails: Iterable[Tail], when_done: Iterable[Callable[[], None]] = ()) -> None:
        self._tails = tuple(tails)
        self._when_done = tuple(when_done)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ranks-output", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self, timeout_s: float) -> None:
        """The ranks have ended: return when all that they wrote is passed on, or after ``timeout_s``.

        It goes on behind the caller's back then; a second call waits again.
        """
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        over = False
        while not over:
            over = self._over.wait(_LOOK_S)
            for tail in self._tails:
                with contextlib.suppress(OSError):
                    tail.pass_on(last=over)
        for call in self._when_done:
            with contextlib.suppress(OSError):
                call()


@dataclass(frozen=True, slots=True)
class RoundOutput:
    """Where the lines of one round go.

    Attributes:
        folder: Of all logs of this agent.
        round_index: Of the round.
        node_rank: Of this node.
        logs: Whose lines the driver prints: ``"rank0"``, ``"all"`` or ``"none"``.
        limit_bytes: Of one rank's file.
        spool: Where lines for the driver go.
    """

    folder: Path
    round_index: int
    node_rank: int
    logs: str
    limit_bytes: int
    spool: OutputSpool

    def tails(self, ranks: Mapping[int, int], stdouts: Mapping[int, str], stderrs: Mapping[int, str]) -> Tails:
        """What passes them on.

        Args:
            ranks: Global rank by local rank.
            stdouts: File with its standard output by local rank.
            stderrs: File with its standard error by local rank.
        """
        tails: list[Tail] = []
        kept: list[RankLog] = []
        for local_rank, rank in ranks.items():
            log = RankLog(self.folder / log_name(self.round_index, rank), self.limit_bytes)
            kept.append(log)
            for path, error in ((stdouts[local_rank], False), (stderrs[local_rank], True)):
                takers: list[Callable[[str], None]] = [log.write]
                if shows(self.logs, rank):
                    takers.append(self._to_driver(rank, error=error))
                tails.append(Tail(path, takers))
        return Tails(tails, [log.finish for log in kept])

    def _to_driver(self, rank: int, *, error: bool) -> Callable[[str], None]:
        prefix = prefix_of(rank, self.node_rank)

        def take(text: str) -> None:
            lines = text.removesuffix("\n").split("\n")
            self.spool.write("".join(f"{prefix}{line}\n" for line in lines), error=error)

        return take
