"""The other end of a contender's driver process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SAMPLE_S = 120.0


class FailedSampleError(Exception):
    """A contender did not do what was asked of it."""


class Contender:
    """A driver process, started when it is first asked.

    Args:
        module: Of its script, below ``benchmarks.drivers``.
        log: File for what it prints.
    """

    def __init__(self, module: str, log: Path) -> None:
        self._module = module
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask(self, scenario: str, **arguments: Any) -> Any:
        """Have one sample taken.

        Raises:
            FailedSampleError: It failed, or took too long.
        """
        if self._process is None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps({'scenario': scenario, 'arguments': arguments})}\n")
        self._process.stdin.flush()
        answer = self._next()
        if "error" in answer:
            raise FailedSampleError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End it and all that it has started in its session."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _start(self) -> None:
        with self._log.open("a") as log:
            # Its own file is its main module, which processes that are spawned run again: as a user's script is.
            process = self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "drivers" / f"{self._module}.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **_ENVIRONMENT},
            )
        answers = self._answers = queue.SimpleQueue()
        assert process.stdout is not None
        lines = process.stdout

        def read() -> None:
            for text in lines:
                answers.put(text)
            answers.put("")

        threading.Thread(target=read, daemon=True).start()
        self._next()

    def _next(self) -> dict[str, Any]:
        try:
            text = self._answers.get(timeout=SAMPLE_S)
        except queue.Empty:
            text = ""
        if not text:
            self.close()
            msg = f"no answer within {SAMPLE_S:g} s; see {self._log}"
            raise FailedSampleError(msg)
        answer: dict[str, Any] = json.loads(text)
        return answer


_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
