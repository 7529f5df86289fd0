"""What the doctor's launch runs on every node: look around, connect to the others, and do one all_reduce with them.

Whatever goes wrong is reported and not raised, so that the other nodes are heard as well. Called in workers only.
"""

from __future__ import annotations

import contextvars
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from kfpytorch_ray.cluster.doctor.exchange import answer
from kfpytorch_ray.cluster.doctor.report import NodeReport, ObjectStore, StorageAnswer
from kfpytorch_ray.cluster.remote.versions import here
from kfpytorch_ray.doctor.machine import (
    SHARED_MEMORY,
    addresses_of,
    boot_id,
    has_pidfd,
    open_files,
    space,
    temporary_folder,
)
from kfpytorch_ray.doctor.torch_report import torch_report
from kfpytorch_ray.heartbeat import MARK_VARIABLE

_STORAGE_S = 60.0
_BROKEN_S = 10.0
"""For an all_reduce of nodes that are known not to reach each other: most often it waits for nothing."""


def examine(exchange: str | None, backend: str | None) -> NodeReport:
    """Report on this node.

    Args:
        exchange: URI of the folder by which this node and the machine that launches exchange their times; None where
            they share no storage.
        backend: Of the all_reduce; None leaves it out.
    """
    # The machine that launches imports this module, too, and its torch may be what is ill.
    from kfpytorch_ray.cluster.doctor.collective import TIMEOUT_S, all_reduce
    from kfpytorch_ray.cluster.doctor.peers import connect_all, place

    began_at = time.time()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = place(master[0])
    peers = connect_all(rank, world_size, master, where)
    patience_s = _BROKEN_S if any(peer.error for peer in peers) else TIMEOUT_S
    collective = all_reduce(backend, patience_s) if backend else None
    storage = _bounded(lambda: answer(exchange, rank)) if exchange else None
    hostname = socket.gethostname()
    return NodeReport(
        rank=rank,
        address=where.address,
        interface=where.interface,
        boot_id=boot_id(),
        hostname=hostname,
        host_addresses=addresses_of(hostname),
        object_store=_object_store(),
        versions=here(),
        torch=torch_report(),
        shared_memory=space(SHARED_MEMORY),
        temporary=temporary_folder()[0],
        open_files=open_files(),
        pidfd=has_pidfd(),
        gpus=_gpus(),
        began_at=began_at,
        ended_at=time.time(),
        peers=peers,
        collective=collective,
        storage=storage,
    )


def _bounded(ask: Callable[[], StorageAnswer]) -> StorageAnswer:
    """Ask a storage that may never answer."""
    answers: list[StorageAnswer] = []
    # flytekit's way to files goes with the context, and so do its credentials.
    context = contextvars.copy_context()
    thread = threading.Thread(target=lambda: answers.append(context.run(ask)), daemon=True)
    thread.start()
    thread.join(_STORAGE_S)
    return answers[0] if answers else StorageAnswer(f"It did not answer within {_STORAGE_S:g} s.")


def _object_store() -> ObjectStore | None:
    """What this node's raylet was told: Ray says neither its folder to anybody, nor a node's id to a worker of ours."""
    agent = os.environ.get(MARK_VARIABLE, "").partition(os.pathsep)[0]
    try:
        raylet = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1]
        words = Path(f"/proc/{raylet}/cmdline").read_bytes().decode().split("\0")
        options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        return ObjectStore(options["node_id"], int(options["object_store_memory"]), options["plasma_directory"])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _gpus() -> tuple[str, ...]:
    """By the driver's own tool: Ray hides them from a worker that asked for none."""
    command = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines()) if done.returncode == 0 else ()
