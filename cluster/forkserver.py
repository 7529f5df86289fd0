"""The warm fork server of an agent: torch and flytekit are imported once, each worker is a fork of it.

Python's own multiprocessing fork server does the work; it is one per process. Added here: Ray's main module is not run
again in every child (260 ms each), and children can be cut loose from the server.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

from kfpytorch_ray.cluster.zygote import Offer, ask_for_server, fingerprint

logger = logging.getLogger(__name__)

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
        zygote: Where the server may be forked from, if that was started as the server would be.
    """

    def __init__(self, preload: tuple[str, ...], folder: str, zygote: Offer | None = None) -> None:
        _hide_main_module()
        self._preload = [*preload]
        # Its own folder is removed at the exit of a process, and an actor is killed. A socket's path has a bound.
        if len(folder) < _LONGEST_SOCKET_FOLDER:
            multiprocessing.process.current_process()._config["tempdir"] = folder  # type: ignore[attr-defined]
        self._of_zygote = zygote is not None and _fork_from(zygote)
        if not self._of_zygote:
            self._start()

    def start_connected(self, module: str, function: str, given: object) -> tuple[Connection, ForkServerProcess]:
        """Fork a process that calls ``module.function(connection, given)``; its other end is returned.

        The module is imported in the child only.
        """
        ours, theirs = _context.Pipe()
        with theirs:
            try:
                process = start(function, _call_by_name, (module, function, theirs, given))
            except (EOFError, OSError) as error:
                if not self._of_zygote:
                    raise
                logger.warning("No fork server came of the zygote (%r): this agent imports for itself.", error)
                self._of_zygote = False
                leave_fork_server()
                self._start()
                process = start(function, _call_by_name, (module, function, theirs, given))
        return ours, process

    def _start(self) -> None:
        multiprocessing.forkserver.set_forkserver_preload(self._preload)
        multiprocessing.forkserver.ensure_running()


def start(name: str, target: Callable[..., None], args: tuple[Any, ...]) -> ForkServerProcess:
    """Fork a process that calls ``target(*args)``, from this process or from a child of the same server.

    Both are pickled, the target by its name.
    """
    process = _context.Process(name=name, target=target, args=args)
    process.start()
    return process


def end_resource_tracker(timeout_s: float) -> None:
    """Have what killed processes left in shared memory removed; once nobody uses this process's server any more.

    multiprocessing's tracker, which all processes of a server share, does so when the last of them has ended.

    Args:
        timeout_s: Longest wait for it; it goes on afterwards.
    """
    tracker: Any = multiprocessing.resource_tracker._resource_tracker
    if tracker._fd is None:
        return
    os.close(tracker._fd)
    tracker._fd = None
    ended = os.pidfd_open(tracker._pid)
    select.select([ended], [], [], timeout_s)
    os.close(ended)


def use_this_server() -> None:
    """Called where this process's server was started by another process: use it, and never start one.

    multiprocessing's check whether the server runs only knows servers that this very process started, and would start
    another, cold one: also in a child of the server that starts siblings.
    """
    _server.ensure_running = lambda: None


def _fork_from(zygote: Offer) -> bool:
    """Have this process's server forked from a zygote; whether one could be asked that fits."""
    if fingerprint(os.environ) != zygote.fingerprint:
        logger.info("The environment differs from the driver's: this agent imports for itself.")
        return False
    address = os.path.join(multiprocessing.util.get_temp_dir(), "fork-server")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        os.chmod(address, 0o600)
        listener.listen()
        theirs, ours = os.pipe()
        try:
            ask_for_server(zygote.address, listener.fileno(), theirs)
        except OSError as error:
            os.close(ours)
            logger.info("The zygote cannot be asked (%s): this agent imports for itself.", error)
            return False
        finally:
            os.close(theirs)
    _server._forkserver_address = address
    _server._forkserver_alive_fd = ours
    use_this_server()
    return True


def die_with_server() -> None:
    """Called in a child: have the kernel kill it when the server ends."""
    server = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The server may have died between fork and prctl; the signal is then never sent.
    if os.getppid() != server:
        os.kill(os.getpid(), signal.SIGKILL)


def leave_fork_server() -> None:
    """Let go of the server, which lives only as long as its clients: in a child, or where the server has died.

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
