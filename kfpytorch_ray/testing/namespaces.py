"""Network namespaces that a bridge joins: machines with a network of their own, whose links can be cut.

What runs in them is the business of kfpytorch_ray.testing.NetworkCluster and kfpytorch_ray.testing.Laptop.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from typing import Any, final

from kfpytorch_ray.errors import explain
from kfpytorch_ray.testing.janitor import remove_network
from kfpytorch_ray.testing.waiting import FaultError

INTERFACE = "eth0"
"""In every namespace."""
_TIMEOUT_S = 120.0
_numbers = itertools.count()


@cache
def unavailable() -> str:
    """Why this machine cannot have a ``NetworkCluster`` or a ``Laptop``; empty where it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "the command ip is missing; on Debian: apt-get install iproute2"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    # No name of another process's begins like this.
    name = f"kfr{os.getpid()}p"
    probe = f"{name}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "probe", "type", "bridge")
    except FaultError as error:
        return f"this machine refuses network namespaces: {error}"
    finally:
        remove_network(name)
    return ""


@final
class Network:
    """A bridge, and hosts at it: network namespaces with an address each.

    Attributes:
        name: The bridge's, which the names of the namespaces begin with.
    """

    def __init__(self) -> None:
        number = next(_numbers)
        # Unique among all processes; names of interfaces have at most 15 characters.
        self.name = f"kfr{os.getpid()}{'abcdefghij'[number % 10]}"
        # The bridge may have an address in this namespace, where two networks must not be the same.
        spread = os.getpid() + 257 * number
        self._subnet = f"10.{64 + (spread >> 8) % 128}.{spread % 256}"

    def create(self, undo: contextlib.ExitStack) -> None:
        """Make the bridge; ``undo`` removes it and all hosts."""
        undo.callback(remove_network, self.name)
        _ip("link", "add", self.name, "type", "bridge")
        _ip("link", "set", self.name, "up")

    def join(self, host: int) -> None:
        """Give this namespace an address in the network as well: a host's number."""
        _ip("address", "add", f"{self.address(host)}/24", "dev", self.name)

    def add(self, host: int) -> None:
        """Make a host's namespace and join it to the bridge."""
        namespace = self.namespace(host)
        _ip("netns", "add", namespace)
        _ip("link", "add", self._link(host), "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
        _ip("link", "set", self._link(host), "master", self.name, "up")
        _ip("-n", namespace, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", namespace, "link", "set", interface, "up")

    def address(self, host: int) -> str:
        """A host's."""
        return f"{self._subnet}.{host}"

    def namespace(self, host: int) -> str:
        """The name of a host's namespace."""
        return f"{self.name}-{host}"

    def cut(self, host: int) -> None:
        """Cut a host off from all others: nothing that it sends arrives, and nobody is told."""
        _ip("link", "set", self._link(host), "down")

    def heal(self, host: int) -> None:
        """Undo ``cut``."""
        _ip("link", "set", self._link(host), "up")

    def run(self, host: int, command_line: list[str], env: Mapping[str, str]) -> None:
        """Run a command on a host to its end.

        Raises:
            FaultError: It failed.
        """
        _run(["ip", "netns", "exec", self.namespace(host), *command_line], env)

    def start_python(
        self, host: int, script: str | os.PathLike[str], args: tuple[str, ...], folder: str, **options: Any
    ) -> subprocess.Popen[str]:
        """Start a Python script on a host.

        Args:
            host: Its number.
            script: Its path, or its text if that has more than one line.
            args: Its arguments.
            folder: For the text.
            **options: For ``subprocess.Popen``.

        Returns:
            The process; signals sent to it reach Python.
        """
        path = os.fspath(script)
        if "\n" in path:
            descriptor, path = tempfile.mkstemp(suffix=".py", dir=folder)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(os.fspath(script))
        command_line = ["ip", "netns", "exec", self.namespace(host), sys.executable, path, *args]
        return subprocess.Popen(command_line, text=True, **options)

    def _link(self, host: int) -> str:
        return f"{self.name}v{host}"


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command_line: list[str], env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command_line,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise FaultError(
            explain(
                f"The command {shlex.join(command_line)} failed.",
                (done.stderr or done.stdout).strip(),
                "It needs root, and a kernel and container that allow network namespaces.",
            )
        )
