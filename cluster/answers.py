"""Answers of agents, each taken once and as soon as it is there; its cost does not grow with the number of the others.

``ray.wait`` looks at all that are out every time that one comes, which for a thousand agents costs more than the round.
"""

from __future__ import annotations

import queue
from typing import Any


class Answers:
    """References whose values are waited for."""

    def __init__(self) -> None:
        self._came: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def expect(self, ref: Any) -> None:
        """Have ``take`` return a reference once there is its value, or an error in its place."""
        ref.future().add_done_callback(lambda _future: self._came.put(ref))

    def take(self, timeout_s: float) -> list[Any]:
        """All that have come since the last call; if none has, wait for one, or for ``timeout_s``."""
        taken = []
        try:
            taken.append(self._came.get(timeout=max(0.0, timeout_s)))
            while True:
                taken.append(self._came.get_nowait())
        except queue.Empty:
            return taken
