"""The driver of a run on KubeRay: ``python -m kfpytorch_ray.cluster.kube.driver RUN_ID URI [SHA256:BYTES]``.

The driver of every remote run, once the user's modules are unpacked; the last argument names their zip. Prints a mark
first, from which on the log of whoever submitted it is this process's.

Who submits it may do so again: after the head pod was lost, when another one is there. A run is over then, as it is for
whoever follows it. On another cluster, after a queue took the first one back, it begins anew.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from kfpytorch_ray.cluster.kube import code
from kfpytorch_ray.cluster.kube.pod_log import mark_of
from kfpytorch_ray.cluster.remote import driver
from kfpytorch_ray.cluster.remote.outcome import error_of, write_failure
from kfpytorch_ray.errors import KfpytorchRayError, RunLostError, explain
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import DRIVER, MANIFEST, read_outcome
from kfpytorch_ray.storage import Digest, Storage

CLUSTER_VARIABLE = "RAY_CLUSTER_NAME"
"""KubeRay sets it in the pods of a cluster."""


def main(run_id: str, uri: str, packed: str = "") -> int:
    """Run what the folder at ``uri`` asks for.

    Returns:
        The exit code, as of the driver of every remote run.
    """
    sys.stdout.write(mark_of(run_id))
    sys.stdout.flush()
    try:
        folder = Storage(uri.partition("#")[0])
    except KfpytorchRayError as error:
        sys.stderr.write(f"{error}\n")
        return driver.EXIT_FAILED
    try:
        exit_code = _begun_before(run_id, folder)
        if exit_code is not None:
            return exit_code
        if not packed or folder.read(MANIFEST) is None:
            # It says so where the run was removed.
            return driver.main(uri)
        with tempfile.TemporaryDirectory(prefix="kfpytorch-ray-") as scratch:
            working_dir = Path(scratch, "code")
            working_dir.mkdir()
            sha256, _, size = packed.partition(":")
            code.receive(folder, Digest(sha256, int(size)), working_dir)
            return driver.main(uri, str(working_dir))
    except Exception as error:  # noqa: BLE001 - the outcome says it
        return driver.fail(folder, error_of(error, f"The driver of the run {run_id}"), driver.EXIT_FAILED)


def _begun_before(run_id: str, folder: Storage) -> int | None:
    """Note that the run begins here; the exit code where it began before and is over."""
    if (outcome := read_outcome(folder)) is not None:
        sys.stderr.write(f"The run {run_id} is over already: it {outcome.state}.\n")
        return 0 if outcome.state == RunStatus.SUCCEEDED.value else driver.EXIT_FAILED
    here = os.environ.get(CLUSTER_VARIABLE, "").encode()
    before = folder.read(DRIVER)
    if before == here:
        what = f"The head pod of the run {run_id} was lost, and its driver with it."
        why = "It was evicted or killed, ran out of memory, or its node is gone; this is the head that replaces it."
        lost = RunLostError(explain(what, why, "Launch it again."), time.time())
        sys.stderr.write(f"{lost}\n")
        write_failure(folder, lost)
        return driver.EXIT_FAILED
    if folder.read(MANIFEST) is not None:
        folder.write(DRIVER, here)
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
