"""How much more of the machine's memory was in use at the worst moment, shared memory included."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

_LOOK_S = 0.005


def _used_bytes() -> int:
    fields = dict(row.split(":") for row in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    return (total - available) * 1024


class PeakMemory:
    """Looks again and again from when ``begun`` returns until the block ends."""

    def __init__(self, begun: Callable[[], object]) -> None:
        self._begun = begun
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.extra_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        self._begun()
        before = _used_bytes()
        while not self._over.wait(_LOOK_S):
            self.extra_bytes = max(self.extra_bytes, _used_bytes() - before)
