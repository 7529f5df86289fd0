"""A look at a remote cluster before anything is sent to it: which versions run there, and does it reach the storage?

Only a process of the cluster can tell, so a small job is submitted (this module is its entrypoint, too). It reads what
was written here and answers in the same place, which proves the storage in both directions. The answer counts for a
day, while the head lives, so that only the first launch waits for it. Rights that the cluster loses meanwhile are seen
by the run's driver, which can leave no outcome then: they are in the last lines of the error of a lost run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

from kfpytorch_ray.cluster.remote.client import JobClient
from kfpytorch_ray.cluster.remote.versions import SEND_IT, Versions, here
from kfpytorch_ray.errors import ClusterError, KfpytorchRayError, StorageError, VersionMismatchError, explain
from kfpytorch_ray.runs import CLUSTERS, STALE_S
from kfpytorch_ray.storage import Storage

_TIMEOUT_S = 600.0
"""pip packages of a runtime environment may have to be installed first."""
_MODULE = "kfpytorch_ray"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a cluster has said of itself.

    Attributes:
        versions: Of what runs there.
        clock: Its time, in seconds since the epoch.
        asked_at: Ours when it was asked.
    """

    versions: Versions
    clock: float
    asked_at: float


def probe(client: JobClient, storage: Storage, runtime_env: dict[str, Any], *, fresh: bool = False) -> Answer:
    """Ask a cluster for its versions, and prove that it reads and writes the storage.

    Args:
        client: Of the cluster.
        storage: That the launch uses.
        runtime_env: Of the job, without its working directory: packages change versions.
        fresh: Ask in any case, instead of taking what it answered before.

    Raises:
        ClusterError: It cannot be reached, or runs no job.
        VersionMismatchError: kfpytorch_ray, or what it needs, is not installed there.
        StorageError: The storage cannot be written here, or cannot be read and written there.
    """
    name = f"{_name(client.version(), storage, runtime_env)}.json"
    folder = storage.folder(CLUSTERS)
    known = None if fresh else folder.read(name)
    if known is not None and time.time() - (answer := _parsed(known)).asked_at < STALE_S:
        return answer
    # Others may ask at the same time.
    question, nonce = uuid.uuid4().hex, uuid.uuid4().hex
    try:
        folder.write(f"{question}.question", json.dumps({"asked_at": time.time(), "nonce": nonce}).encode())
        _run(client, folder, question, runtime_env)
        said = folder.read(f"{question}.answer")
    finally:
        # What went wrong before counts, and is most often the reason why this does, too.
        with contextlib.suppress(StorageError):
            for file in (f"{question}.question", f"{question}.answer"):
                folder.remove(file)
    if said is None or json.loads(said)["nonce"] != nonce:
        raise _not_shared(storage, "The cluster has answered, but not here: it sees another folder under this name.")
    folder.write(name, said)
    return _parsed(said)


def _run(client: JobClient, folder: Storage, question: str, runtime_env: dict[str, Any]) -> None:
    arguments = (shlex.quote(argument) for argument in (folder.uri, question))
    job_id = client.submit_job(
        entrypoint=f"python -m {__name__} {' '.join(arguments)}",
        submission_id=f"kfr-probe-{uuid.uuid4().hex[:12]}",
        runtime_env=runtime_env,
    )
    try:
        job = client.wait_until_over(job_id, _TIMEOUT_S)
    except TimeoutError as error:
        client.stop_job(job_id)
        raise ClusterError(
            explain(
                f"The cluster at {client.address} has not run a small job.",
                str(error),
                "Look at it in Ray's dashboard; a runtime_env with many packages takes long the first time.",
            )
        ) from error
    except BaseException:
        client.stop_job(job_id)
        raise
    if job.status.value != "SUCCEEDED":
        failure = _why_it_failed(client, folder, str(client.get_job_logs(job_id)), str(job.message))
        if isinstance(failure, StorageError | VersionMismatchError):
            # All that its log tells has been told.
            client.forget(job_id)
        raise failure
    client.forget(job_id)


def _why_it_failed(client: JobClient, folder: Storage, log: str, message: str) -> KfpytorchRayError:
    lines = [line for line in log.strip().splitlines() if line.strip()]
    last = lines[-1] if lines else message
    if "No module named" in last:
        version = here()
        return VersionMismatchError(
            explain(
                f"The cluster at {client.address} cannot run kfpytorch_ray: {last.strip()}.",
                "The driver of a run is a process of the cluster and needs the same packages as this one.",
                f"Install kfpytorch_ray=={version.kfpytorch_ray} (and with it flytekit and torch) in the cluster's "
                f"image, or send it: {SEND_IT}, with what else is missing by 'pip'.",
            )
        )
    if (start := log.find(_STORAGE_MARK)) >= 0:
        return _not_shared(folder, log[start + len(_STORAGE_MARK) :].strip())
    return ClusterError(
        explain(
            f"The cluster at {client.address} could not run a small job.",
            f"{message.strip()} {last}".strip(),
            "Look at its log in Ray's dashboard. `python` there has to be the Python that Ray runs with.",
        )
    )


def _not_shared(storage: Storage, why: str) -> StorageError:
    return StorageError(
        explain(
            f"The cluster cannot use the storage {storage.uri}.",
            " ".join(line.removeprefix("Why: ") for line in why.splitlines() if not line.startswith("Fix: ")),
            "Name a storage that this machine and the cluster's head both read and write, and give the cluster the "
            "rights and the package for it (s3fs for s3://, gcsfs for gs://).",
        )
    )


def _name(version: dict[str, Any], storage: Storage, runtime_env: dict[str, Any]) -> str:
    """A cluster's name is that of its session: another head, or the same one started anew, has another."""
    what = json.dumps([version.get("session_name"), version.get("ray_version"), storage.uri, runtime_env], default=str)
    return hashlib.sha256(what.encode()).hexdigest()[:24]


def _parsed(said: bytes) -> Answer:
    answer = json.loads(said)
    return Answer(Versions.from_json(answer["versions"]), answer["clock"], answer["asked_at"])


_STORAGE_MARK = "kfpytorch_ray probe, storage: "


def _answer(uri: str, question: str) -> None:
    folder = Storage(uri)
    asked = folder.read(f"{question}.question")
    if asked is None:
        msg = f"{uri}/{question}.question, which was written by the machine that launches, is not there."
        raise StorageError(msg)
    said = {**json.loads(asked), "versions": here().to_json(), "clock": time.time()}
    folder.write(f"{question}.answer", json.dumps(said).encode())


if __name__ == "__main__":
    try:
        _answer(*sys.argv[1:])
    except StorageError as error:
        sys.exit(f"{_STORAGE_MARK}{error}")
