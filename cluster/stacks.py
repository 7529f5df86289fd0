"""The stacks of workers that hang: asked for by a signal, which faulthandler answers, and by py-spy where there is one.

faulthandler's answer needs no consent of the interpreter, so it comes from a worker that is stuck in C code as well.
A worker calls ``answer_with_stacks()`` before it runs anything of the user's; the rest is its supervisor's.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

STACK_SIGNAL = signal.SIGRTMIN + 11
"""A real-time signal, because SIGUSR1 and SIGUSR2 belong to users and batch schedulers, and the first few real-time
signals to language runtimes. Its default action ends a process: it goes only to those that said they answer it."""

_ANSWER_WAIT_S = 2.0
_SETTLED_S = 0.5
_LOOK_S = 0.02
_PY_SPY_WAIT_S = 5.0
_RECORD_WAIT_S = 20.0
"""For py-spy to begin and to draw."""
_PR_SET_PTRACER = 0x59616D61
"""Of linux/prctl.h. Without Yama it does nothing."""
_MOST_BYTES = 64 * 1024
"""Of one rank's answer by one way: the records of all ranks travel to the driver."""


@dataclass(frozen=True, slots=True)
class Hanging:
    """A process whose stacks are wanted.

    Attributes:
        pid: Its process id.
        answer: The file that it gave to ``answer_with_stacks()``.
    """

    pid: int
    answer: Path


def answer_with_stacks(path: str) -> None:
    """Have this process write the stacks of all its threads to a file whenever ``STACK_SIGNAL`` comes.

    Args:
        path: The file. It is there from the moment on at which the signal may be sent.
    """
    preparing = f"{path}.preparing"
    # faulthandler keeps the descriptor and not the file: it must stay open as long as the process lives.
    descriptor = os.open(preparing, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    faulthandler.register(STACK_SIGNAL, file=descriptor, all_threads=True, chain=False)
    os.rename(preparing, path)


def take_stacks(
    hanging: Mapping[int, Hanging], py_spy: str | None = None, answer_wait_s: float = _ANSWER_WAIT_S
) -> dict[int, str]:
    """The stacks of all threads of each process, as text for people.

    Takes ``answer_wait_s`` at most for the processes' own answers, and 5 s for py-spy on all of them.

    Args:
        hanging: The processes, by local rank.
        py_spy: The program; None where there is none.
        answer_wait_s: Longest wait for the answers.
    """
    answers = _ask(hanging, answer_wait_s)
    seen = _spy(hanging, py_spy) if py_spy else {}
    return {
        rank: "\n\n".join(
            part for part in (_state(process.pid), answers.get(rank) or _no_answer(process), seen.get(rank)) if part
        )
        for rank, process in hanging.items()
    }


def record_flamegraph(pid: int, duration_s: int, path: Path, py_spy: str | None) -> tuple[str, str]:
    """Where a process spends its time, as an SVG by py-spy; and why there is none.

    Args:
        pid: The process.
        duration_s: Seconds for which it is watched.
        path: Of a file that is made and read.
        py_spy: The program; None where there is none.
    """
    if py_spy is None:
        return "", "py-spy is not installed on its node."
    command = [py_spy, "record", "--pid", str(pid), "--duration", str(duration_s), "--output", str(path)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=duration_s + _RECORD_WAIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"py-spy: {error}"
    if done.returncode != 0 or not path.exists():
        return "", f"py-spy: {_bounded(done.stderr or done.stdout).strip()}"
    return path.read_text(errors="replace"), ""


def let_look(agent: int) -> None:
    """Let py-spy look at this process, where the kernel (Yama) lets only a process's own parents do so.

    Args:
        agent: The agent, which starts py-spy as its supervisor does. Both have to be under whoever is let look:
            with a zygote, a supervisor is not under its agent, but both are under the driver.
    """
    common = common_ancestor(os.getpid(), agent)
    if common is not None:
        with contextlib.suppress(AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PTRACER, ctypes.c_ulong(common), 0, 0, 0)


def common_ancestor(one: int, other: int) -> int | None:
    """The nearest process that two are under, or are; None where it is only what adopts orphans."""
    line = _ancestry(one)
    return next((pid for pid in _ancestry(other) if pid in line), None)


def _ancestry(pid: int) -> list[int]:
    """A process, its parent, and so on, but not what adopts orphans."""
    line = []
    # The parents of one that ends meanwhile are others.
    with contextlib.suppress(OSError):
        while pid > 1:
            line.append(pid)
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return line


def find_py_spy() -> str | None:
    """py-spy on the search path, or installed beside this interpreter, as with ``ray[default]``."""
    return shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))


def _ask(hanging: Mapping[int, Hanging], wait_s: float) -> dict[int, str]:
    sizes: dict[int, int] = {}
    for rank, process in hanging.items():
        with contextlib.suppress(OSError):
            sizes[rank] = process.answer.stat().st_size
            os.kill(process.pid, STACK_SIGNAL)
    before = dict(sizes)
    grown_at = dict.fromkeys(sizes, time.monotonic())
    deadline = time.monotonic() + wait_s
    # No answer says that it is complete: it is when it has stopped growing.
    while (now := time.monotonic()) < deadline and any(
        sizes[rank] == before[rank] or now - grown_at[rank] < _SETTLED_S for rank in sizes
    ):
        time.sleep(_LOOK_S)
        for rank, size in sizes.items():
            if (current := hanging[rank].answer.stat().st_size) != size:
                sizes[rank], grown_at[rank] = current, time.monotonic()
    return {rank: _read(hanging[rank].answer, before[rank]) for rank in sizes}


def _read(answer: Path, start: int) -> str:
    with answer.open("rb") as file:
        file.seek(start)
        return _bounded(file.read(_MOST_BYTES + 1))


def _no_answer(process: Hanging) -> str:
    if not process.answer.exists():
        return "No stacks: the process has not come so far that it could give them."
    return "No stacks: the process does not take signals; it is stopped, or in the kernel's hands."


def _spy(hanging: Mapping[int, Hanging], py_spy: str) -> dict[int, str]:
    if not hanging:
        return {}
    with ThreadPoolExecutor(len(hanging), thread_name_prefix="py-spy") as pool:
        looks = {rank: pool.submit(_spy_on, process.pid, py_spy) for rank, process in hanging.items()}
    return {rank: look.result() for rank, look in looks.items()}


def _spy_on(pid: int, py_spy: str) -> str:
    try:
        done = subprocess.run(
            [py_spy, "dump", "--pid", str(pid)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PY_SPY_WAIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}"
    if done.returncode != 0:
        return f"py-spy: {_bounded(done.stderr).strip()}"
    return f"py-spy:\n{_bounded(done.stdout).strip()}"


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "State":
                return f"Process {pid} is {value.strip()}."
    return f"Process {pid} is gone."


def _bounded(text: bytes) -> str:
    shown = text[:_MOST_BYTES].decode(errors="replace").rstrip()
    return f"{shown}\n... (cut)" if len(text) > _MOST_BYTES else shown
