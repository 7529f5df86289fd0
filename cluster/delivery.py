"""Whether Ray has brought this driver what the ranks have printed, so that their last lines are not lost at the end.

Lines come by Ray's log monitors and a thread of Ray's that prints them here, some 0.1 s after they were written, or
seconds on a busy machine. Agents mark where the lines of their ranks end (kfpytorch_ray.cluster.output); this takes the
marks out before Ray prints them, and waits for those that are missing. Every monitor brings a file from its beginning
on, so a mark that has come says that all before it has, whether once or several times.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from kfpytorch_ray.cluster.output import MARK

SILENCE_S = 5.0
"""As long nothing may come from any node before the rest is given up."""
LONGEST_S = 20.0
"""Longest wait in all; less than what a job has to end after it was stopped."""

_BEFORE, _AFTER = "kfpytorch_ray_before", "kfpytorch_ray_after"
"""Names of handlers, before and after Ray's own."""
_FOUND = "kfpytorch_ray_marks"

_changed = threading.Condition()
_deliveries: dict[str, Delivery] = {}


class Delivery:
    """The marks of one launch.

    Args:
        token: Of its marks; empty if Ray prints nothing here.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self._came: set[str] = set()
        self._heard_at = 0.0

    def wait(self, marks: Iterable[str], silence_s: float = SILENCE_S, longest_s: float = LONGEST_S) -> set[str]:
        """Wait until Ray has printed everything before these marks.

        Args:
            marks: What agents say that they have written; none: there is nothing to wait for.
            silence_s: Without a word from any node, it ends after that.
            longest_s: It ends after that anyway.

        Returns:
            The marks that did not come.
        """
        wanted = set(marks)
        began = time.monotonic()
        with _changed:
            while missing := wanted - self._came:
                now = time.monotonic()
                left = min(max(began, self._heard_at) + silence_s, began + longest_s) - now
                if left <= 0:
                    break
                _changed.wait(left)
            return missing

    def hear(self, marks: Iterable[str]) -> None:
        """Lines have been printed, and these marks came with them."""
        self._heard_at = time.monotonic()
        self._came.update(marks)


@contextmanager
def delivery() -> Iterator[Delivery]:
    """Listen for the marks of one launch; without a token if Ray does not print here what workers write."""
    dispatcher = _dispatcher()
    if dispatcher is None:
        yield Delivery("")
        return
    _join(dispatcher)
    # The handlers stay: marks that come late are not to be printed either.
    with expecting(secrets.token_hex(8)) as launch:
        yield launch


@contextmanager
def expecting(token: str) -> Iterator[Delivery]:
    """Have the marks with this token noted while the context runs."""
    launch = Delivery(token)
    with _changed:
        _deliveries[token] = launch
    try:
        yield launch
    finally:
        with _changed:
            del _deliveries[token]


def _dispatcher() -> Any:
    """Where Ray hands out the lines that reach this process; None if none do.

    None do after ``ray.init(log_to_driver=False)``, and in a worker: they go to the driver of its job.
    """
    # None of this is public. Where another Ray has it elsewhere, nobody waits.
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

        printer: Any = getattr(ray._private.worker.global_worker, "logger_thread", None)
        if printer is not None and printer.is_alive() and isinstance(dispatcher.handlers, list):
            return dispatcher
    return None


def _join(dispatcher: Any) -> None:
    """Take a place before and one after the handler that prints; each start of Ray makes a new one."""
    with dispatcher._lock:
        others = [pair for pair in dispatcher.handlers if pair[0] not in (_BEFORE, _AFTER)]
        dispatcher.handlers = [(_BEFORE, take_marks), *others, (_AFTER, note_marks)]


def take_marks(batch: dict[str, Any]) -> None:
    """Take the marks out of lines that are about to be printed."""
    lines: list[str] = batch["lines"]
    if not any(MARK in line for line in lines):
        return
    printed, marks = [], []
    for line in lines:
        before, mark, name = line.partition(MARK)
        if mark:
            marks.append(name)
        # The mark may follow somebody's unfinished line.
        if before or not mark:
            printed.append(before)
    batch["lines"] = printed
    batch[_FOUND] = marks


def note_marks(batch: dict[str, Any]) -> None:
    """The lines have been printed: tell those who wait."""
    marks: list[str] = batch.get(_FOUND, [])
    with _changed:
        for launch in _deliveries.values():
            launch.hear(mark for mark in marks if mark.startswith(launch.token))
        if marks:
            _changed.notify_all()
