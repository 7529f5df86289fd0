"""How a run that is elsewhere ends, in its storage: written there, read by whoever takes the result. Without ray.

Results stay spooled as they were in the object store: streamed there and back, and mapped here, so that neither side
holds one twice. The records and the error are one pickle of our own classes; the user's exception within is bytes
until its hash was checked.
"""

from __future__ import annotations

import logging
import pickle
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kfpytorch_ray.cluster.causes import failures, root_cause
from kfpytorch_ray.cluster.failures import rebuilt_exception
from kfpytorch_ray.cluster.spool import map_spooled
from kfpytorch_ray.errors import (
    KfpytorchRayError,
    LaunchError,
    ResultError,
    RunStoppedError,
    StorageError,
    WorkerFailedError,
    explain,
    text_of,
)
from kfpytorch_ray.report.data import RunReport
from kfpytorch_ray.results import ElasticWorkerResult, RoundRecord
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import OUTCOME, RECORDS, RESULTS, Outcome, read_outcome
from kfpytorch_ray.storage import Digest, Storage, digest_of

logger = logging.getLogger(__name__)

NOTHING = Digest("", 0)
"""Of a rank that left without a result: it returned None."""


@dataclass(frozen=True, slots=True)
class Record:
    """What became of a run.

    Attributes:
        rounds: What became of every rank, one record for each round.
        error: Why it failed; None if it did not. Carries the report itself.
        report: What happened in a run that succeeded; None where no driver saw it.
    """

    rounds: tuple[RoundRecord, ...]
    error: KfpytorchRayError | None = None
    report: RunReport | None = None


def write_failure(folder: Storage, error: KfpytorchRayError) -> None:
    """Leave why the run failed or was stopped; where that cannot be written, its log still says it.

    A run that has left an outcome has ended like that: it stays.
    """
    status = RunStatus.STOPPED if isinstance(error, RunStoppedError) else RunStatus.FAILED
    record = Record(error.rounds if isinstance(error, LaunchError) else (), error)
    try:
        if read_outcome(folder) is None:
            write_outcome(folder, status, record)
    except KfpytorchRayError as unwritten:
        logger.warning("The outcome of this run could not be kept: %s", unwritten)


def error_of(error: Exception, who: str) -> KfpytorchRayError:
    """An error as a run can end with it; one that nobody has thought of is in the log with its traceback.

    Args:
        error: That ended the run, or a part of it.
        who: Has met it, for people.
    """
    if isinstance(error, KfpytorchRayError):
        return error
    logger.error("%s has failed.", who, exc_info=error)
    why = text_of(error)
    fix = "Look into the last lines of its log; launch again."
    return LaunchError(explain(f"{who} failed by an error that it does not know.", why, fix), time.time())


def read_record(folder: Storage, outcome: Outcome) -> Record:
    """What became of a run; the error has the user's exception as its cause where that can be rebuilt here.

    Raises:
        StorageError: It cannot be read.
        IntegrityError: It is not what was written.
    """
    record: Record = pickle.loads(folder.read_checked(outcome.record_name, outcome.record_digest))
    if isinstance(record.error, WorkerFailedError | ResultError) and failures(record.rounds[-1]):
        record.error.__cause__ = rebuilt_exception(root_cause(record.rounds[-1]))
    return record


class Downloads:
    """Fetches the results of a run from its storage.

    Args:
        folder: Of the run.
        outcome: How it ended.
    """

    def __init__(self, folder: Storage, outcome: Outcome) -> None:
        self._folder = folder
        self._outcome = outcome
        self._fetched: set[int] = set()
        self._failed: set[int] = set()

    @property
    def taken(self) -> bool:
        """Whether something was fetched, and everything that was asked for has arrived."""
        return bool(self._fetched) and not self._failed

    def __call__(self, rank: int) -> ElasticWorkerResult:
        """The result of a rank.

        Raises:
            StorageError: It cannot be read, or there is no room for it here.
            IntegrityError: It is not what was written.
            ResultError: It cannot be unpickled in this process.
        """
        self._failed.add(rank)
        result = self._fetch(rank, self._outcome.result_digest(rank))
        self._failed.remove(rank)
        self._fetched.add(rank)
        return result

    def _fetch(self, rank: int, digest: Digest) -> ElasticWorkerResult:
        if digest == NOTHING:
            return ElasticWorkerResult(None, [], None)
        # With it comes torch, which neither a driver nor a look at a run needs.
        from kfpytorch_ray.cluster.pickling import rebuilt_result

        with _folder_for_results() as folder:
            path = Path(folder, "result")
            self._folder.download(result_name(rank), path, digest)
            # The memory that is mapped outlives the file, and becomes the value's own: it is there once.
            return rebuilt_result(map_spooled(path, writable=True), rank)


def write_outcome(
    folder: Storage, status: RunStatus, record: Record, results: tuple[tuple[str, int], ...] = ()
) -> None:
    """Leave how the run ended; everything else that is to be there has to be.

    Args:
        folder: Of the run.
        status: How it ended.
        record: What became of it.
        results: SHA-256 and size of each rank's result, by rank.

    Raises:
        StorageError: It cannot be written.
    """
    pickled = pickle.dumps(record)
    written = digest_of(pickled)
    # Two who give a run up at the same time must not write over each other's.
    name = f"{RECORDS}/{written.sha256}.pkl"
    folder.write(name, pickled)
    outcome = Outcome(
        state=status.value,
        ended_at=time.time(),
        message=str(record.error or ""),
        error=type(record.error).__name__ if record.error else "",
        record=(written.sha256, written.size_bytes),
        results=results,
        record_name=name,
    )
    folder.write(OUTCOME, outcome.to_json())


def _folder_for_results() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="kfpytorch-ray-")
    except OSError as error:
        raise StorageError(
            explain(
                "There is no folder here for the results to arrive in.",
                text_of(error),
                "Set TMPDIR to a folder with room for the largest result. The results are still in the storage.",
            )
        ) from error


def result_name(rank: int) -> str:
    """Of a rank's result in the run's folder."""
    return f"{RESULTS}/rank-{rank}"
