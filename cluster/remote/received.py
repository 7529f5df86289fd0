"""What a thread has received of a log, for whoever asks for it in another."""

from __future__ import annotations

import contextlib
import queue
from typing import final


@final
class Received:
    """Texts in the order in which they came; counts what was handed out.

    Attributes:
        delivered: Characters that ``next`` has returned.
    """

    def __init__(self) -> None:
        self._texts: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.delivered = 0

    def put(self, text: str) -> None:
        """Take what has come."""
        self._texts.put(text)

    def next(self, timeout_s: float) -> str:
        """What has come since the last time, after ``timeout_s`` at the latest; empty if nothing has."""
        texts = []
        with contextlib.suppress(queue.Empty):
            texts.append(self._texts.get(timeout=timeout_s) if timeout_s else self._texts.get_nowait())
            while True:
                texts.append(self._texts.get_nowait())
        text = "".join(texts)
        self.delivered += len(text)
        return text
