"""A Ray cluster on this machine whose nodes have a network of their own, so that a partition is a real partition."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, final

from kfpytorch_ray.errors import explain
from kfpytorch_ray.testing.janitor import MARK_VARIABLE, end_cluster, janitor, remove_network
from kfpytorch_ray.testing.laptop import ENVIRONMENT
from kfpytorch_ray.testing.node import Node, raylet_among
from kfpytorch_ray.testing.processes import in_network
from kfpytorch_ray.testing.waiting import FaultError

_GCS_PORT = 6379
_HEAD = 1
_INTERFACE = "eth0"
"""In every namespace. Named to gloo, which would go by the host's name, and that has no address there."""
_START_TIMEOUT_S = 120.0
_numbers = itertools.count()


@cache
def unavailable() -> str:
    """Why this machine cannot have a ``NetworkCluster``; empty where it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "the command ip is missing; on Debian: apt-get install iproute2"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    probe = f"kfr{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "probe", "type", "bridge")
    except FaultError as error:
        return f"this machine refuses network namespaces: {error}"
    finally:
        remove_network(f"kfr{os.getpid()}")
    return ""


@final
class NetworkCluster:
    """A Ray cluster with a network namespace for each node; the driver runs in the head's.

    Its links can be cut and healed. Needs root and iproute2, see ``unavailable()``. This process does not join it: a
    driver is a process of its own, in a namespace.

        with NetworkCluster(nodes=2) as cluster:
            driver = cluster.start_driver("train.py")
            wait_until(lambda: reached(step=3, world_size=2, address=cluster.address), "three steps")
            cluster.cut(cluster.nodes[0])
            driver.wait(120)

    Args:
        nodes: How many there are at first, the head not counted.
        cpus_per_node: Ray's CPUs of each.
        resources: Ray's custom resources of each.

    Raises:
        FaultError: This machine cannot have one.
    """

    def __init__(self, nodes: int = 3, cpus_per_node: float = 4, resources: Mapping[str, float] | None = None) -> None:
        self._first_nodes = nodes
        self._cpus_per_node = cpus_per_node
        self._resources = dict(resources or {})
        self._nodes: list[Node] = []
        self._undo = contextlib.ExitStack()
        # Unique among all processes; names of interfaces have at most 15 characters.
        self._name = f"kfr{os.getpid()}{'abcdefghij'[next(_numbers) % 10]}"
        self._subnet = f"10.{64 + (os.getpid() >> 8) % 128}.{os.getpid() % 256}"
        self._folder = ""
        self._head = ""
        self._hosts = itertools.count(_HEAD + 1)

    def __enter__(self) -> NetworkCluster:
        if reason := unavailable():
            raise FaultError(
                explain(
                    "The network cluster is not started.",
                    reason[0].upper() + reason[1:] + ".",
                    "Run as root on Linux with iproute2, or use LaptopCluster, whose links cannot be cut.",
                )
            )
        with contextlib.ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()
        return self

    def _start(self, undo: contextlib.ExitStack) -> None:
        self._folder = tempfile.mkdtemp(prefix="kfr-", dir="/tmp")
        undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
        Path(self.temp_dir).mkdir()
        undo.enter_context(janitor(self._folder, self._name))
        undo.callback(remove_network, self._name)
        _ip("link", "add", self._name, "type", "bridge")
        _ip("link", "set", self._name, "up")
        undo.callback(end_cluster, self._folder)
        self._head = self._make_namespace(_HEAD)
        options = ("--head", f"--port={_GCS_PORT}", "--include-dashboard=false", f"--temp-dir={self._folder}")
        self._start_ray(_HEAD, *options, "--num-cpus=0")
        for _ in range(self._first_nodes):
            self.add_node()

    def __exit__(self, *_error: object) -> None:
        self._undo.close()

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the cluster's GCS, which only processes in its namespaces reach."""
        return f"{self._subnet}.1:{_GCS_PORT}"

    @property
    def temp_dir(self) -> str:
        """The temporary folder of all nodes."""
        return os.path.join(self._folder, "t")

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that live, oldest first, the head not counted; a node that is cut off lives."""
        return tuple(node for node in self._nodes if node.alive)

    def add_node(self) -> Node:
        """Start one more node and wait until it has joined."""
        host = next(self._hosts)
        namespace = self._make_namespace(host)
        amounts = (f"--num-cpus={self._cpus_per_node}", f"--resources={json.dumps(self._resources)}")
        self._start_ray(host, f"--address={self.address}", *amounts)
        node = Node.of_raylet(raylet_among(in_network(namespace)), namespace)
        self._nodes.append(node)
        return node

    def cut(self, node: Node) -> None:
        """Cut a node off from all others: nothing that it sends arrives, and nobody is told."""
        _ip("link", "set", self._link_of(node), "down")

    def heal(self, node: Node) -> None:
        """Undo ``cut``."""
        _ip("link", "set", self._link_of(node), "up")

    def start_driver(self, script: str | os.PathLike[str], *args: str, **options: Any) -> subprocess.Popen[str]:
        """Start a Python script in the head's namespace, with ``RAY_ADDRESS`` set. It is killed with the cluster.

        Args:
            script: Its path, or its text if that has more than one line.
            *args: Its arguments.
            **options: For ``subprocess.Popen``: ``stdout``, ``cwd``, ``env`` and others.

        Returns:
            The process; signals sent to it reach Python.
        """
        path = os.fspath(script)
        if "\n" in path:
            descriptor, path = tempfile.mkstemp(suffix=".py", dir=self._folder)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(os.fspath(script))
        environment = {**self._environment, **(options.pop("env", None) or {}), "RAY_ADDRESS": self.address}
        driver = ["ip", "netns", "exec", self._head, sys.executable, path, *args]
        return subprocess.Popen(driver, env=environment, text=True, **options)

    def _make_namespace(self, host: int) -> str:
        namespace, link = f"{self._name}-{host}", f"{self._name}v{host}"
        _ip("netns", "add", namespace)
        _ip("link", "add", link, "type", "veth", "peer", "name", _INTERFACE, "netns", namespace)
        _ip("link", "set", link, "master", self._name, "up")
        _ip("-n", namespace, "address", "add", f"{self._address_of(host)}/24", "dev", _INTERFACE)
        for interface in ("lo", _INTERFACE):
            _ip("-n", namespace, "link", "set", interface, "up")
        return namespace

    def _address_of(self, host: int) -> str:
        return f"{self._subnet}.{host}"

    def _link_of(self, node: Node) -> str:
        if node not in self._nodes:
            raise FaultError(
                explain(
                    f"Node {node.node_id} is not one of this cluster's.",
                    f"It has {len(self._nodes)} nodes.",
                    "Take one from cluster.nodes.",
                )
            )
        return f"{self._name}v{node.network.rpartition('-')[2]}"

    def _start_ray(self, host: int, *options: str) -> None:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={self._address_of(host)}"]
        _run(["ip", "netns", "exec", f"{self._name}-{host}", *ray, *options], env=self._environment)

    @property
    def _environment(self) -> dict[str, str]:
        names = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), _INTERFACE)
        mine = {"TMPDIR": self.temp_dir, MARK_VARIABLE: self._folder}
        return {**os.environ, **ENVIRONMENT, **names, **mine}


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command_line: list[str], env: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command_line,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=_START_TIMEOUT_S,
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
