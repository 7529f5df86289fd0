"""Cleaning up after an agent, on real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kfpytorch_ray.cluster.guardian import marked_processes
from kfpytorch_ray.cluster.processes import kill_group
from kfpytorch_ray.cluster.protocol import MARK_VARIABLE

IMPORT = "import kfpytorch_ray.cluster.guardian"

AGENT = f"""
import os, subprocess, sys
mark = os.pathsep.join([str(os.getpid()), *sys.argv[1:]])
marked = {{**os.environ, "{MARK_VARIABLE}": mark}}
stay = "print(1, flush=True); import signal; signal.pause()"
server = subprocess.Popen([sys.executable, "-c", "{IMPORT}; " + stay], env=marked, stdout=subprocess.PIPE)
server.stdout.readline()
worker = subprocess.Popen([sys.executable, "-c", stay], env=marked, stdout=subprocess.PIPE, start_new_session=True)
worker.stdout.readline()
print(mark, server.pid, worker.pid, flush=True)
import signal; signal.pause()
"""
"""Stands for an agent: a server that imports the guardian, and a worker in a session of its own."""


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for a condition; give up after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("the condition did not come true")
        pause.wait(0.01)


@contextlib.contextmanager
def started(*command: str, mark: str | None = None, own_group: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed its first line, and that does not outlive the test."""
    environment = {name: value for name, value in os.environ.items() if name != MARK_VARIABLE}
    if mark is not None:
        environment[MARK_VARIABLE] = mark
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=own_group)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


SLEEPER = ("sh", "-c", "echo ready; exec sleep 600")


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_with_the_mark_are_found_and_no_others(tmp_path: Path) -> None:
    """The whole value counts: not a longer one, not a shorter one, not another variable, not this process."""
    mark = f"{os.getpid()}:{tmp_path}"
    with (
        started(*SLEEPER, mark=mark) as one,
        started(*SLEEPER, mark=mark, own_group=True) as other,
        started(*SLEEPER, mark=f"{mark}/deeper") as longer,
        started(*SLEEPER, mark=str(os.getpid())) as shorter,
        started(*SLEEPER) as plain,
    ):
        for process in (one, other, longer, shorter, plain):
            assert first_line(process) == "ready"
        assert marked_processes(mark) == {one.pid, other.pid}
    assert marked_processes(mark) == set()


def test_what_a_marked_process_starts_is_marked_too(tmp_path: Path) -> None:
    """Data loaders of a worker are found, whatever group or session they are in."""
    mark = f"1:{tmp_path}"
    with started("sh", "-c", "setsid sleep 600 & echo $!; wait", mark=mark) as parent:
        child = int(first_line(parent))
        try:
            until(lambda: marked_processes(mark) >= {parent.pid, child})
        finally:
            os.kill(child, signal.SIGKILL)


def test_importing_it_elsewhere_leaves_no_process(tmp_path: Path) -> None:
    """Without a mark, and in workers, whose parent is not the agent, nothing is started."""
    another = f"1:{tmp_path}"
    code = f"""
import importlib, os
{IMPORT} as guardian
for mark in ("", "{another}"):
    os.environ["{MARK_VARIABLE}"] = mark
    importlib.reload(guardian)
try:
    os.waitpid(-1, os.WNOHANG)
    print("a child")
except ChildProcessError:
    print("no child", guardian.marked_processes("{another}"))
"""
    with started(sys.executable, "-c", code, mark=another) as process:
        # It carries the mark, and leaves itself out: the watcher must not kill itself.
        assert first_line(process) == "no child set()"


@pytest.mark.parametrize("victim", ["agent", "server"])
def test_nothing_is_left_of_an_agent_that_is_killed(victim: str, tmp_path: Path) -> None:
    """When the agent or its server is gone, all marked processes are killed and the agent's folders removed."""
    folders = [tmp_path / "logs", tmp_path / "results"]
    for folder in folders:
        folder.mkdir()
        (folder / "file").write_text("x")
    another = tmp_path / "another's"
    another.mkdir()
    with started(*SLEEPER) as bystander, started(sys.executable, "-c", AGENT, *map(str, folders)) as agent:
        assert first_line(bystander) == "ready"
        mark, server, worker = first_line(agent).split()
        assert marked_processes(mark) > {int(server), int(worker)}
        assert all(folder.exists() for folder in folders)

        try:
            os.kill(agent.pid if victim == "agent" else int(server), signal.SIGKILL)
            until(lambda: not any(folder.exists() for folder in folders))
            until(lambda: not marked_processes(mark))
            assert not runs(int(server))
            assert not runs(int(worker))
            assert runs(bystander.pid)
        finally:
            for left in marked_processes(mark):
                os.kill(left, signal.SIGKILL)
        assert another.exists()


def test_a_signal_goes_to_the_whole_group_of_a_worker() -> None:
    """What the worker started ends with it."""
    with started("sh", "-c", "sleep 600 & echo $!; wait", own_group=True) as leader:
        child = int(first_line(leader))
        kill_group(leader.pid, signal.SIGTERM)
        assert leader.wait(30) == -signal.SIGTERM
        until(lambda: not runs(child))


def test_a_worker_without_a_group_of_its_own_is_signalled_alone() -> None:
    """Between fork and setsid the worker is in its parent's group, which must not be hit."""
    with started("sh", "-c", "sleep 600 & echo $!; wait") as leader:
        child = int(first_line(leader))
        kill_group(leader.pid, signal.SIGKILL)
        assert leader.wait(30) == -signal.SIGKILL
        assert runs(child)
        os.kill(child, signal.SIGKILL)


def test_a_worker_that_is_gone_is_no_error() -> None:
    """Ends and signals cross."""
    with started(*SLEEPER, own_group=True) as process:
        process.kill()
        process.wait(30)
        kill_group(process.pid, signal.SIGTERM)
