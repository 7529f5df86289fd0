"""What ranks report of their nodes, and what a cluster says of itself. Plain data, for kfpytorch_ray.cluster.doctor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kfpytorch_ray.cluster.remote.versions import Versions
from kfpytorch_ray.doctor.machine import Space
from kfpytorch_ray.doctor.torch_report import TorchReport

LARGE_BYTES = 64 * 2**20
"""What is reduced by the large all_reduce: about one bucket of gradients, and long enough to tell a slow link."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Bounds of what one clock shows more than another, in seconds."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node that Ray knows to be alive.

    Attributes:
        node_id: Ray's id of it.
        address: Ray's address of it.
        head: Whether it is the head.
        resources: What it has in all, in Ray's words; memory in bytes.
    """

    node_id: str
    address: str
    head: bool
    resources: Mapping[str, float]

    @property
    def holds_agents(self) -> bool:
        """Whether an agent may be placed there."""
        return self.resources.get("CPU", 0) >= 1


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A node's object store, as its raylet was told.

    Attributes:
        node_id: Ray's id of the node.
        size_bytes: Its size.
        folder: Where its memory is mapped.
    """

    node_id: str
    size_bytes: int
    folder: str


@dataclass(frozen=True, slots=True)
class Peer:
    """A connection from one node to another.

    Attributes:
        rank: Of the other.
        error: Why it could not be made; empty if it could.
        ahead: What the other's clock shows more; None without a connection.
    """

    rank: int
    error: str = ""
    ahead: Interval | None = None


@dataclass(frozen=True, slots=True)
class Collective:
    """An all_reduce of all ranks.

    Attributes:
        backend: ``"gloo"`` or ``"nccl"``.
        error: Why it failed; empty if it did not.
        small_s: Seconds for one number.
        large_s: Seconds for 64 MiB.
    """

    backend: str
    error: str = ""
    small_s: float = 0.0
    large_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StorageAnswer:
    """What a node could do with the storage.

    Attributes:
        error: Why it cannot use it; empty if it can.
        beat_at: The time that the machine which launches had written there, by its clock; None if nothing was there.
        read_at: When it was read, by the node's clock.
    """

    error: str = ""
    beat_at: float | None = None
    read_at: float = 0.0


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A node, seen by a worker on it.

    Attributes:
        rank: Of the worker.
        address: Of the node on the way to rank 0.
        interface: The network interface that has the address; empty where it is not known.
        boot_id: The kernel's name for its present run, which all that share its clock have in common.
        hostname: Its name.
        host_addresses: What the name resolves to there.
        object_store: None where it is not known.
        versions: Of what the worker runs with.
        torch: What torch says; None where it cannot be imported.
        shared_memory: /dev/shm; None where it is not there.
        temporary: The folder for temporary files; None where it cannot be written.
        open_files: How many files a process may have open.
        pidfd: Whether processes can be watched by handle.
        gpus: Names of its GPUs, whether or not this worker may use them.
        began_at: When the worker began, by the node's clock.
        ended_at: When it was done, by the node's clock.
        peers: Connections to all other ranks.
        collective: None where it was left out.
        storage: None where there is none.
    """

    rank: int
    address: str
    interface: str
    boot_id: str
    hostname: str
    host_addresses: tuple[str, ...]
    object_store: ObjectStore | None
    versions: Versions
    torch: TorchReport | None
    shared_memory: Space | None
    temporary: Space | None
    open_files: int
    pidfd: bool
    gpus: tuple[str, ...]
    began_at: float
    ended_at: float
    peers: tuple[Peer, ...] = ()
    collective: Collective | None = None
    storage: StorageAnswer | None = None
