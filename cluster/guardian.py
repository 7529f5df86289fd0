"""The last hand of an agent: ends what is left of it, however it ended, and ends it where it must not go on.

A small process, nobody's child, that an agent starts before it makes anything else. When the agent or its Ray node has
ended, or the agent has heard nothing of its controller for too long, it kills the agent and everything that carries the
agent's mark (workers, their data loaders, whatever they started) and removes the agent's folders. It asks nobody: the
agent may be stopped, or cut off. Run as a script, on the standard library alone: to import this package takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfpytorch_ray.heartbeat import HeartbeatPage

RAYLET_VARIABLE = "RAY_RAYLET_PID"
"""Ray's, in the environment of an actor."""

_PROC = Path("/proc")
_LOOK_S = 0.5
"""Between two looks at the lease: no timer runs by the clock that it is written in."""
_RETRY_S = 0.02
_LONGEST_RETRY_S = 0.5
_AGENT_END_WAIT_S = 5.0
_LOOKS = 3
_EXEC_PAUSE_S = 0.002
_EXEC_LOOKS = 50
"""An exec on a busy machine was seen to take 17 ms."""


def start_guardian(mark: str) -> None:
    """Have this process, an agent, guarded; returns when it is. What the mark names need not be there yet.

    Args:
        mark: ``NAME=value``, as it will be in the environment of every process under the agent. The value is the
            agent's process id and its folders, the first of which will hold the heartbeat page.

    Raises:
        OSError: The process cannot be started.
        subprocess.CalledProcessError: It failed.
    """
    from kfpytorch_ray import heartbeat

    command = [sys.executable, "-I", "-S", __file__, mark, os.environ.get(RAYLET_VARIABLE, ""), heartbeat.__file__]
    # Not marked itself, also where this agent runs under another one.
    name = mark.partition("=")[0]
    environment = {key: value for key, value in os.environ.items() if key != name}
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=environment)


def marked_processes(mark: str) -> set[int]:
    """Processes that were started with a mark in their environment, but this one.

    Args:
        mark: ``NAME=value``.
    """
    return {pid for pid in _all_processes() if pid != os.getpid() and _is_marked(pid, mark.encode())}


def strays(mark: str, owners: AbstractSet[int]) -> set[int]:
    """What processes that have ended left behind under an agent: marked, but no longer below it or its fork server.

    Args:
        mark: ``NAME=value``.
        owners: Process ids of these two; they need not be parent and child.
    """
    parents = {}
    for pid in _all_processes():
        with contextlib.suppress(OSError):
            parents[pid] = int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return {pid for pid in parents if owners.isdisjoint(_ancestry(pid, parents)) and _is_marked(pid, mark.encode())}


def kill_all(find: Callable[[], set[int]], timeout_s: float = float("inf"), looks: int = 1) -> None:
    """SIGKILL to what is found, until nothing is found any more.

    Args:
        find: Finds processes.
        timeout_s: Longest time for it; a process in the kernel's hands may not end at all.
        looks: How often nothing must be found in a row: one that is started during a look may not be seen by it.
    """
    deadline = time.monotonic() + timeout_s
    untouchable: set[int] = set()
    pause_s = _RETRY_S
    empty = 0
    while time.monotonic() < deadline:
        left = find() - untouchable
        empty = 0 if left else empty + 1
        if empty == looks:
            return
        untouchable |= {pid for pid in left if not _kill(pid)}
        # They end a moment later.
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_RETRY_S) if left else _RETRY_S


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir(_PROC) if name.isdecimal()]


def _is_marked(pid: int, mark: bytes) -> bool:
    # Gone meanwhile, or somebody else's.
    with contextlib.suppress(OSError):
        return mark in _environment(_PROC / str(pid)).split(b"\0")
    return False


def _environment(process: Path) -> bytes:
    """At its start. In the middle of an exec a process shows none, nor arguments: that is waited for, some ms."""
    for _ in range(_EXEC_LOOKS):
        if environment := (process / "environ").read_bytes():
            return environment
        # Not there for a kernel thread, nor for one that has ended.
        os.readlink(process / "exe")
        if (process / "cmdline").read_bytes():
            break
        time.sleep(_EXEC_PAUSE_S)
    # It has none, or has it by now.
    return (process / "environ").read_bytes()


def _ancestry(pid: int, parents: dict[int, int]) -> set[int]:
    line = {pid}
    while (pid := parents.get(pid, 0)) and pid not in line:
        line.add(pid)
    return line


def _kill(pid: int) -> bool:
    """Whether the process was ours to kill; one that changed its user is not."""
    try:
        os.kill(pid, signal.SIGKILL)
    except PermissionError:
        return False
    except ProcessLookupError:
        return True
    return True


def _main(mark: str, raylet: str, heartbeat_file: str) -> None:
    agent, *folders = mark.partition("=")[2].split(os.pathsep)
    agent_end = os.pidfd_open(int(agent))
    raylet_end = _opened(raylet)
    heartbeat = _load(heartbeat_file)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if os.fork():
        # The agent waits for this.
        os._exit(0)
    os.setsid()
    os.chdir("/")
    if reason := _wait(agent_end, raylet_end, Path(folders[0]), heartbeat):
        sys.stderr.write(f"kfpytorch_ray: agent {agent} and its workers are ended: {reason}.\n")
        sys.stderr.flush()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(agent_end, signal.SIGKILL)
    kill_all(lambda: marked_processes(mark), looks=_LOOKS)
    select.select([agent_end], [], [], _AGENT_END_WAIT_S)
    # Once more: the agent may have started something before it died.
    kill_all(lambda: marked_processes(mark), looks=_LOOKS)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _opened(raylet: str) -> int | None:
    """A handle of the node's raylet; None where it cannot be watched, as from another PID namespace."""
    with contextlib.suppress(OSError, ValueError):
        return os.pidfd_open(int(raylet))
    return None


def _wait(agent_end: int, raylet_end: int | None, folder: Path, heartbeat: Any) -> str:
    """Wait until it is time; why the agent must end, empty where it has ended."""
    ends = [end for end in (agent_end, raylet_end) if end is not None]
    page: HeartbeatPage | None = None
    while True:
        if page is None:
            # The agent makes it a moment later.
            with contextlib.suppress(OSError, ValueError):
                page = heartbeat.HeartbeatPage.open(folder / heartbeat.PAGE_NAME)
        lease_until = page.lease_until if page is not None else 0.0
        left_s = lease_until - time.clock_gettime(time.CLOCK_BOOTTIME) if lease_until else _LOOK_S
        if left_s <= 0:
            return "no word of the controller has come for silence_timeout_s"
        ended, _, _ = select.select(ends, [], [], min(left_s, _LOOK_S))
        if agent_end in ended:
            return ""
        if ended:
            return "the raylet of this node has ended"


def _load(file: str) -> Any:
    """The module in a file of this package, without the package."""
    spec = importlib.util.spec_from_file_location("heartbeat", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look it up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    _main(*sys.argv[1:])
