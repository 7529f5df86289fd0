"""A Ray cluster of several nodes on this machine, for as long as a ``with`` block runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from kfpytorch_ray.errors import explain
from kfpytorch_ray.testing.janitor import MARK_VARIABLE, janitor
from kfpytorch_ray.testing.node import Node
from kfpytorch_ray.testing.starting import start_ray
from kfpytorch_ray.testing.waiting import FaultError, wait_until

_LEAVE_WAIT_S = 60.0

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
"""Laid over this process's environment while the cluster is there: Ray reads it in processes that it starts.

Ray 2.60 turns token authentication on where it finds a token file, and clusters of one machine then refuse each other.
"""


@final
class LaptopCluster:
    """A Ray cluster on this machine that this process has joined: a head without CPUs, and nodes with a raylet each.

    As on KubeRay, nothing is placed on the head, where the driver is, and every agent is on a node of its own. What
    goes into the temporary folder of a machine goes into ``temp_dir`` here, so that it is seen what stays behind.

        with LaptopCluster(nodes=3) as cluster:
            result = launch(train, elastic=Elastic(nnodes=3, backend="ray"))

    The nodes share this machine's cores, whatever number Ray is told.

    Args:
        nodes: How many there are at first, the head not counted.
        cpus_per_node: Ray's CPUs of each.
        gpus_per_node: Ray's GPUs of each; no such device has to be there.
        resources: Ray's custom resources of each.
    """

    def __init__(
        self,
        nodes: int = 3,
        cpus_per_node: float = 4,
        gpus_per_node: float = 0,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        self._first_nodes = nodes
        self._amounts: dict[str, Any] = {
            "num_cpus": cpus_per_node,
            "num_gpus": gpus_per_node,
            "resources": dict(resources or {}),
        }
        self._nodes: dict[Node, Any] = {}
        self._undo = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._cluster: Any = None
        self._folder = ""

    def __enter__(self) -> LaptopCluster:
        import ray

        if ray.is_initialized():
            raise FaultError(
                explain(
                    "The laptop cluster is not started.",
                    "This process has joined a Ray cluster already.",
                    "Call ray.shutdown() first.",
                )
            )
        with contextlib.ExitStack() as undo:
            self._start(undo)
            self._undo = undo.pop_all()
        return self

    def _start(self, undo: contextlib.ExitStack) -> None:
        import ray
        from ray._common.utils import get_ray_address_file
        from ray.cluster_utils import Cluster

        # Cluster writes its address there also where the folder is another; where no Ray has run yet, it fails.
        Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
        # Sockets lie in it, whose paths must not be longer than 107 bytes.
        self._folder = tempfile.mkdtemp(prefix="kfr-", dir="/tmp")
        undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
        Path(self.temp_dir).mkdir()
        undo.enter_context(janitor(self._folder))
        undo.enter_context(laid_over({**ENVIRONMENT, MARK_VARIABLE: self._folder}))
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": self._folder, "env_vars": self._variables}
        # With shutdown_at_exit, Ray's processes would end with the thread that started them, and it would take SIGTERM.
        self._cluster = start_ray(lambda: Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False))
        undo.callback(self._cluster.shutdown)
        for _ in range(self._first_nodes):
            self._start_node({})
        ray.init(address=self.address)
        undo.callback(ray.shutdown)
        # And no others: Ray may still count one that was late, and was killed for it.
        expected = {self._cluster.head_node.node_id, *(node.node_id for node in self._nodes)}
        wait_until(lambda: _living() == expected, "all nodes to join")

    def __exit__(self, *_error: object) -> None:
        self._nodes.clear()
        self._undo.close()

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the cluster's GCS, for ``RAY_ADDRESS`` and ``RayBackend(address=...)``."""
        return str(self._cluster.address)

    @property
    def temp_dir(self) -> str:
        """The temporary folder of all nodes."""
        return os.path.join(self._folder, "t")

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that live, oldest first, the head not counted."""
        return tuple(node for node in self._nodes if node.alive)

    def add_node(self, **amounts: Any) -> Node:
        """Start one more node and wait until it has joined.

        Args:
            **amounts: Instead of the cluster's: ``num_cpus``, ``num_gpus``, ``resources``, ``labels``.
        """
        node = self._start_node(amounts)
        wait_until(lambda: node.node_id in _living(), "a node to join")
        return node

    def remove_node(self, node: Node) -> None:
        """Take a node away in good order: its raylet is told to end, and ends its actors. Returns when it is gone."""
        started = self._own(node)
        with self._lock:
            self._cluster.remove_node(started)
            del self._nodes[node]

    def wait_for_loss(self, node: Node) -> None:
        """Wait until Ray has noticed that a node is gone."""
        wait_until(lambda: node.node_id not in _living(), "Ray to notice that a node is gone", _LEAVE_WAIT_S)
        with self._lock:
            self._cluster.worker_nodes.discard(self._nodes.pop(node))

    def _own(self, node: Node) -> Any:
        try:
            return self._nodes[node]
        except KeyError:
            raise FaultError(
                explain(
                    f"Node {node.node_id} is not one of this cluster's.",
                    f"It has {len(self.nodes)} nodes.",
                    "Take one from cluster.nodes.",
                )
            ) from None

    def _start_node(self, amounts: Mapping[str, Any]) -> Node:
        with self._lock:
            # Joining takes 2-3 s; several do it at a time.
            options = {"wait": False, "env_vars": self._variables, **self._amounts, **amounts}
            started = start_ray(lambda: self._cluster.add_node(**options))
            raylet = started.all_processes["raylet"][0].process.pid
            node = Node(started.node_id, started.node_ip_address, raylet)
            self._nodes[node] = started
            return node

    @property
    def _variables(self) -> dict[str, str]:
        return {"TMPDIR": self.temp_dir}


def _living() -> set[str]:
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@contextlib.contextmanager
def laid_over(variables: Mapping[str, str]) -> Iterator[None]:
    """This process's environment with others laid over it."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
