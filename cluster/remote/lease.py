"""The lease of a remote run: a file in its folder that changes as long as whoever launched it lives.

The content is what changes, so no clock is compared with another machine's. Whoever launched it, or has attached to it,
keeps it; the run's driver watches it, where the run has a lease, and stops itself when it has run out.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from abc import ABC, abstractmethod
from types import TracebackType

from kfpytorch_ray.errors import StorageError
from kfpytorch_ray.runs import LEASE, MANIFEST, OUTCOME
from kfpytorch_ray.storage import Storage

logger = logging.getLogger(__name__)

_LOOKS_PER_LEASE = 4
"""Several tries in a lease: a storage may fail once."""


class FolderThread(ABC):
    """Does something about a run's folder several times while a lease lasts, from ``start`` or a ``with`` block on.

    Args:
        folder: Of the run.
        lease_s: Seconds; None: there is nothing to do.
    """

    def __init__(self, folder: Storage, lease_s: float | None) -> None:
        self._folder = folder
        self._interval_s = None if lease_s is None else lease_s / _LOOKS_PER_LEASE
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="kfpytorch-ray-lease", daemon=True)

    def start(self) -> None:
        """Begin."""
        if self._interval_s is not None:
            self._thread.start()

    def stop(self) -> None:
        """End, and wait for the last time to be over."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _repeat(self) -> None:
        while True:
            try:
                self._do()
            except StorageError as error:
                logger.warning("The lease of this run: %s", str(error).splitlines()[1])
            if self._over.wait(self._interval_s):
                return

    @abstractmethod
    def _do(self) -> None: ...


class LeaseKeeper(FolderThread):
    """Keeps the lease of a run until the run has ended."""

    def _do(self) -> None:
        if self._folder.read(OUTCOME) is not None:
            # Whoever takes what it has left, perhaps elsewhere, removes the lease as well.
            self._over.set()
        elif self._folder.read(MANIFEST) is not None:
            # Without one the run was removed, or a shared folder is not mounted for a while.
            self._folder.write(LEASE, uuid.uuid4().hex.encode())


class LeaseWatch(FolderThread):
    """Watches the lease of this process's run, and ends the process by SIGTERM when it has run out.

    Time in which this process waits for the storage, because it is away, slow or hangs, is no silence: whoever keeps
    the lease may not be able to write it then either.
    """

    def __init__(self, folder: Storage, lease_s: float | None) -> None:
        super().__init__(folder, lease_s)
        self._lease_s = lease_s or 0.0
        self._seen: bytes | None = None
        self._changed_at = time.monotonic()
        self._waits_since: float | None = None
        """Since when the storage is asked and has not answered."""
        self.reason = ""
        self.fix = "Launch it again."

    def _do(self) -> None:
        if self._waits_since is None:
            self._waits_since = time.monotonic()
        now = self._folder.read(LEASE)
        answered_at = time.monotonic()
        self._changed_at += answered_at - self._waits_since
        self._waits_since = None
        if now != self._seen:
            self._seen, self._changed_at = now, answered_at
        elif answered_at - self._changed_at > self._lease_s and not self.reason:
            self.reason = f"Whoever launched it has given no sign of life for lease_s={self._lease_s:g} s."
            self.fix = "Launch it again; without a lease (lease_s=None) it goes on by itself."
            os.kill(os.getpid(), signal.SIGTERM)
