"""Waiting for a condition, and doing something while a launch runs in this thread."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from kfpytorch_ray.errors import KfpytorchRayError, explain

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_LONGEST_POLL_S = 0.2
_PART_OF_WAIT = 50
"""Pauses grow with the wait: who asks costs as much as what is waited for, and comes at most two per cent later."""
_over: ContextVar[threading.Event | None] = ContextVar("over", default=None)
"""Set when the block of the ``meanwhile`` that this thread belongs to has ended."""


class FaultError(KfpytorchRayError, RuntimeError):
    """A fault could not be injected: there was nothing to break, or not when it should have been broken."""


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 120.0) -> None:
    """Poll until a condition holds.

    Args:
        condition: Asked every 20 ms at first, later every 200 ms, until what it returns is true.
        what: What is waited for, for the message.
        timeout_s: Longest wait; long enough that only a hang can reach it.

    Raises:
        TimeoutError: It did not hold in time.
        FaultError: Called within ``meanwhile``, and the block ended before.
    """
    over = _over.get() or threading.Event()
    began = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            msg = f"still waiting after {timeout_s:g} s for: {what}"
            raise TimeoutError(msg)
        if over.wait(min(max(_POLL_S, waited_s / _PART_OF_WAIT), _LONGEST_POLL_S)):
            # What ended the block may have been what was waited for.
            if condition():
                return
            raise FaultError(
                explain(
                    f"There is nothing to wait for any more: {what}.",
                    "What ran beside it has ended.",
                    "Wait for something that surely happens, or let the launch run for longer.",
                )
            )


@contextlib.contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Run ``act`` in a thread while the block runs: faults, while ``launch()`` waits for its workers.

    ``wait_until`` within ``act`` gives up when the block ends. When ``act`` fails, a block that runs in the main
    thread is interrupted as if by Ctrl-C, because it may be waiting for what ``act`` did not do.

        def break_it():
            wait_until(lambda: reached(step=3, world_size=2), "three steps")
            kill_rank(1)

        with meanwhile(break_it):
            result = launch(train, elastic=Elastic(nnodes=2, max_restarts=1, backend="ray"))

    Raises:
        BaseException: What ``act`` raised, unless the block raised something else itself.
    """
    over = threading.Event()
    begun = threading.Event()
    ending = threading.Lock()
    failures: list[BaseException] = []
    in_main_thread = threading.current_thread() is threading.main_thread()

    def run() -> None:
        _over.set(over)
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - handed to the caller, in whose thread it belongs
            failures.append(error)
            begun.wait()
            with ending:
                if in_main_thread and not over.is_set():
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=run, name="meanwhile", daemon=True)
    with _interruptible() if in_main_thread else contextlib.nullcontext():
        thread.start()
        # An interruption may come a moment after the block has ended.
        try:
            begun.set()
            yield
            with ending:
                over.set()
            thread.join()
        except BaseException as error:
            over.set()
            thread.join()
            if failures and isinstance(error, KeyboardInterrupt):
                raise failures[0] from error
            if failures:
                logger.warning("What ran beside it failed as well: %s", failures[0])
            raise
    if failures:
        raise failures[0]


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt: flytekit makes it end the process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
