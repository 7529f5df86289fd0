"""Ctrl-C and SIGTERM while a launch runs: an exception in the main thread, so that what was started is ended in order.

A run that is elsewhere does not end with this process: there somebody has to say what becomes of it.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from kfpytorch_ray.notices import tell

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM has ended in order."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt and SIGTERM SystemExit(143), whatever handlers others have set.

    flytekit ends the process at SIGINT, and Ray, once it is joined, aborts it at SIGTERM: nobody would stop the
    workers. A second SIGTERM does nothing within the block: it would break off what ends the workers in order. Only
    the main thread can have handlers; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: one that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def wants_to_stop(on_interrupt: str, run_id: str) -> bool:
    """Whether an interruption is to stop a remote run.

    Args:
        on_interrupt: ``"stop"``, ``"detach"``, or ``"ask"`` where there is somebody to ask.
        run_id: Of the run, for the question.
    """
    if on_interrupt != "ask" or not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return on_interrupt != "detach"
    try:
        with interruptible():
            tell(f"the run {run_id} is on the cluster. [s]top it, or [d]etach and leave it running? (s)")
            answer = sys.stdin.readline()
    except (KeyboardInterrupt, SystemExit):
        # Asked twice.
        return True
    return not answer.strip().lower().startswith("d")


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    # Ray asks a job's every process, and pyflyte-fast-execute passes on to its child what it is asked itself.
    signal.signal(number, _asked_again)
    sys.exit(TERMINATED)


def _asked_again(_number: int, _frame: FrameType | None) -> None:
    """Not SIG_IGN, which processes that are started now would inherit."""
