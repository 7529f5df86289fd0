"""A place for a driver far from its cluster: its own network namespace, and a link to this one that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from typing import Any, final

from kfpytorch_ray.errors import explain
from kfpytorch_ray.testing.janitor import MARK_VARIABLE, end_cluster, janitor
from kfpytorch_ray.testing.namespaces import Network, unavailable
from kfpytorch_ray.testing.waiting import FaultError

_HERE = 1
_THERE = 2
_NOT_PASSED_ON = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@final
class Laptop:
    """A machine beside this one, as far as its network goes; files and processes are this one's.

    It reaches nothing but ``gateway``, which is this machine's address for it. Needs root and iproute2, see
    ``unavailable()``.

        with Laptop() as laptop, HeadCluster(host=laptop.gateway) as head:
            driver = laptop.start("train.py", head.address, stdout=subprocess.PIPE)
            laptop.cut()
            ...
            laptop.heal()
            driver.wait(120)

    Raises:
        FaultError: This machine cannot have one.
    """

    def __init__(self) -> None:
        self._network = Network()
        self._folder = ""
        self._started: list[subprocess.Popen[str]] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Laptop:
        if reason := unavailable():
            raise FaultError(
                explain(
                    "The laptop is not there.",
                    reason[0].upper() + reason[1:] + ".",
                    "Run as root on Linux with iproute2, or put a Relay between driver and cluster.",
                )
            )
        with contextlib.ExitStack() as undo:
            self._folder = tempfile.mkdtemp(prefix="kfr-", dir="/tmp")
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            undo.enter_context(janitor(self._folder, self._network.name))
            self._network.create(undo)
            self._network.join(_HERE)
            self._network.add(_THERE)
            undo.callback(self._end)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._undo.close()

    @property
    def address(self) -> str:
        """The laptop's."""
        return self._network.address(_THERE)

    @property
    def gateway(self) -> str:
        """This machine's address for the laptop."""
        return self._network.address(_HERE)

    def start(self, script: str | os.PathLike[str], *args: str, **options: Any) -> subprocess.Popen[str]:
        """Start a Python script on the laptop. It is killed with it.

        Args:
            script: Its path, or its text if that has more than one line.
            *args: Its arguments.
            **options: For ``subprocess.Popen``: ``stdout``, ``cwd`` and others; ``env`` is laid over this process's
                environment, which it has without the address of a cluster.

        Returns:
            The process; signals sent to it reach Python.
        """
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        environment = {**inherited, **(options.pop("env", None) or {}), MARK_VARIABLE: self._folder}
        process = self._network.start_python(_THERE, script, args, self._folder, env=environment, **options)
        self._started.append(process)
        return process

    def cut(self) -> None:
        """Cut the link: nothing that is sent arrives, in either direction, and nobody is told."""
        self._network.cut(_THERE)

    def heal(self) -> None:
        """Undo ``cut``."""
        self._network.heal(_THERE)

    def _end(self) -> None:
        end_cluster(self._folder)
        for process in self._started:
            process.kill()
            process.wait()
