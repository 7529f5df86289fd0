"""Both ends of what a launch of the doctor's exchanges by the storage while it runs.

This machine writes its time there again and again, and every node answers with its own. So each proves that it reads
what the other wrote, and neither's clock is asked for more than what it shows.
"""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType

from typing_extensions import Self

from kfpytorch_ray.cluster.doctor.report import StorageAnswer
from kfpytorch_ray.errors import KfpytorchRayError, StorageError
from kfpytorch_ray.storage import Storage

_BEAT = "beat"
_INTERVAL_S = 0.5
_PATIENCE_S = 10.0


class Beacon:
    """This machine's end, in a thread of its own, for as long as a ``with`` block runs.

    Args:
        folder: Where the exchange takes place.
    """

    def __init__(self, folder: Storage) -> None:
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kfpytorch-ray-doctor", daemon=True)
        self.seen_at: dict[int, tuple[float, float]] = {}
        """By rank: when it answered, by its clock, and when that was seen here."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            # What is wrong with the storage is found out elsewhere.
            with contextlib.suppress(KfpytorchRayError):
                self._look()
            if self._over.wait(_INTERVAL_S):
                return

    def _look(self) -> None:
        self._folder.write(_BEAT, repr(time.time()).encode())
        names = self._folder.names()
        now = time.time()
        for name in names:
            rank = name.removeprefix(_ANSWER)
            if name.startswith(_ANSWER) and rank.isdigit() and int(rank) not in self.seen_at:
                content = self._folder.read(name)
                if content:
                    self.seen_at[int(rank)] = (float(content), now)


_ANSWER = "node-"


def answer(uri: str, rank: int, *, patience_s: float = _PATIENCE_S) -> StorageAnswer:
    """A node's end: read the time of the machine that launches, and write this one's.

    Args:
        uri: Of the folder.
        rank: Names the answer.
        patience_s: How long to wait until something is there.
    """
    try:
        folder = Storage(uri)
        beat = _wait_for_beat(folder, patience_s)
        read_at = time.time()
        name, content = f"{_ANSWER}{rank}", repr(time.time()).encode()
        folder.write(name, content)
        if folder.read(name) != content:
            return StorageAnswer("What was written could not be read again.")
    except StorageError as error:
        return StorageAnswer(str(error))
    if beat is None:
        return StorageAnswer("What the machine that launches has written there cannot be seen.")
    return StorageAnswer("", float(beat), read_at)


def _wait_for_beat(folder: Storage, patience_s: float) -> bytes | None:
    pause = threading.Event()
    deadline = time.monotonic() + patience_s
    while (beat := folder.read(_BEAT)) is None and time.monotonic() < deadline:
        pause.wait(_INTERVAL_S)
    return beat
