"""One server that imports torch and flytekit for all agents on the driver's own machine; each forks its own from it.

A launch that starts its own Ray has the imports go on beside that start, and agents that share a machine do not import
each for itself. What an agent gets is the fork server that it would have started: the same modules, its own environment
and folder, its own end. The zygote ends with the launch; servers that were forked from it end with their agents.

An agent takes it only where its own server would be started by the same interpreter with the same environment, because
libraries read variables while they are imported.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import logging
import multiprocessing.forkserver
import os
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from kfpytorch_ray.cluster.environment import PRELOAD_VARIABLE
from kfpytorch_ray.heartbeat import MARK_VARIABLE

logger = logging.getLogger(__name__)

_SPACE_VARIABLE = "KFPYTORCH_RAY_ZYGOTE"
_SPACE_BYTES = 1024
"""Room for an agent's mark: an entry of the environment is as long as it was when the program was started."""
_OWN_TO_EACH = (
    "RAY_*",
    "*_VISIBLE_DEVICES",
    "PYTHONBREAKPOINT",
    "SPT_NOENV",
    MARK_VARIABLE,
    PRELOAD_VARIABLE,
    _SPACE_VARIABLE,
)
"""Patterns of variables that differ between a driver and an agent beside it, and that nothing reads at import."""
_ENV_START = 49
"""Field of /proc/PID/stat, counted from 0: where the environment lies that the program was started with."""
_OUTPUT = "output"
_REQUEST_BYTES = 2**16
_DESCRIPTORS = 4
_OUT_OF_MEMORY_SCORE = Path("/proc/self/oom_score_adj")
"""Who is to be killed first when memory runs out: Ray has its workers, and what they start, killed first."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What an agent is told of a zygote.

    Attributes:
        address: Of its socket.
        fingerprint: Of how it was started.
    """

    address: str
    fingerprint: str


class Zygote:
    """A zygote as its driver sees it; not started before it is asked for.

    Args:
        environment: That of an agent's fork server.
        preload: Modules to import, in this order; those that cannot be are passed over.
    """

    def __init__(self, environment: Mapping[str, str], preload: tuple[str, ...]) -> None:
        self._environment = environment
        self._preload = preload
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._folder = ""
        self._offer: Offer | None = None

    def offer(self) -> Offer | None:
        """What to tell an agent; None where no zygote can be started. The first call starts it."""
        if self._process is None:
            try:
                self._start()
            except OSError as error:
                logger.debug("No zygote could be started, so agents import for themselves: %s", error)
        return self._offer

    def close(self) -> None:
        """End it, if it was started; what was forked from it lives on."""
        if self._process is None:
            return
        try:
            self._end(self._process)
        finally:
            os.close(self._lifeline)
            shutil.rmtree(self._folder, ignore_errors=True)
            self._process, self._offer = None, None

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill it, and log what was said in it."""
        try:
            # A look that leaves it a zombie, so that its number, which is its group's, stays its own.
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            # It has nothing to end, and may be in the middle of an import. What an import has started goes with it;
            # servers have left its group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        except ChildProcessError:
            # It ended, and its status is taken: SIGCHLD is ignored, or somebody waits for any child. Its number may be
            # another process's by now.
            ended = True
        process.wait()
        if said := Path(self._folder, _OUTPUT).read_text(errors="replace").strip():
            level = logging.WARNING if ended else logging.INFO
            logger.log(level, "While modules were imported for all agents of this machine: %s", said)

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="kfpytorch_ray_zygote-")
        address = os.path.join(self._folder, "socket")
        theirs, self._lifeline = os.pipe()
        try:
            with socket.socket(socket.AF_UNIX) as listener, open(os.path.join(self._folder, _OUTPUT), "w") as output:
                listener.bind(address)
                listener.listen()
                call = f"main({listener.fileno()}, {theirs}, {self._folder!r}, {self._preload!r})"
                self._process = subprocess.Popen(
                    [sys.executable, "-c", f"from {__name__} import main; {call}"],
                    env={**self._environment, _SPACE_VARIABLE: " " * _SPACE_BYTES},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(listener.fileno(), theirs),
                    # A Ctrl-C in the terminal is for the driver.
                    start_new_session=True,
                )
        except OSError:
            # Where temporary files have long names, there is no room for a socket's.
            os.close(self._lifeline)
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        finally:
            os.close(theirs)
        self._offer = Offer(address, fingerprint(self._environment))


def fingerprint(environment: Mapping[str, str]) -> str:
    """Of what a fork server is started with: the interpreter, and the variables that an import may read."""
    read = sorted(
        (name, value)
        for name, value in environment.items()
        if not any(fnmatchcase(name, pattern) for pattern in _OWN_TO_EACH)
    )
    return hashlib.sha256(json.dumps([sys.executable, read]).encode()).hexdigest()


def ask_for_server(address: str, listener: int, alive: int) -> None:
    """Have a zygote fork a server; returns before it has.

    Args:
        address: Of the zygote's socket.
        listener: The server's own socket, which listens.
        alive: As for ``multiprocessing.forkserver.main``: at its end of file the server ends.

    Raises:
        OSError: Nobody listens there.
    """
    request = json.dumps(
        {
            "environment": dict(os.environ),
            "directory": os.getcwd(),
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
            "out_of_memory_score": _OUT_OF_MEMORY_SCORE.read_text(),
        }
    ).encode()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        sent = socket.send_fds(client, [request[:_REQUEST_BYTES]], [listener, alive, 1, 2])
        client.sendall(request[sent:])


def main(listener_fd: int, lifeline: int, folder: str, preload: tuple[str, ...]) -> None:
    """Be the zygote, until its driver kills it or has gone."""
    for module in preload:
        with suppress(ImportError):
            importlib.import_module(module)
    # Nobody waits for the servers; an import may wait for a program that it runs.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=listener_fd) as listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(lifeline, selectors.EVENT_READ)
        while all(key.fileobj is listener for key, _ in selector.select()):
            with listener.accept()[0] as client:
                request, descriptors = _received(client)
            if request is not None and os.fork() == 0:
                selector.close()
                listener.close()
                os.close(lifeline)
                _become_server(request, *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)


def _received(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """A request and its descriptors; None of an agent that has died while it asked."""
    data, descriptors, _, _ = socket.recv_fds(client, _REQUEST_BYTES, _DESCRIPTORS)
    while more := client.recv(_REQUEST_BYTES):
        data += more
    with suppress(ValueError):
        request: dict[str, Any] = json.loads(data)
        return request, descriptors
    return None, descriptors


def _become_server(request: Mapping[str, Any], listener: int, alive: int, stdout: int, stderr: int) -> None:
    """Be what the agent would have started; does not return."""
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor, own in ((stdout, 1), (stderr, 2)):
            os.dup2(descriptor, own)
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
        _OUT_OF_MEMORY_SCORE.write_text(request["out_of_memory_score"])
        os.chdir(request["directory"])
        environment = request["environment"]
        # What it names is imported.
        environment.pop(PRELOAD_VARIABLE, None)
        os.environ.clear()
        os.environ.update(environment)
        _mark(f"{MARK_VARIABLE}={environment[MARK_VARIABLE]}")
        multiprocessing.forkserver.main(listener, alive, ())
    except Exception:  # noqa: BLE001 - the agent imports for itself then; this is why
        traceback.print_exc()
    finally:
        os._exit(1)


def _mark(entry: str) -> None:
    """Have this process, and all forks of it, carry an agent's mark where others look for it: in /proc/PID/environ.

    That is the memory of the environment which the program was started with; only an exec would make a new one.
    """
    started_with = Path("/proc/self/environ").read_bytes()
    at = started_with.index(_SPACE_VARIABLE.encode() + b"=")
    room = len(_SPACE_VARIABLE) + 1 + _SPACE_BYTES
    data = os.fsencode(entry)
    if len(data) > room:
        msg = f"the mark of an agent has {len(data)} bytes, and there is room for {room}"
        raise ValueError(msg)
    start = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_ENV_START - 2])
    ctypes.memmove(start + at, data.ljust(room, b"\0"), room)
