"""The warm fork server of an agent: torch and flytekit are imported once, each worker is a fork of it.

Python's own multiprocessing fork server does the work; it is one per process. Added here: Ray's main module is not run
again in every child (260 ms each), and children can be cut loose from the server.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

_PR_SET_PDEATHSIG = 1
_LONGEST_SOCKET_FOLDER = 80
"""Of the 107 bytes of a path; multiprocessing adds its own name."""

_context = multiprocessing.get_context("forkserver")
_server: Any = multiprocessing.forkserver._forkserver
"""This process's server; what is done with it below has no public interface."""


class ForkServer:
    """Starts processes from a warm server.

    The server gets the environment and the current directory that this process has at the time of construction, so
    that variables which libraries read while they are imported (OMP_NUM_THREADS) have their effect.

    Args:
        preload: Modules to import, in this order; those that cannot be are passed over.
        folder: For sockets and other temporary files of multiprocessing, here and in all children.
    """

    def __init__(self, preload: tuple[str, ...], folder: str) -> None:
        _hide_main_module()
        # Its own folder is removed at the exit of a process, and an actor is killed. A socket's path has a bound.
        if len(folder) < _LONGEST_SOCKET_FOLDER:
            multiprocessing.process.current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]
        multiprocessing.forkserver.set_forkserver_preload(list(preload))
        multiprocessing.forkserver.ensure_running()

    def start_connected(self, module: str, function: str, given: object) -> tuple[Connection, ForkServerProcess]:
        """Fork a process that calls ``module.function(connection, given)``; its other end is returned.

        The module is imported in the child only.
        """
        ours, theirs = _context.Pipe()
        process = start(function, _call_by_name, (module, function, theirs, given))
        theirs.close()
        return ours, process


def start(name: str, target: Callable[..., None], args: tuple[Any, ...]) -> ForkServerProcess:
    """Fork a process that calls ``target(*args)``, from this process or from a child of the same server.

    Both are pickled, the target by its name.
    """
    process = _context.Process(name=name, target=target, args=args)
    process.start()
    return process


def share_parents_server() -> None:
    """Called in a child that starts siblings: use the server it came from.

    multiprocessing means to do so, but its check whether the server runs only knows servers that this very process
    started, and would start another, cold one.
    """
    _server.ensure_running = lambda: None


def die_with_server() -> None:
    """Called in a child: have the kernel kill it when the server ends."""
    server = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The server may have died between fork and prctl; the signal is then never sent.
    if os.getppid() != server:
        os.kill(os.getpid(), signal.SIGKILL)


def leave_fork_server() -> None:
    """Called in a child: let go of the server, which lives only as long as its clients.

    Otherwise the server would outlive a killed agent as long as a worker runs. The child's own use of the start
    method ``forkserver`` starts a server of its own.
    """
    if _server._forkserver_alive_fd is not None:
        os.close(_server._forkserver_alive_fd)
    _server._forkserver_alive_fd = None
    _server._forkserver_address = None
    _server._forkserver_pid = None
    vars(_server).pop("ensure_running", None)
    _server._preload_modules = ["__main__"]


def _hide_main_module() -> None:
    main = sys.modules["__main__"]
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__


def _call_by_name(module: str, function: str, connection: Connection, given: object) -> None:
    getattr(importlib.import_module(module), function)(connection, given)
