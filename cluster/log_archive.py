"""Ranks' log files, copied to where they outlive the node: by its agent, again and again, and found by the driver.

Copied while ranks run, too, at ever longer intervals, so that of a node that is lost later most is there. A copy that
fails costs nobody the training: it is said, and tried again.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from kfpytorch_ray.cluster.rank_log import RANK_FILE, log_name
from kfpytorch_ray.errors import KfpytorchRayError
from kfpytorch_ray.results import RoundRecord
from kfpytorch_ray.storage import CHUNK_BYTES, Storage

logger = logging.getLogger(__name__)

ARCHIVE_WAIT_S = 60.0
"""Longest wait for the last copies."""
_FIRST_COPY_S = 10.0
_LONGEST_S = 300.0
"""Between two copies: an object store has every version written anew."""
_LAST_PAUSES_S = (0.0, 2.0, 2.0)
"""Before each try of the last copies, after which the files are removed."""


class LogArchive:
    """The copies of one agent's files.

    Args:
        folder: Of the files.
        uri: Of the folder for the copies; empty: none are made.
        first_copy_s: After so long copies are made first, and then at intervals that double.
    """

    def __init__(self, folder: Path, uri: str, first_copy_s: float = _FIRST_COPY_S) -> None:
        self._folder = folder
        self._uri = uri
        self._interval_s = first_copy_s
        self._copied: dict[str, tuple[int, ...]] = {}
        self._said = ""
        self._over = threading.Event()
        # A new thread would not see the credentials of this context.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="log-archive", daemon=True)
        if uri:
            self._thread.start()

    def finish(self, timeout_s: float = ARCHIVE_WAIT_S) -> None:
        """Nobody writes any more: return when the last copies are made, or after ``timeout_s``."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        # Its imports are made while nobody waits for the last copy.
        with contextlib.suppress(KfpytorchRayError, OSError):
            Storage(self._uri)
        while not self._over.wait(self._interval_s):
            self._interval_s = min(2 * self._interval_s, _LONGEST_S)
            self._try_to_copy()
        for pause_s in _LAST_PAUSES_S:
            time.sleep(pause_s)
            if self._try_to_copy():
                return

    def _try_to_copy(self) -> bool:
        try:
            self._copy(Storage(self._uri))
        except (KfpytorchRayError, OSError) as error:
            if str(error) != self._said:
                self._said = str(error)
                logger.warning("Logs of ranks could not be kept: %s", error)
            return False
        return True

    def _copy(self, storage: Storage) -> None:
        found = {str(path.relative_to(self._folder)): _version(path) for path in self._folder.glob("*/*.log*")}
        for name, version in found.items():
            # Parts become others while they are copied, and then are copied with the next.
            if version is not None and self._copied.get(name) != version:
                with contextlib.suppress(FileNotFoundError), (self._folder / name).open("rb") as file:
                    storage.upload(name, iter(partial(file.read, CHUNK_BYTES), b""))
                    self._copied[name] = version
        # Parts that have become one file.
        for name in self._copied.keys() - found.keys():
            storage.remove(name)
            del self._copied[name]


def _version(path: Path) -> tuple[int, ...] | None:
    """What changes with a file's content; None where it has gone. A part of the same size may be another one."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def with_logs(rounds: tuple[RoundRecord, ...], uri: str) -> tuple[RoundRecord, ...]:
    """The records, each rank's with the files of its lines that are kept.

    Args:
        rounds: Of a launch that is over.
        uri: Of the folder where they are kept; empty: nowhere.
    """
    if not uri or not rounds:
        return rounds
    try:
        storage = Storage(uri)
        parts: dict[str, list[str]] = defaultdict(list)
        for name in sorted(storage.files()):
            parts[f"{name.rpartition('.log')[0]}.log"].append(f"{storage.prefix}/{name}")
    except KfpytorchRayError as error:
        logger.warning("Which logs were kept is not known: %s", error)
        return rounds
    return tuple(
        replace(
            record,
            ranks=tuple(
                replace(rank, logs=tuple(parts.get(log_name(record.index, rank.rank), ()))) for rank in record.ranks
            ),
        )
        for record in rounds
    )


class RankFiles:
    """The copies of one rank's files, of all rounds, as they grow.

    Args:
        storage: The folder of all copies.
        rank: The rank.
    """

    def __init__(self, storage: Storage, rank: int) -> None:
        self._storage = storage
        self._name = RANK_FILE.format(rank=rank)
        self._read: dict[str, int] = {}

    def new_lines(self, *, last: bool = False) -> Iterator[str]:
        """Lines that were not there before; the end of a long file only when its round, or with ``last`` all, is over.

        Raises:
            StorageError: They cannot be read.
        """
        for name in sorted(self._storage.files(), key=_in_order):
            own = name.rpartition("/")[2]
            if own != self._name and not (last and own.startswith(f"{self._name}.")):
                continue
            content = self._storage.read(name) or b""
            end = len(content) if last else content.rfind(b"\n") + 1
            start = self._read.get(name, 0)
            self._read[name] = max(start, end)
            yield from content[start:end].decode(errors="replace").removesuffix("\n").split("\n") if end > start else ()


def _in_order(name: str) -> tuple[int, str]:
    number = name.partition("/")[0].rpartition("-")[2]
    return (int(number) if number.isdecimal() else 0), name
