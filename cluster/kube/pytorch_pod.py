"""A pod of a PyTorchJob: ``python -m kfpytorch_ray.cluster.kube.pytorch_pod RUN_ID URI#SHA256 [SHA256:BYTES]``.

One node of the launch. For an ``Elastic`` it is torch elastic's agent and starts the ranks, for a ``PyTorch`` it is one
itself. What they return goes to the run's folder, and the pod ends when all pods have brought theirs: the operator
counts an elastic job as done with the first pod that ends, and may remove the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kfpytorch_ray.cluster.interruption import TERMINATED, interruptible, raise_if_lost
from kfpytorch_ray.cluster.kube import code
from kfpytorch_ray.cluster.kube.pod_log import mark_of
from kfpytorch_ray.cluster.kube.pod_peers import GRACE_S, PeerWatch
from kfpytorch_ray.cluster.kube.pod_ranks import budget_of, run_ranks, succeeded
from kfpytorch_ray.cluster.kube.pod_reports import LOG, folder_of, has_succeeded, report, settle_success
from kfpytorch_ray.cluster.kube.pod_request import PodRequest
from kfpytorch_ray.cluster.kube.pod_worker import Places
from kfpytorch_ray.cluster.remote.lease import LeaseWatch
from kfpytorch_ray.cluster.remote.outcome import Record, error_of, result_name
from kfpytorch_ray.cluster.remote.staged import read_request
from kfpytorch_ray.cluster.spool import map_spooled
from kfpytorch_ray.cluster.worker import search_path
from kfpytorch_ray.errors import (
    KfpytorchRayError,
    LaunchError,
    LaunchInterruptedError,
    RunStoppedError,
    StorageError,
    explain,
)
from kfpytorch_ray.plan import Contract
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import read_outcome
from kfpytorch_ray.storage import Digest, Storage

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
_LOOK_S = 1.0
_LONGEST_LOOK_S = 5.0
_OTHERS_WAIT_S = 3600.0
"""How long results of other pods may be on their way once a pod has brought its own."""
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the kernel's name


def main(run_id: str, uri: str, packed: str = "") -> int:
    """Do this pod's part of a run.

    Args:
        run_id: Of the run.
        uri: Of its folder, with the SHA-256 of the request.
        packed: SHA-256 and size of the user's modules in it; empty where they are in the image.

    Returns:
        The exit code: 0 if every rank of all pods returned, 1 if not, 143 if it was stopped.
    """
    with tempfile.TemporaryDirectory(prefix="kfpytorch-ray-") as scratch:
        log = Path(scratch, LOG)
        location, _, sha256 = uri.partition("#")
        try:
            with _kept_output(log):
                sys.stdout.write(mark_of(run_id))
                logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
                try:
                    return _Pod(Storage(location), Path(scratch)).run(sha256, packed)
                except Exception as error:  # noqa: BLE001 - the storage, most likely, in which nobody can be told
                    sys.stderr.write(f"{error_of(error, _this_pod())}\n")
                    return EXIT_FAILED
        finally:
            with contextlib.suppress(KfpytorchRayError, OSError), log.open("rb") as file:
                folder_of(Storage(location), socket.gethostname()).upload(LOG, iter(lambda: file.read(2**20), b""))


@dataclass(frozen=True)
class _Pod:
    folder: Storage
    scratch: Path

    def run(self, sha256: str, packed: str) -> int:
        reason, fix, budget = "The pod was deleted, evicted or pre-empted.", "Launch it again.", ""
        try:
            with interruptible():
                if packed:
                    self._receive(packed)
                manifest, request = read_request(self.folder, sha256)
                budget = budget_of(request.plan)
                lease = LeaseWatch(self.folder, manifest.lease_s)
                # A replica of another contract may be started again.
                elastic = request.plan.contract is Contract.TORCHRUN
                peers = PeerWatch(self.folder, socket.gethostname(), GRACE_S if elastic else None)
                with lease, peers:
                    try:
                        return self._train(request)
                    finally:
                        reason, fix = lease.reason or peers.reason or reason, lease.fix
        except LaunchInterruptedError:
            return self._stopped(reason, fix)
        except Exception as error:  # noqa: BLE001 - the report says it
            return self._failed(error_of(error, _this_pod()), budget)
        except SystemExit as stop:
            if stop.code != TERMINATED:
                raise
            return self._stopped(reason, fix)

    def _receive(self, packed: str) -> None:
        """Have the user's modules where a launch on this machine would have them: around this process."""
        working_dir = self.scratch / "code"
        working_dir.mkdir()
        sha256, _, size = packed.partition(":")
        code.receive(self.folder, Digest(sha256, int(size)), working_dir)
        os.chdir(working_dir)

    def _train(self, request: PodRequest) -> int:
        if has_succeeded(self.folder, socket.gethostname()):
            # The operator has started it again; the others may be gone, and no round would come about.
            return self._wait_for_others()
        os.environ.update(request.environment)
        time.tzset()
        sys.path[:] = search_path(sys.path, request.sys_path)
        started_at = time.time()
        with contextlib.ExitStack() as undo:
            roomy = [_SHARED_MEMORY] if os.path.isdir(_SHARED_MEMORY) else []
            results = [undo.enter_context(tempfile.TemporaryDirectory(dir=one)) for one in roomy]
            returned = run_ranks(request.plan, Places(str(self.scratch), (*results, str(self.scratch))))
            uploaded = [(rank, self._upload(rank, one.result)) for rank, one in sorted(returned.items())]
        record = Record((succeeded(returned, started_at),))
        report(self.folder, socket.gethostname(), RunStatus.SUCCEEDED, record, results=uploaded)
        return self._wait_for_others()

    def _upload(self, rank: int, path: str) -> Digest:
        return self.folder.upload(result_name(rank), [map_spooled(Path(path)).data])

    def _wait_for_others(self) -> int:
        deadline, pause_s = time.monotonic() + _OTHERS_WAIT_S, _LOOK_S
        while not self._others_are_done():
            if time.monotonic() > deadline:
                logger.error("The other pods have not brought their results within %g s.", _OTHERS_WAIT_S)
                return EXIT_FAILED
            time.sleep(pause_s)
            # Every pod that waits reads what all have left.
            pause_s = min(1.5 * pause_s, _LONGEST_LOOK_S)
            raise_if_lost()
        return 0

    def _others_are_done(self) -> bool:
        try:
            return read_outcome(self.folder) is not None or settle_success(self.folder)
        except StorageError as error:
            # What this pod has brought is there; a storage that is away for a moment must not make it worthless.
            logger.warning("It is not known now whether the other pods are done: %s", error)
            return False

    def _failed(self, error: KfpytorchRayError, budget: str) -> int:
        sys.stderr.write(f"{error}\n")
        if has_succeeded(self.folder, socket.gethostname()):
            return EXIT_FAILED
        rounds = error.rounds if isinstance(error, LaunchError) else ()
        report(self.folder, socket.gethostname(), RunStatus.FAILED, Record(rounds, error), budget)
        return EXIT_FAILED

    def _stopped(self, reason: str, fix: str) -> int:
        if has_succeeded(self.folder, socket.gethostname()):
            # Its results are there and count; who took them may have removed the job by now.
            return TERMINATED if read_outcome(self.folder) is None else 0
        error = RunStoppedError(explain(f"{_this_pod()} was stopped.", reason, fix))
        sys.stderr.write(f"{error}\n")
        report(self.folder, socket.gethostname(), RunStatus.STOPPED, Record((), error))
        return TERMINATED


def _this_pod() -> str:
    return f"The pod {socket.gethostname()}"


@contextlib.contextmanager
def _kept_output(path: Path) -> Iterator[None]:
    """Copy what this process and its children print to a file; by another process, which survives a crash."""
    copier = subprocess.Popen(["tee", path], stdin=subprocess.PIPE)  # noqa: S607 - of the image
    before = [os.dup(stream) for stream in (1, 2)]
    assert copier.stdin is not None
    for stream in (1, 2):
        os.dup2(copier.stdin.fileno(), stream)
    copier.stdin.close()
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        yield
    finally:
        for text in (sys.stdout, sys.stderr):
            text.flush()
        for stream, original in zip((1, 2), before, strict=True):
            os.dup2(original, stream)
            os.close(original)
        # A child of the user's that goes on holds the pipe open.
        with contextlib.suppress(subprocess.TimeoutExpired):
            copier.wait(5)
        copier.kill()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
