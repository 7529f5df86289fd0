"""The driver of a remote run, as the entrypoint of its Ray job: ``python -m kfpytorch_ray.cluster.remote.driver URI``.

The URI names the run's folder in the storage, and behind ``#`` the SHA-256 of the request, which came by the job API
and not by the storage. The call is passed on to the workers as it is: only they unpickle it. Whatever happens is left
in the storage as the run's outcome, and the error's message as the last lines of the job's log.
"""

from __future__ import annotations

import logging
import pickle
import sys
from dataclasses import replace
from pathlib import Path

from kfpytorch_ray.cluster.interruption import TERMINATED, interruptible
from kfpytorch_ray.cluster.launching import run_request
from kfpytorch_ray.cluster.remote.lease import LeaseWatch
from kfpytorch_ray.cluster.remote.outcome import write_failure, write_success
from kfpytorch_ray.cluster.request import RayRequest
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.errors import IntegrityError, KfpytorchRayError, RunStoppedError, StorageError, explain
from kfpytorch_ray.runs import DRIVER_LOG, MANIFEST, REQUEST, Manifest
from kfpytorch_ray.storage import Storage, digest_of

logger = logging.getLogger(__name__)

EXIT_FAILED = 1


def main(uri: str, working_dir: str = "") -> int:
    """Run what the folder at ``uri`` asks for.

    Args:
        uri: Of the run's folder, with the SHA-256 of the request.
        working_dir: Folder of the user's modules that is sent to the nodes; empty where they have it.

    Returns:
        The exit code: 0 if every rank returned, 1 if not, 143 if it was stopped.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    location, _, sha256 = uri.partition("#")
    try:
        folder = Storage(location)
        manifest, request, options = _read(folder, sha256)
        lease = LeaseWatch(folder, manifest.lease_s)
        with interruptible(), lease:
            return _run(folder, request, replace(options, working_dir=working_dir), lease)
    except KfpytorchRayError as error:
        _say(error)
        return EXIT_FAILED


def _read(folder: Storage, sha256: str) -> tuple[Manifest, RayRequest, RayBackend]:
    described, data = folder.read(MANIFEST), folder.read(REQUEST)
    if described is None or data is None:
        raise StorageError(
            explain(
                f"{folder.uri} has no request.",
                "It was removed before its job began, or this machine sees another storage of that name.",
                "Launch again, with storage that both sides reach.",
            )
        )
    if digest_of(data).sha256 != sha256:
        raise IntegrityError(
            explain(
                f"The request in {folder.uri} is not the one that was submitted.",
                "Its SHA-256 differs from the one in the job's entrypoint, so it was not unpickled.",
                "Launch again. If it happens again, find out who else can write to this storage.",
            )
        )
    request, options = pickle.loads(data)
    return Manifest.from_json(described), request, options


def _run(folder: Storage, request: RayRequest, options: RayBackend, lease: LeaseWatch) -> int:
    try:
        launched = run_request(request, options, home=False)
        # Before the outcome, which tells that everything else is there.
        _keep_log(folder)
        write_success(folder, launched)
    except KfpytorchRayError as error:
        return _fail(folder, error, EXIT_FAILED)
    except (SystemExit, KeyboardInterrupt):
        why = lease.reason or "The job was asked to stop."
        stopped = RunStoppedError(explain(f"{request.setup.name} was stopped.", why, lease.fix))
        return _fail(folder, stopped, TERMINATED)
    return 0


def _fail(folder: Storage, error: KfpytorchRayError, exit_code: int) -> int:
    _say(error)
    _keep_log(folder)
    write_failure(folder, error)
    return exit_code


def _say(error: KfpytorchRayError) -> None:
    """As the last lines of the job's log, of which Ray keeps some as the job's message."""
    sys.stdout.flush()
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()


def _keep_log(folder: Storage) -> None:
    """Copy what this job has printed so far to where it outlives the cluster."""
    sys.stdout.flush()
    log = Path("/proc/self/fd/1").resolve()
    if not log.is_file():
        return
    try:
        with log.open("rb") as file:
            folder.upload(DRIVER_LOG, iter(lambda: file.read(2**20), b""))
    except (OSError, KfpytorchRayError) as error:
        logger.warning("The log of this job could not be kept in %s: %s", folder.uri, error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
