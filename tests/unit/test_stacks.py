"""Stacks of processes that hang, on real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfpytorch_ray.cluster import stacks
from kfpytorch_ray.cluster.stacks import STACK_SIGNAL, Hanging, find_py_spy, take_stacks
from kfpytorch_ray.testing import wait_until

LONG_S = 20.0
"""For an answer, on a machine that is busy."""

HEAD = f"""
import os, runpy, signal, socket, sys, threading, time
# The file alone: the package takes long to import.
runpy.run_path({stacks.__file__!r})["answer_with_stacks"](sys.argv[1])
"""

IN_THREADS = """
def waits_in_a_thread():
    time.sleep(600)

def waits_for_a_peer():
    one, other = socket.socketpair()
    threading.Thread(target=waits_in_a_thread).start()
    print("ready", flush=True)
    other.recv(1)

waits_for_a_peer()
"""

WITH_THE_INTERPRETER_HELD = """
import ctypes

def sleeps_in_c():
    print("ready", flush=True)
    # PyDLL keeps the interpreter's lock: no other thread of Python's runs.
    ctypes.PyDLL(None).sleep(600)

sleeps_in_c()
"""


@contextlib.contextmanager
def hanging(code: str, answer: Path) -> Iterator[Hanging]:
    """A process that has printed its first line, and that does not outlive the test."""
    process = subprocess.Popen([sys.executable, "-c", code, str(answer)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Hanging(process.pid, answer)
    finally:
        process.kill()
        process.communicate()


def test_all_threads_of_a_process_in_c_code_are_shown(tmp_path: Path) -> None:
    """A socket's recv and a sleep; the process itself does not notice, and may be asked again."""
    with hanging(HEAD + IN_THREADS, tmp_path / "answer") as process:

        def complete() -> bool:
            # A thread, or a process that has just answered, may not have come to its sleep yet.
            shown = take_stacks({0: process}, answer_wait_s=LONG_S)[0]
            assert shown.count("most recent call first") == 2
            assert "in waits_for_a_peer" in shown
            return shown.startswith(f"Process {process.pid} is S (sleeping).") and "in waits_in_a_thread" in shown

        for _ in range(2):
            wait_until(complete, "both threads to sleep")


def test_a_process_that_holds_the_interpreters_lock_is_shown(tmp_path: Path) -> None:
    """As in a driver or a library that never comes back."""
    with hanging(HEAD + WITH_THE_INTERPRETER_HELD, tmp_path / "answer") as process:
        assert "in sleeps_in_c" in take_stacks({3: process}, answer_wait_s=LONG_S)[3]


def test_a_process_that_does_not_answer_is_not_signalled(tmp_path: Path) -> None:
    """The signal would end one that has not come so far."""
    with hanging('print("ready", flush=True); import time; time.sleep(600)', tmp_path / "answer") as process:
        wait_until(lambda: "sleeping" in take_stacks({0: process})[0], "it to fall asleep")
        assert "has not come so far" in take_stacks({0: process})[0]


def test_a_process_that_is_stopped_does_not_hold_up_the_others(tmp_path: Path) -> None:
    """Its state is said instead of its stacks, after a bounded wait."""
    with (
        hanging(HEAD + IN_THREADS, tmp_path / "held") as held,
        hanging(HEAD + IN_THREADS, tmp_path / "other") as other,
    ):
        os.kill(held.pid, signal.SIGSTOP)
        # All of it passes: one never answers.
        shown = take_stacks({0: held, 1: other}, answer_wait_s=5.0)
        assert "does not take signals" in shown[0]
        assert "T (stopped)" in shown[0]
        assert "in waits_for_a_peer" in shown[1]


def test_a_process_that_is_gone_is_no_error(tmp_path: Path) -> None:
    """Ends and orders cross."""
    with hanging(HEAD + IN_THREADS, tmp_path / "answer") as process:
        pass
    assert "gone" in take_stacks({0: process}, answer_wait_s=0.1)[0]


@pytest.mark.skipif(find_py_spy() is None, reason="py-spy is not installed")
def test_py_spy_is_asked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows the names of threads, and what a process that takes no signals does."""
    monkeypatch.setattr(stacks, "_PY_SPY_WAIT_S", LONG_S)
    with hanging(HEAD + IN_THREADS, tmp_path / "answer") as process:
        shown = take_stacks({0: process}, find_py_spy(), LONG_S)[0].partition("py-spy:\n")[2]
        if "ermission" in shown:
            pytest.skip(f"py-spy may not read other processes here: {shown}")
        assert "waits_for_a_peer" in shown
        assert "MainThread" in shown


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo broken >&2; exit 1", "py-spy: broken"), ("yes stack | head -c 1000000", "(cut)")],
)
def test_a_py_spy_that_fails_or_says_too_much_does_no_harm(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says instead is kept; and no more of it than is bearable for every rank."""
    monkeypatch.setattr(stacks, "_PY_SPY_WAIT_S", LONG_S)
    program = tmp_path / "py-spy"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    with hanging(HEAD + IN_THREADS, tmp_path / "answer") as process:
        shown = take_stacks({0: process}, str(program), LONG_S)[0]
    assert said in shown
    assert len(shown) < 100_000
    assert "in waits_for_a_peer" in shown


def test_a_py_spy_that_is_not_there_does_no_harm(tmp_path: Path) -> None:
    """The processes' own answers are kept."""
    with hanging(HEAD + IN_THREADS, tmp_path / "answer") as process:
        assert "in waits_for_a_peer" in take_stacks({0: process}, str(tmp_path / "none"), LONG_S)[0]


def test_users_keep_their_signals() -> None:
    """SIGUSR1, SIGUSR2 and what else has a name are for users and schedulers."""
    assert STACK_SIGNAL not in set(signal.Signals)
