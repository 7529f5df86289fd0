"""What Kubeflow's training operator does with the PyTorchJob that Flyte creates: its pods, processes of this machine.

Imitates v1.9.0, pkg/controller.v1/pytorch: envvar.go and elastic.go, whose variables are written down here, and
master.go. What differs: every pod has this machine's address, and the port is a free one.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propeller import Attempt, values_of

from kfpytorch_ray.cluster.kube.flyte_pytorchjob import pytorch_job

HOST = "localhost"
_PORTS = (20_000, 30_000)
"""Above those that Ray gives its workers, and below the kernel's own (net.ipv4.ip_local_port_range)."""
DEADLINE_S = 240.0
GRACE_S = 30.0
"""Of a pod that says nothing else."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A pod that has ended.

    Attributes:
        name: Without the job's.
        exit_code: Of its container.
        log: What that printed.
    """

    name: str
    exit_code: int
    log: str


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that runs.

    Attributes:
        name: Without the job's.
        process: Of its container.
        log: Where that prints.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> Ended:
        """How it ends; its log is shown when the test fails."""
        code = self.process.wait(DEADLINE_S)
        ended = Ended(self.name, code, self.log.read_text())
        print(f"--- {self.name}: {code}\n{ended.log}")
        return ended


def run_pods(attempt: Attempt, image: Mapping[str, str], folder: Path) -> dict[str, Ended]:
    """Run all pods of an attempt at once, and wait for their ends. As ``running_pods``."""
    with running_pods(attempt, image, folder) as pods:
        return {pod.name: pod.ended() for pod in pods}


def delete(pods: Sequence[Pod]) -> dict[str, Ended]:
    """End pods as a kubelet does whose pods are deleted: SIGTERM to each container, SIGKILL after its grace.

    Flyte deletes the PyTorchJob when a task is aborted, and the garbage collector its pods.
    """
    for pod in pods:
        pod.process.terminate()
    for pod in pods:
        with contextlib.suppress(subprocess.TimeoutExpired):
            pod.process.wait(GRACE_S)
        pod.process.kill()
    return {pod.name: pod.ended() for pod in pods}


@contextlib.contextmanager
def running_pods(attempt: Attempt, image: Mapping[str, str], folder: Path) -> Iterator[tuple[Pod, ...]]:
    """All pods of an attempt, started at once; none is left when the block ends.

    Args:
        attempt: Of a task of type ``pytorch``.
        image: Variables that the image sets.
        folder: Each pod's working directory and temporary files are in it.
    """
    running: list[Pod] = []
    try:
        for name, args, variables in _pods(pytorch_job(attempt.template, attempt.execution)):
            own = folder / f"{name}-{attempt.execution.attempt}"
            (own / "tmp").mkdir(parents=True)
            env = {**_clean(), "TMPDIR": str(own / "tmp"), **image, **variables}
            with (own / "log").open("wb") as log:
                process = subprocess.Popen(args, cwd=own, env=env, stdout=log, stderr=subprocess.STDOUT)
            running.append(Pod(name, process, own / "log"))
        yield tuple(running)
    finally:
        for pod in running:
            pod.process.kill()
            pod.process.wait()


def _pods(job: Mapping[str, Any]) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Name, command and variables of each."""
    spec = job["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    port = _free_port()
    world_size = sum(replica["replicas"] for replica in replicas.values())
    for kind, replica in replicas.items():
        (container,) = replica["template"]["spec"]["containers"]
        for index in range(replica["replicas"]):
            variables = {**values_of(container["env"]), "PYTHONUNBUFFERED": "1"}
            if any(one["name"] == "_F_WN" for one in container["env"]):
                variables["_F_WN"] = f"{job['metadata']['name']}-{kind.lower()}-{index}"
            if "Master" in replicas:
                variables |= _of_a_replica(index + (kind == "Worker"), world_size, port)
            if "elasticPolicy" in spec:
                variables |= _of_an_elastic_worker(spec["elasticPolicy"], port)
            yield f"{kind.lower()}-{index}", [*container.get("command", ()), *container["args"]], variables


def _free_port() -> int:
    """A port that stays free until the pods have imported torch.

    The kernel gives none of these to a connection, nor to who asks for any port. One of those it may give to another
    process at once, whose server the pods would then wait for in vain, for minutes.
    """
    while True:
        port = random.randrange(*_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((HOST, port))
            return port


def _of_a_replica(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "PET_MASTER_ADDR": HOST,
        "PET_MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "PET_NODE_RANK": str(rank),
        "PET_NNODES": str(world_size),
    }


def _of_an_elastic_worker(policy: Mapping[str, Any], port: int) -> dict[str, str]:
    return {
        "PET_RDZV_ENDPOINT": f"{HOST}:{port}",
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
        "PET_NPROC_PER_NODE": str(policy["nProcPerNode"]),
    }


def _clean() -> dict[str, str]:
    """This machine's variables, where they are not of these tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "KFPYTORCH_RAY_"))}
    return {**kept, "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
