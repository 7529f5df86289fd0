"""The driver of a remote run, as the entrypoint of its Ray job: ``python -m kfpytorch_ray.cluster.remote.driver URI``.

The URI names the run's folder in the storage, and behind ``#`` the SHA-256 of the request, which came by the job API
and not by the storage. The call is passed on to the workers as it is: only they unpickle it. Whatever happens is left
in the storage as the run's outcome, and the error's message as the last lines of the job's log.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from kfpytorch_ray.cluster.fetching import stored
from kfpytorch_ray.cluster.interruption import TERMINATED, interruptible
from kfpytorch_ray.cluster.launching import Launched, run_request
from kfpytorch_ray.cluster.remote.lease import LeaseWatch
from kfpytorch_ray.cluster.remote.outcome import NOTHING, Record, error_of, result_name, write_failure, write_outcome
from kfpytorch_ray.cluster.remote.staged import read_request
from kfpytorch_ray.cluster.request import RayRequest
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.errors import KfpytorchRayError, LaunchError, RunStoppedError, StorageError, explain
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import DRIVER_LOG, MANIFEST, read_outcome
from kfpytorch_ray.storage import Digest, Storage

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
_UPLOADS_AT_A_TIME = 4


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
        if folder.read(MANIFEST) is None:
            raise StorageError(
                explain(
                    f"{folder.uri} holds no run.",
                    "It was removed before its job began, or this machine sees another storage of that name.",
                    "Launch again, with storage that both sides reach.",
                )
            )
    except KfpytorchRayError as error:
        # There is nowhere to leave it.
        _say(error)
        return EXIT_FAILED
    try:
        manifest, (request, options) = read_request(folder, sha256)
        request = replace(request, setup=replace(request.setup, known_as=manifest.run_id))
        options = replace(options, working_dir=working_dir)
    except Exception as error:  # noqa: BLE001 - of other versions here, perhaps; the outcome says it
        return fail(folder, error_of(error, "The driver of the run"), EXIT_FAILED)
    lease = LeaseWatch(folder, manifest.lease_s)
    with interruptible(), lease:
        return _run(folder, request, options, lease, manifest.backend)


def _run(folder: Storage, request: RayRequest, options: RayBackend, lease: LeaseWatch, backend: str) -> int:
    try:
        launched = run_request(request, options, home=False, backend=backend)
        # Before the outcome, which tells that everything else is there.
        _keep_log(folder)
        _write_success(folder, launched)
    except Exception as error:  # noqa: BLE001 - the outcome says it
        return fail(folder, error_of(error, f"{request.setup.name}: the driver of the run"), EXIT_FAILED)
    except (SystemExit, KeyboardInterrupt):
        if _has_succeeded(folder):
            # It was asked in the instant after it said so.
            return 0
        why = lease.reason or "The job was asked to stop."
        stopped = RunStoppedError(explain(f"{request.setup.name} was stopped.", why, lease.fix))
        return fail(folder, stopped, TERMINATED)
    return 0


def _write_success(folder: Storage, launched: Launched) -> None:
    try:
        with ThreadPoolExecutor(_UPLOADS_AT_A_TIME, "kfpytorch-ray-upload") as pool:
            digests = list(pool.map(partial(_upload, folder), range(len(launched.refs)), launched.refs))
    except LaunchError as error:
        # A node with results was lost: what became of the ranks is known all the same.
        error.add("", launched.rounds)
        error.report = launched.report
        raise
    results = tuple((digest.sha256, digest.size_bytes) for digest in digests)
    write_outcome(folder, RunStatus.SUCCEEDED, Record(launched.rounds, report=launched.report), results)


def _has_succeeded(folder: Storage) -> bool:
    with contextlib.suppress(StorageError):
        outcome = read_outcome(folder)
        return outcome is not None and outcome.state == RunStatus.SUCCEEDED.value
    return False


def _upload(folder: Storage, rank: int, ref: Any) -> Digest:
    spooled = stored(ref, rank)
    return NOTHING if spooled is None else folder.upload(result_name(rank), [spooled.data])


def fail(folder: Storage, error: KfpytorchRayError, exit_code: int) -> int:
    """Leave why the run has failed or was stopped: in this job's log, in the copy of it, and as the run's outcome.

    Returns:
        The exit code.
    """
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
