"""For how long a connection that is lost, to a cluster or to the storage, is tried again; people are told once."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kfpytorch_ray.errors import ClusterUnreachableError, IntegrityError, StorageError
from kfpytorch_ray.notices import tell

T = TypeVar("T")

_PAUSE_S = 1.0

_LASTING = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
)
"""What no wait mends: nothing there, no rights, no room."""


class Patience:
    """Of somebody who follows a run.

    Args:
        run_id: Of the run.
        timeout_s: How long nobody may answer.
    """

    def __init__(self, run_id: str, timeout_s: float) -> None:
        self._run_id = run_id
        self._timeout_s = timeout_s
        self._heard_at = time.monotonic()
        self._told = False

    def answered(self) -> None:
        """Somebody has."""
        self._heard_at = time.monotonic()
        if self._told:
            self._told = False
            tell(f"the run {self._run_id} can be reached again.")

    def lasts(self, error: ClusterUnreachableError | StorageError) -> bool:
        """Nobody has: whether to try again."""
        if time.monotonic() - self._heard_at > self._timeout_s:
            return False
        if not self._told:
            self._told = True
            tell(f"{str(error).splitlines()[0]} Trying again.")
        return True

    def until_answered(self, ask: Callable[[], T]) -> T:
        """What ``ask`` returns, which is called again as long as it fails for want of a connection.

        Raises:
            StorageError: What it raised last, or at once where another try would make no difference.
        """
        self._heard_at = time.monotonic()
        while not (answers := self._asked(ask)):
            threading.Event().wait(_PAUSE_S)
        self.answered()
        return answers[0]

    def _asked(self, ask: Callable[[], T]) -> list[T]:
        """The answer; none where it is worth another try."""
        try:
            return [ask()]
        except StorageError as error:
            if not _may_pass(error) or not self.lasts(error):
                raise
            return []


def _may_pass(error: StorageError) -> bool:
    """Whether the storage may answer otherwise next time."""
    cause = error.__cause__
    if isinstance(error, IntegrityError) or cause is None:
        return False
    if isinstance(cause, FileNotFoundError | PermissionError | ImportError | ValueError):
        return False
    return getattr(cause, "errno", None) not in _LASTING
