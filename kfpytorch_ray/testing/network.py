"""A Ray cluster on this machine whose nodes have a network of their own, so that a partition is a real partition."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from kfpytorch_ray.errors import explain
from kfpytorch_ray.testing.janitor import MARK_VARIABLE, end_cluster, janitor
from kfpytorch_ray.testing.laptop import ENVIRONMENT
from kfpytorch_ray.testing.namespaces import INTERFACE, Network, unavailable
from kfpytorch_ray.testing.node import Node, raylet_among
from kfpytorch_ray.testing.processes import in_network
from kfpytorch_ray.testing.waiting import FaultError

_GCS_PORT = 6379
_HEAD = 1


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
        self._network = Network()
        self._folder = ""
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
        undo.enter_context(janitor(self._folder, self._network.name))
        self._network.create(undo)
        undo.callback(end_cluster, self._folder)
        self._network.add(_HEAD)
        options = ("--head", f"--port={_GCS_PORT}", "--include-dashboard=false", f"--temp-dir={self._folder}")
        self._start_ray(_HEAD, *options, "--num-cpus=0")
        for _ in range(self._first_nodes):
            self.add_node()

    def __exit__(self, *_error: object) -> None:
        self._undo.close()

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the cluster's GCS, which only processes in its namespaces reach."""
        return f"{self._network.address(_HEAD)}:{_GCS_PORT}"

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
        self._network.add(host)
        amounts = (f"--num-cpus={self._cpus_per_node}", f"--resources={json.dumps(self._resources)}")
        self._start_ray(host, f"--address={self.address}", *amounts)
        namespace = self._network.namespace(host)
        node = Node.of_raylet(raylet_among(in_network(namespace)), namespace)
        self._nodes.append(node)
        return node

    def cut(self, node: Node) -> None:
        """Cut a node off from all others: nothing that it sends arrives, and nobody is told."""
        self._network.cut(self._host_of(node))

    def heal(self, node: Node) -> None:
        """Undo ``cut``."""
        self._network.heal(self._host_of(node))

    def start_driver(self, script: str | os.PathLike[str], *args: str, **options: Any) -> subprocess.Popen[str]:
        """Start a Python script in the head's namespace, with ``RAY_ADDRESS`` set. It is killed with the cluster.

        Args:
            script: Its path, or its text if that has more than one line.
            *args: Its arguments.
            **options: For ``subprocess.Popen``: ``stdout``, ``cwd``, ``env`` and others.

        Returns:
            The process; signals sent to it reach Python.
        """
        environment = {**self._environment, **(options.pop("env", None) or {}), "RAY_ADDRESS": self.address}
        return self._network.start_python(_HEAD, script, args, self._folder, env=environment, **options)

    def _host_of(self, node: Node) -> int:
        if node not in self._nodes:
            raise FaultError(
                explain(
                    f"Node {node.node_id} is not one of this cluster's.",
                    f"It has {len(self._nodes)} nodes.",
                    "Take one from cluster.nodes.",
                )
            )
        return int(node.network.rpartition("-")[2])

    def _start_ray(self, host: int, *options: str) -> None:
        address = self._network.address(host)
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={address}"]
        self._network.run(host, [*ray, *options], self._environment)

    @property
    def _environment(self) -> dict[str, str]:
        # Named to gloo, which would go by the host's name, and that has no address there.
        names = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"), INTERFACE)
        mine = {"TMPDIR": self.temp_dir, MARK_VARIABLE: self._folder}
        return {**os.environ, **ENVIRONMENT, **names, **mine}
