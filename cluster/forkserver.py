"""The warm fork server of an agent: torch and flytekit are imported once, each worker is a fork of it.

Python's own multiprocessing fork server does the work. Added here: modules are really preloaded or named as missing,
Ray's main module is not run again in every child (260 ms each), and the server cleans up when its agent is killed
(kfpytorch_ray.cluster.guardian). One per process, because multiprocessing has one per process.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.forkserver
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

from kfpytorch_ray.cluster import guardian

logger = logging.getLogger(__name__)

PRELOAD = (
    "kfpytorch_ray.cluster.guardian",
    "numpy",
    "torch",
    "torch.distributed",
    "torch.distributed.elastic.multiprocessing.errors",
    "flytekit.bin.entrypoint",
    "kfpytorch_ray.cluster.worker",
)


class ForkServer:
    """Starts worker processes from a warm server.

    The server gets the environment and the current directory of this process at the time of construction, so that
    variables that libraries read while they are imported (OMP_NUM_THREADS) have their effect.

    Args:
        preload: Modules to import besides ``PRELOAD``.
        folders: Folders to remove if this process is killed.
    """

    def __init__(self, preload: tuple[str, ...], folders: tuple[str, ...]) -> None:
        self._preload = (*PRELOAD, *preload)
        self._context = multiprocessing.get_context("forkserver")
        _hide_main_module()
        multiprocessing.forkserver.set_forkserver_preload(list(self._preload))
        os.environ[guardian.FOLDERS_VARIABLE] = os.pathsep.join(folders)
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            del os.environ[guardian.FOLDERS_VARIABLE]

    def wait_until_warm(self) -> None:
        """Wait for the imports, and log the names of modules that could not be imported."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self.start("preload-check", _report_missing, (sender, self._preload))
        sender.close()
        with receiver:
            missing = receiver.recv()
        process.join()
        process.close()
        if missing:
            logger.warning("The fork server could not preload %s; each worker imports them itself.", missing)

    def start(self, name: str, target: Callable[..., None], args: tuple[Any, ...]) -> ForkServerProcess:
        """Fork a process that calls ``target(*args)``; both are pickled, the target by its name."""
        process = self._context.Process(name=name, target=target, args=args)
        process.start()
        return process


def leave_fork_server() -> None:
    """Called in a child: let go of the server, which lives only as long as its clients.

    Otherwise the server would outlive a killed agent as long as a worker runs. The child's own use of the start
    method ``forkserver`` starts a server of its own.
    """
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None
    server._forkserver_address = None
    server._forkserver_pid = None
    server._preload_modules = ["__main__"]


def _hide_main_module() -> None:
    main = sys.modules["__main__"]
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__


def _report_missing(sender: Connection, modules: tuple[str, ...]) -> None:
    with sender:
        sender.send([name for name in modules if name not in sys.modules])
