"""Ctrl-C and SIGTERM, in processes of their own, with and without a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from kfpytorch_ray.cluster.interruption import interruptible, raise_if_lost

CODE = """
import signal, sys, time
import flytekit  # sets a handler of its own for SIGINT
from kfpytorch_ray.cluster.interruption import interruptible, wants_to_stop

before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
try:
    with interruptible():
        print("ready", flush=True)
        # Not signal.pause(): a signal just before it is noticed by nobody.
        while True:
            time.sleep(0.05)
except (KeyboardInterrupt, SystemExit) as error:
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    print(*filter(None, (type(error).__name__, getattr(error, "code", ""))), flush=True)
    print("stops" if wants_to_stop(sys.argv[1], "kfr-one") else "goes on", flush=True)
"""


@pytest.mark.parametrize(("signum", "said"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "SystemExit 143")])
@pytest.mark.parametrize(("option", "then"), [("stop", "stops"), ("detach", "goes on"), ("ask", "stops")])
def test_without_a_terminal(signum: signal.Signals, said: str, option: str, then: str) -> None:
    """A signal becomes an exception, the handlers of others come back, and nobody is asked."""
    with subprocess.Popen(
        [sys.executable, "-c", CODE, option], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        assert process.stdout.read().splitlines() == [said, then]


@pytest.mark.parametrize("inner", [contextlib.nullcontext, interruptible], ids=["within", "outside"])
def test_a_second_sigterm_breaks_nothing_off(inner: Callable[[], AbstractContextManager[None]]) -> None:
    """What the first one began goes on to its end; the next block is interrupted as the first was.

    Also outside of the block that it has ended: a driver that was stopped in a launch still writes down how that ended.
    """
    endings = []

    def be_interrupted() -> None:
        with interruptible():
            try:
                with inner():
                    signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                endings.append("in order")

    for _ in range(2):
        with pytest.raises(SystemExit):
            be_interrupted()
    assert endings == ["in order", "in order"]


@pytest.mark.parametrize(
    ("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_an_interruption_that_python_swallows_comes_once_more(
    signum: signal.Signals, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals come at any moment, also while an object is finalized; where none came, nothing is raised."""
    swallowed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: swallowed.append(args.exc_type))

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signum)

    def run_on() -> None:
        with interruptible():
            raise_if_lost()
            Finalized()
            assert swallowed == [raised]
            raise_if_lost()

    with pytest.raises(raised):
        run_on()
    raise_if_lost()
    with interruptible():
        raise_if_lost()


@pytest.mark.parametrize(
    ("answer", "then"),
    [(b"d\n", "goes on"), (b"s\n", "stops"), (b"\n", "stops"), (b"\x03", "stops"), (b"\x04", "stops")],
)
def test_on_a_terminal_it_asks_once(answer: bytes, then: str) -> None:
    """Detach, stop, the default; a second Ctrl-C and the end of the input stop it, too."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", CODE, "ask"])
    said = b""
    try:
        said = read_until(terminal, b"ready")
        # Once: another one would be an answer.
        os.write(terminal, b"\x03")
        said += read_until(terminal, b"(s)")
        said += read_until(terminal, then.encode(), typing=answer)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
    assert said.count(b"[s]top it") == 1


def read_until(terminal: int, text: bytes, typing: bytes = b"") -> bytes:
    """What is on the terminal up to a text, after something was typed; the test's time-out bounds it.

    A signal that comes just before a system call does not end the call, so a key that had no effect is pressed again.
    """
    said = b""
    os.write(terminal, typing)
    while text not in said:
        if select.select([terminal], [], [], 10)[0]:
            said += os.read(terminal, 1024)
        else:
            os.write(terminal, typing)
    return said
