"""Ctrl-C and SIGTERM while a launch runs: an exception in the main thread, so that what was started is ended in order.

A run that is elsewhere does not end with this process: there somebody has to say what becomes of it.

Python swallows an exception that is raised while it finalizes an object, and a signal may come just then: loops that
run for long ask ``raise_if_lost()``.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from kfpytorch_ray.notices import is_terminal, tell

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM has ended in order."""


@dataclass(slots=True)
class _State:
    """Of the innermost block.

    Attributes:
        raised: The signal whose exception is on its way out of it.
    """

    raised: int | None = None


_state = _State()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt and SIGTERM SystemExit(143), whatever handlers others have set.

    flytekit ends the process at SIGINT, and Ray, once it is joined, aborts it at SIGTERM: nobody would stop the
    workers. A second SIGTERM does nothing within the block, nor in one around it: it would break off what ends the
    workers in order. Only the main thread can have handlers; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    around, _state.raised = _state.raised, None
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        terminated = signal.getsignal(signal.SIGTERM) is _asked_again
        _state.raised = around
        for number, handler in before.items():
            kept = _asked_again if terminated and number == signal.SIGTERM and handler is _interrupt else handler
            # None: one that was not set from Python.
            signal.signal(number, signal.SIG_DFL if kept is None else kept)


def raise_if_lost() -> None:
    """Raise once more what an interruption has raised: whoever can call this was not ended by it.

    Not to be called by what an interruption runs on its way.
    """
    if _state.raised is not None and threading.current_thread() is threading.main_thread():
        _raise(_state.raised)


def wants_to_stop(on_interrupt: str, run_id: str) -> bool:
    """Whether an interruption is to stop a remote run.

    Args:
        on_interrupt: ``"stop"``, ``"detach"``, or ``"ask"`` where there is somebody to ask.
        run_id: Of the run, for the question.
    """
    if on_interrupt != "ask" or not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        return on_interrupt != "detach"
    try:
        with interruptible():
            tell(f"the run {run_id} is on the cluster. [s]top it, or [d]etach and leave it running? (s)")
            answer = sys.stdin.readline()
    except (KeyboardInterrupt, SystemExit):
        # Asked twice.
        return True
    return not answer.strip().lower().startswith("d")


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    _state.raised = number
    if number == signal.SIGTERM:
        # Ray asks a job's every process, and pyflyte-fast-execute passes on to its child what it is asked itself.
        signal.signal(number, _asked_again)
    _raise(number)


def _raise(number: int) -> NoReturn:
    if number == signal.SIGTERM:
        sys.exit(TERMINATED)
    raise KeyboardInterrupt


def _asked_again(_number: int, _frame: FrameType | None) -> None:
    """Not SIG_IGN, which processes that are started now would inherit."""
