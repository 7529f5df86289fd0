"""Cleaning up after an agent, on real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from kfpytorch_ray.cluster import guardian
from kfpytorch_ray.cluster.guardian import RAYLET_VARIABLE, kill_all, marked_processes, strays
from kfpytorch_ray.cluster.processes import kill_group
from kfpytorch_ray.heartbeat import MARK_VARIABLE, PAGE_NAME, HeartbeatPage
from kfpytorch_ray.testing import wait_until
from kfpytorch_ray.testing.processes import command, environment
from kfpytorch_ray.testing.processes import is_running as runs

until = partial(wait_until, what="what the test asks for", timeout_s=30)

AGENT = f"""
import os, signal, subprocess, sys
from kfpytorch_ray.cluster.guardian import start_guardian

value = os.pathsep.join([str(os.getpid()), *sys.argv[1:]])
start_guardian("{MARK_VARIABLE}=" + value)
marked = {{**os.environ, "{MARK_VARIABLE}": value}}
stay = ("sh", "-c", "echo ready; exec sleep 600")
below = subprocess.Popen(stay, env=marked, stdout=subprocess.PIPE)
apart = subprocess.Popen(stay, env=marked, stdout=subprocess.PIPE, start_new_session=True)
below.stdout.readline(), apart.stdout.readline()
print(value, below.pid, apart.pid, flush=True)
signal.pause()
"""
"""Stands for an agent, with a process in its own session and one in another."""


@contextlib.contextmanager
def started(
    *command: str, mark: str | None = None, own_group: bool = False, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the test."""
    environment = {name: value for name, value in os.environ.items() if name != MARK_VARIABLE} | variables
    if mark is not None:
        environment[MARK_VARIABLE] = mark.partition("=")[2]
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


def asleep(*pids: int) -> None:
    """Wait until these have become ``sleep``: halfway there a process shows no environment."""
    until(lambda: all(command(pid).startswith("sleep ") and environment(pid) for pid in pids))


def mark_of(*parts: object) -> str:
    return f"{MARK_VARIABLE}=" + os.pathsep.join(map(str, parts))


def test_processes_with_the_mark_are_found_and_no_others(tmp_path: Path) -> None:
    """The whole value counts: not a longer one, not a shorter one, not another variable, not this process."""
    mark = mark_of(os.getpid(), tmp_path)
    with (
        started(*SLEEPER, mark=mark) as one,
        started(*SLEEPER, mark=mark, own_group=True) as other,
        started(*SLEEPER, mark=f"{mark}/deeper") as longer,
        started(*SLEEPER, mark=mark_of(os.getpid())) as shorter,
        started(*SLEEPER) as plain,
    ):
        for process in (one, other, longer, shorter, plain):
            assert first_line(process) == "ready"
        asleep(one.pid, other.pid, longer.pid, shorter.pid, plain.pid)
        assert marked_processes(mark) == {one.pid, other.pid}
    assert marked_processes(mark) == set()


def test_what_a_marked_process_starts_is_marked_too(tmp_path: Path) -> None:
    """Data loaders of a worker are found, whatever group or session they are in."""
    mark = mark_of(1, tmp_path)
    with started("sh", "-c", "setsid sleep 600 & echo $!; wait", mark=mark) as parent:
        child = int(first_line(parent))
        try:
            until(lambda: marked_processes(mark) >= {parent.pid, child})
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that the kernel shows of processes: one, which has no parent and shows neither environment nor arguments."""
    process = tmp_path / "123"
    process.mkdir()
    (process / "stat").write_text("123 (sh) R 1 123 123")
    (process / "exe").symlink_to("/bin/sh")
    for name in ("environ", "cmdline"):
        (process / name).touch()
    monkeypatch.setattr(guardian, "_PROC", tmp_path)
    return process


def test_a_process_in_the_middle_of_an_exec_is_found(process: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows its mark a moment later, and would outlive its round."""
    mark = mark_of(1, "folder")

    def goes_on(_s: float) -> None:
        (process / "environ").write_bytes(f"PATH=/bin\0{mark}\0".encode())
        (process / "cmdline").write_bytes(b"sleep\0")

    monkeypatch.setattr(guardian, "time", SimpleNamespace(sleep=goes_on))
    assert strays(mark, {1}) == set()
    assert strays(mark, {2}) == {123}
    assert marked_processes(mark) == {123}


@pytest.mark.parametrize("kind", ["without an environment", "of the kernel"])
def test_nobody_waits_for_a_process_that_never_shows_an_environment(
    process: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """There may be hundreds, and every round looks at all."""
    if kind == "of the kernel":
        (process / "exe").unlink()
    else:
        (process / "cmdline").write_bytes(b"sleep\0")
    waits: list[float] = []
    monkeypatch.setattr(guardian, "time", SimpleNamespace(sleep=waits.append))
    assert strays(mark_of(1, "folder"), {2}) == set()
    assert waits == []


def test_what_dead_processes_left_behind_is_told_from_what_belongs_to_the_agent(tmp_path: Path) -> None:
    """Marked processes that are no longer below the agent; killed, they are gone, and the others are not touched."""
    mark = mark_of(os.getpid(), tmp_path)
    with (
        started(*SLEEPER, mark=mark) as below,
        started(*SLEEPER) as plain,
        started("sh", "-c", "setsid sleep 600 >&- & echo $!", mark=mark) as gone,
        started("sh", "-c", "setsid sleep 600 >&- & echo $!") as gone_unmarked,
    ):
        assert first_line(below) == first_line(plain) == "ready"
        stray, unmarked = int(first_line(gone)), int(first_line(gone_unmarked))
        try:
            gone.wait(30)
            gone_unmarked.wait(30)
            asleep(below.pid, plain.pid, stray, unmarked)
            assert strays(mark, {os.getpid()}) == {stray}
            kill_all(lambda: strays(mark, {os.getpid()}))
            until(lambda: not runs(stray))
            assert all(runs(process) for process in (below.pid, plain.pid, unmarked))
        finally:
            os.kill(unmarked, signal.SIGKILL)


def test_killing_is_given_up_where_it_does_not_help() -> None:
    """A process in the kernel's hands does not end; whoever waits for its end is not held up for ever."""
    with started(*SLEEPER) as process:
        kill_all(lambda: {process.pid}, timeout_s=0.1)
        assert process.wait(30) == -signal.SIGKILL


@contextlib.contextmanager
def guarded(tmp_path: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str, set[int], list[Path]]]:
    """An agent with its mark, what is marked, and its folders, which nothing of survives the test."""
    folders = [tmp_path / "logs", tmp_path / "results"]
    with started(sys.executable, "-c", AGENT, *map(str, folders), **variables) as agent:
        value, *marked = first_line(agent).split()
        mark = f"{MARK_VARIABLE}={value}"
        for folder in folders:
            folder.mkdir()
            (folder / "file").write_text("x")
        until(lambda: marked_processes(mark) == set(map(int, marked)))
        try:
            yield agent, mark, set(map(int, marked)), folders
        finally:
            agent.kill()
            until(lambda: not any(folder.exists() for folder in folders))
            until(lambda: not marked_processes(mark))


def test_nothing_is_left_of_an_agent_that_is_killed(tmp_path: Path) -> None:
    """All marked processes are killed and the agent's folders removed; nothing else is touched."""
    another = tmp_path / "another's"
    another.mkdir()
    with started(*SLEEPER) as bystander:
        assert first_line(bystander) == "ready"
        with guarded(tmp_path) as (agent, _, marked, folders):
            agent.kill()
            until(lambda: not any(folder.exists() for folder in folders))
            until(lambda: not any(runs(pid) for pid in marked))
            assert runs(bystander.pid)
    assert another.exists()


def test_a_guardian_ends_with_its_work(tmp_path: Path) -> None:
    """Also where the agent was killed before it had made its folders. Without a raylet to watch it does as well."""
    with started(sys.executable, "-c", AGENT, str(tmp_path / "never")) as agent:
        value, *marked = first_line(agent).split()
        agent.kill()
        until(lambda: not any(runs(int(pid)) for pid in marked))
        until(lambda: not guardians(value))


def guardians(value: str) -> list[Path]:
    """Processes with a mark among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK_VARIABLE}={value}".encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(process)
    return found


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize("state", ["runs", "stopped"])
def test_an_agent_whose_lease_has_ended_is_killed_with_all_of_it(state: str, tmp_path: Path) -> None:
    """Also one that cannot act itself any more. As long as the lease is extended, nothing happens."""
    with guarded(tmp_path) as (agent, _, marked, folders):
        with HeartbeatPage.create(folders[0] / PAGE_NAME, 1) as page:
            first = now() + 1
            page.extend_lease(first)
            page.extend_lease(now() + 60)
            until(lambda: now() > first + 1)
            assert agent.poll() is None
            assert all(runs(pid) for pid in marked)
            if state == "stopped":
                agent.send_signal(signal.SIGSTOP)
            page.extend_lease(now() - 1)
            assert agent.wait(30) == -signal.SIGKILL
        until(lambda: not any(runs(pid) for pid in marked))
        until(lambda: not any(folder.exists() for folder in folders))


def test_an_agent_ends_with_its_raylet(tmp_path: Path) -> None:
    """Also one that is stopped."""
    with (
        started(*SLEEPER) as raylet,
        guarded(tmp_path, **{RAYLET_VARIABLE: str(raylet.pid)}) as (agent, _, marked, _),
    ):
        agent.send_signal(signal.SIGSTOP)
        assert runs(agent.pid)
        raylet.kill()
        assert agent.wait(30) == -signal.SIGKILL
        until(lambda: not any(runs(pid) for pid in marked))


@pytest.mark.parametrize("raylet", ["not a number", str(2**22 + 1)])
def test_a_raylet_that_cannot_be_watched_is_done_without(raylet: str, tmp_path: Path) -> None:
    """As from another PID namespace."""
    with guarded(tmp_path, **{RAYLET_VARIABLE: raylet}) as (agent, _, marked, folders):
        agent.kill()
        until(lambda: not any(folder.exists() for folder in folders))
        until(lambda: not any(runs(pid) for pid in marked))


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
