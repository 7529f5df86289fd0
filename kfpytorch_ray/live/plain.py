"""Where a launch stands, a line for each change: for logs, pipes, notebooks and tests."""

from __future__ import annotations

import contextlib
import queue
import threading
import time

from kfpytorch_ray.live.status import Phase, Status, clock, shown_steps
from kfpytorch_ray.live.view import Silent
from kfpytorch_ray.metrics import MetricPoint
from kfpytorch_ray.notices import tell

_STEPS_S = 10.0
"""Between two lines with steps."""
_LAST_S = 5.0
"""Longest wait for the last line to be written."""


class Plain(Silent):
    """Lines on standard error, written by a thread of their own: whoever tells must not wait for a blocked terminal.

    Args:
        steps_s: Shortest time between two lines with steps.
    """

    def __init__(self, steps_s: float = _STEPS_S) -> None:
        self._steps_s = steps_s
        self._said = ""
        self._latest: MetricPoint | None = None
        self._steps_at = float("-inf")
        self._began = time.monotonic()
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="progress", daemon=True)
        self._thread.start()

    def changed(self, status: Status) -> None:
        """Say what has changed."""
        if status.phase is Phase.CONNECTING:
            return
        line = status.headline()
        if status.phase is Phase.RUNNING:
            line += f", {status.world} ranks on {status.placed} {'node' if status.placed == 1 else 'nodes'}"
        if line != self._said:
            first = not self._said
            self._said = line
            self._latest = status.steps.latest
            self._steps_at = time.monotonic()
            self._say(status, line, run_id=first)
            return
        latest = status.steps.latest
        if latest is not self._latest and time.monotonic() - self._steps_at >= self._steps_s:
            self._latest = latest
            self._steps_at = time.monotonic()
            self._say(status, ", ".join(shown_steps(status.steps)))

    def close(self, status: Status, how: str) -> None:
        """Say how it ended."""
        if status.round_index is not None and (parts := shown_steps(status.steps)):
            how = f"{how} at {parts[0]}"
        self._say(status, f"{how} after {clock(time.monotonic() - self._began)}")
        self._lines.put(None)
        self._thread.join(_LAST_S)

    def _say(self, status: Status, text: str, *, run_id: bool = False) -> None:
        self._lines.put(f"{status.name}{f' ({status.run_id})' if run_id else ''}: {text}")

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            # A pipe whose reader has gone, most likely: that is no reason to end the training.
            with contextlib.suppress(OSError, ValueError):
                tell(line)
