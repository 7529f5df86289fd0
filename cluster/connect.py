"""Getting a Ray: the one that is initialised, the one that an address names, or one started here.

Answers one question for the rest of the machinery: is this Ray a real cluster, or does it live on this machine for
this process alone? Only on the latter may several agents share a machine.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RaySystemError

from kfpytorch_ray.cluster.listening import nobody_at, speaks_http
from kfpytorch_ray.cluster.runtime_env import runtime_env_of
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.errors import ClusterUnreachableError, ConfigError, PlacementError, explain

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Embedded:
    """What this process knows of the Ray that it started for launches.

    Attributes:
        address: Of its GCS; None where there is none.
        launches: How many launches use Ray now, whoever started it.
    """

    address: str | None = None
    launches: int = 0


_lock = threading.Lock()
_embedded = _Embedded()


def has_joined() -> bool:
    """Whether this process has joined a Ray, or started one, so that a launch would use it."""
    return bool(ray.is_initialized())


def job_of_now() -> object:
    """Equal as long as this process stays in the Ray that it has joined; None where it has joined none.

    After ``ray.shutdown()`` and ``ray.init()`` it is another job, be it on the same Ray: actors of the one before have
    ended, references lead nowhere, and a call by such an actor's handle aborts the interpreter.
    """
    return ray._private.worker.global_worker.current_cluster_and_job if ray.is_initialized() else None


def starts_here(options: RayBackend) -> bool:
    """Whether a launch would start a Ray on this machine now."""
    return not has_joined() and _address(options) == "local"


@contextmanager
def connected(options: RayBackend, demand: Mapping[str, float]) -> Iterator[bool]:
    """Have a Ray for the time of one launch.

    Args:
        options: Where it is.
        demand: All resources of the launch; a Ray that is started here gets enough logical CPUs and memory for it.

    Yields:
        Whether the Ray was started by this process, on this machine alone.

    Raises:
        ConfigError: The address cannot be used by a driver.
        ClusterUnreachableError: Nobody listens there.
        PlacementError: No Ray answers there.
    """
    with _lock:
        private = _connect(options, demand)
        _embedded.launches += 1
    try:
        yield private
    finally:
        with _lock:
            _embedded.launches -= 1


def _connect(options: RayBackend, demand: Mapping[str, float]) -> bool:
    if ray.is_initialized():
        _refuse_ray_client()
        _refuse_other_address(options.address)
        there = ray.cluster_resources()
        too_small = any(there.get(name, 0) < demand.get(name, 0) for name in ("CPU", "memory"))
        if too_small and _is_embedded() and _embedded.launches == 0:
            logger.warning(
                "The Ray that was started here is too small for the next launch and is started again. Results of "
                "earlier launches that were not fetched are lost; call ray.init(num_cpus=...) first to avoid it."
            )
            ray.shutdown()
            _start(demand)
        private = _started_by_this_process()
        if options.working_dir and not private:
            logger.warning(
                "RayBackend(working_dir=%r) has no effect: this process has joined Ray already, and only "
                "ray.init(runtime_env={'working_dir': ...}) can send it.",
                options.working_dir,
            )
        return private

    address = _address(options)
    if "://" in address:
        raise ConfigError(
            "RayBackend",
            (
                (
                    f"address={address!r}: a driver joins Ray by 'auto' or by HOST:PORT of its GCS. A cluster "
                    "that is elsewhere is reached by its job API: address='http://HOST:8265' and storage=..."
                ),
            ),
        )
    if address == "local":
        _start(demand)
        return True
    _refuse_wrong_port(address)
    try:
        ray.init(address=address, runtime_env=runtime_env_of(options))
    except (ConnectionError, RaySystemError, ValueError) as error:
        raise PlacementError(
            explain(
                f"The Ray cluster at {address!r} cannot be joined.",
                str(error),
                "Check that the cluster runs, that this machine belongs to it, that Python and ray have the same "
                "versions, and that the working directory is not too large (RayBackend(working_dir=, excludes=)); or "
                "leave the address out to start a Ray here.",
            )
        ) from error
    return False


def _address(options: RayBackend) -> str:
    return options.address or os.environ.get("RAY_ADDRESS") or "local"


def _refuse_wrong_port(address: str) -> None:
    if error := nobody_at(address):
        raise ClusterUnreachableError(
            explain(
                f"The Ray cluster at {address!r} cannot be joined.",
                f"Nobody listens there: {error}",
                "Check that the cluster runs, and name its GCS by HOST:PORT (most often port 6379) or 'auto'; a "
                "cluster that is elsewhere by its job API, RayBackend(address='http://HOST:8265', storage=...).",
            )
        )
    if speaks_http(address):
        raise ConfigError(
            "RayBackend",
            (
                (
                    f"address={address!r}: HTTP is spoken there, as by Ray's job API, and a driver can join only its "
                    f"GCS (most often port 6379): give address='http://{address}' and storage=... to have the job API "
                    "run it, or the GCS by HOST:PORT or 'auto' to join it"
                ),
            ),
        )


def _start(demand: Mapping[str, float]) -> None:
    # Logical amounts: several agents share this machine as several nodes would not.
    cpus = max(os.cpu_count() or 1, math.ceil(demand.get("CPU", 0)))
    arguments: dict[str, Any] = {}
    if demand.get("memory"):
        arguments["_memory"] = math.ceil(demand["memory"])
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **arguments)
    except Exception as error:
        # Of any class: a node that does not start within Ray's 30 s is a bare Exception.
        raise PlacementError(
            explain(
                "No Ray could be started on this machine.",
                str(error),
                "Look into Ray's logs under /tmp/ray, or start one by hand and name it: RAY_ADDRESS=HOST:PORT.",
            )
        ) from error
    _embedded.address = ray.get_runtime_context().gcs_address


def _is_embedded() -> bool:
    """Whether the Ray of now is the one that was started for launches, and not one of the user's."""
    return _embedded.address is not None and _embedded.address == ray.get_runtime_context().gcs_address


def _started_by_this_process() -> bool:
    node = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def node_environ() -> dict[str, str]:
    """The environment of workers of the Ray that this process has started: its own may have changed since then."""
    node = ray._private.worker._global_node
    assert node is not None
    (raylet,) = node.all_processes["raylet"]
    entries = Path(f"/proc/{raylet.process.pid}/environ").read_bytes().split(b"\0")
    found = dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)
    # Ray's allocator, which its workers do not get.
    found.pop("LD_PRELOAD", None)
    return found


def _refuse_ray_client() -> None:
    if ray.util.client.ray.is_connected():
        raise ConfigError(
            "RayBackend",
            (
                (
                    "this process is connected by Ray Client (ray://), which cannot be a driver of training: submit "
                    "the script instead, ray job submit --working-dir . -- python FILE"
                ),
            ),
        )


def _is(address: str, gcs_address: str) -> bool:
    """Whether an address names a GCS. Ray itself knows it by its node's number, whatever name it was joined by."""
    host, _, port = (canonicalize_bootstrap_address(address) or address).rpartition(":")
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(host)
    return gcs_address in (address, f"{host}:{port}")


def _refuse_other_address(address: str | None) -> None:
    if address in (None, "auto"):
        return
    current = ray.get_runtime_context().gcs_address
    if not _is(address, current) and not (address == "local" and _started_by_this_process()):
        raise ConfigError(
            "RayBackend",
            (f"address={address!r}, but this process has joined the Ray at {current}: call ray.shutdown() first",),
        )
