"""Moments of ranks: a file for each, with the time in it. One clock, that of this machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mark:
    """A moment of a process.

    Attributes:
        what: Its name.
        rank: Global rank.
        pid: Of the process.
        at: Seconds since the epoch.
    """

    what: str
    rank: int
    pid: int
    at: float


def mark(folder: str, what: str, rank: int | None = None) -> None:
    """Leave a mark."""
    at = time.time()
    name = f"{what} {os.environ.get('RANK', '0') if rank is None else rank} {os.getpid()} {at!r}"
    Path(folder, name).touch()


def marks(folder: str, what: str, *, after: float = 0.0) -> list[Mark]:
    """The marks of a name that were left after some time, oldest first."""
    found = []
    for entry in os.listdir(folder):
        name, rank, pid, at = entry.split(" ")
        if name == what and float(at) > after:
            found.append(Mark(name, int(rank), int(pid), float(at)))
    return sorted(found, key=lambda each: each.at)


def wait_for(folder: str, what: str, count: int, *, after: float = 0.0, timeout_s: float = 120.0) -> list[Mark]:
    """Wait for the marks of so many ranks; of each the first.

    Raises:
        TimeoutError: They did not come.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        first: dict[int, Mark] = {}
        for each in marks(folder, what, after=after):
            first.setdefault(each.rank, each)
        if len(first) >= count:
            return sorted(first.values(), key=lambda each: each.at)
        if time.monotonic() > deadline:
            msg = f"{len(first)} of {count} marks {what!r} within {timeout_s:g} s"
            raise TimeoutError(msg)
        time.sleep(0.002)
