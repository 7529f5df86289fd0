"""A remote run, seen from where it was launched or from anywhere else: its folder in the storage, and its job.

What the storage says counts: it outlives the cluster. The job is asked only while there is no outcome yet, and a
connection that breaks meanwhile is tried again for ``reconnect_timeout_s``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial

from kfpytorch_ray.cluster.interruption import interruptible, raise_if_lost, wants_to_stop
from kfpytorch_ray.cluster.log_archive import RankFiles
from kfpytorch_ray.cluster.output import shows
from kfpytorch_ray.cluster.recording import report_of_rounds
from kfpytorch_ray.cluster.remote.job import ClusterJob, JobState
from kfpytorch_ray.cluster.remote.lease import LeaseKeeper
from kfpytorch_ray.cluster.remote.outcome import Downloads, Record, read_record, write_failure
from kfpytorch_ray.cluster.remote.patience import Patience
from kfpytorch_ray.config import StoredRunOptions
from kfpytorch_ray.errors import (
    ClusterError,
    ClusterUnreachableError,
    KfpytorchRayError,
    ResultCollectedError,
    RunLostError,
    RunPendingError,
    RunStoppedError,
    StorageError,
    explain,
)
from kfpytorch_ray.notices import tell, write
from kfpytorch_ray.report.data import Activity, Phase, RunReport
from kfpytorch_ray.results import ElasticResult, ElasticWorkerResult
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import DRIVER_LOG, Manifest, Outcome, collect, collected, discard, read_outcome
from kfpytorch_ray.storage import Storage

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
"""How often it is asked whether a run is over."""
_STOP_WAIT_S = 120.0
_SUBMITTING_S = 120.0
"""How long a manifest may be there before its job is, which was not seen yet."""
_COPY_LOOK_S = 5.0
_TAIL_LINES = 20

_RANK = re.compile(r"\[rank (\d+)(?: \| node \d+)?\] ")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class RemoteRun:
    """One run. See ``kfpytorch_ray.run.Run`` for what its methods promise.

    Args:
        manifest: What it is.
        folder: Its folder in the storage.
        options: How it is followed.
        job: That runs its driver; asked for when it is first needed.
    """

    def __init__(
        self, manifest: Manifest, folder: Storage, options: StoredRunOptions, job: Callable[[], ClusterJob]
    ) -> None:
        self.run_id = manifest.run_id
        self._manifest = manifest
        self._folder = folder
        self._options = options
        self._find_job = job
        self._seen = False
        self._lease = LeaseKeeper(folder, manifest.lease_s)

    def __repr__(self) -> str:
        return f"RemoteRun({self.run_id!r})"

    @cached_property
    def _job(self) -> ClusterJob:
        return self._find_job()

    def keep_lease(self) -> None:
        """Keep the run's lease as long as this process lives, or until the run has ended."""
        self._lease.start()
        weakref.finalize(self, self._lease.stop)

    def status(self) -> RunStatus:
        """Where it stands now."""
        return self._state().status

    def _state(self) -> JobState:
        """How it ended, else where its job stands."""
        state = self._looked_up()
        if state.status.ended:
            # Before anything is removed, which it would write anew.
            self._lease.stop()
        return state

    def _looked_up(self) -> JobState:
        if (outcome := read_outcome(self._folder)) is not None:
            return JobState(RunStatus(outcome.state))
        state = self._job.look()
        if state is None:
            fresh = not self._seen and time.time() - self._manifest.created_at < _SUBMITTING_S
            return JobState(RunStatus.PENDING if fresh else RunStatus.LOST)
        self._seen = True
        if state.status.ended and (outcome := read_outcome(self._folder)) is not None:
            # Written since it was looked for.
            return JobState(RunStatus(outcome.state))
        return state

    def logs(self, *, follow: bool = False, rank: int | None = None) -> Iterator[str]:
        """The lines of its driver and ranks."""
        manifest = self._manifest
        if rank is not None and manifest.log_archive and not shows(manifest.logs, rank):
            yield from self._own_lines(rank, follow=follow)
            return
        texts = self._growing_log() if follow else iter([self._whole_log()])
        for line in _lines(texts):
            if rank is None or _rank_of(line) == rank:
                yield line

    def _own_lines(self, rank: int, *, follow: bool) -> Iterator[str]:
        """The lines of a rank that are not in the driver's log, from its own files."""
        files = RankFiles(Storage(self._manifest.log_archive), rank)
        if follow and not self.status().ended:
            tell(
                f"the driver of the run {self.run_id} does not print the lines of rank {rank} (logs="
                f"{self._manifest.logs!r}). They come from the copies of its file, at intervals of 10 s to 5 min."
            )
            pause = threading.Event()
            with LeaseKeeper(self._folder, self._manifest.lease_s):
                for _ in self._looks(None):
                    # For how long a storage may be away, the looks decide.
                    with contextlib.suppress(StorageError):
                        yield from files.new_lines()
                    pause.wait(_COPY_LOOK_S)
        yield from files.new_lines(last=True)

    def _whole_log(self) -> str:
        kept = self._folder.read(DRIVER_LOG)
        if kept is not None:
            # Line ends as the job server sends them: what it has delivered is counted in characters.
            return io.TextIOWrapper(io.BytesIO(kept), encoding="utf-8", errors="replace").read()
        return self._job.log()

    def _growing_log(self) -> Iterator[str]:
        patience = self._patience()
        if patience.until_answered(partial(read_outcome, self._folder)) is not None:
            yield patience.until_answered(self._whole_log)
            return
        with LeaseKeeper(self._folder, self._manifest.lease_s), self._job.tail() as tail:
            for _ in self._looks(None):
                yield tail.next(_LOOK_S)
            tail.stop()
            yield tail.next(0.0)
            # The run is over: what cannot be had of its log must not stand in the way of its result.
            with contextlib.suppress(ClusterUnreachableError, StorageError):
                yield tail.rest(patience.until_answered(self._whole_log))

    def cancel(self) -> RunStatus:
        """Stop it and wait until it is stopped."""
        if (status := self.status()).ended:
            return status
        stop_job(self._job, self.run_id, self._options)
        self._lease.stop()
        if (outcome := read_outcome(self._folder)) is None:
            # Its driver was not at work yet, or was killed; whoever asks later may find no job any more.
            write_failure(self._folder, self._stopped("It was cancelled before its driver could say how it ended."))
        elif outcome.state != RunStatus.STOPPED.value:
            # It ended by itself meanwhile: what it has brought is not this one's to remove.
            return RunStatus(outcome.state)
        discard(self._folder)
        return self.status()

    def result(self, timeout: float | None = None, *, keep: bool = False) -> ElasticResult:
        """Wait for its end and take what it has left."""
        pause = threading.Event()
        with LeaseKeeper(self._folder, self._manifest.lease_s):
            for _ in self._looks(timeout):
                pause.wait(_LOOK_S)
        patience = self._patience()
        if (who := patience.until_answered(partial(collected, self._folder))) is not None:
            raise ResultCollectedError(
                explain(
                    f"The result of the run {self.run_id} has been collected already.",
                    f"{who}, and it was removed from the storage with that.",
                    "Launch again; to take a result more than once, take it with result(keep=True).",
                )
            )
        outcome = patience.until_answered(partial(read_outcome, self._folder))
        if outcome is None:
            raise self._without_outcome()
        return self._take(outcome, patience, keep)

    def _take(self, outcome: Outcome, patience: Patience, keep: bool) -> ElasticResult:
        if outcome.state == RunStatus.STOPPED.value:
            if not keep:
                # By its lease, perhaps: then nobody has removed anything yet.
                self._remove_what_it_left()
            raise RunStoppedError(outcome.message)
        record = patience.until_answered(partial(read_record, self._folder, outcome))
        report = self._report(record)
        if record.error is not None:
            record.error.report = report
            if not keep:
                self._remove_what_it_left()
            raise record.error
        ranks = tuple(range(len(outcome.results)))
        downloads = Downloads(self._folder, outcome)

        def fetch(rank: int) -> ElasticWorkerResult:
            return patience.until_answered(partial(downloads, rank))

        result = ElasticResult(ranks, fetch, record.rounds, self.run_id, report)
        if not keep:
            self._forget()
            weakref.finalize(result, _collect_if_taken, downloads, self._folder)
        return result

    def _report(self, record: Record) -> RunReport | None:
        """What its driver has told; of pods without a driver, what follows from what they have left."""
        told = record.report if record.error is None else record.error.report
        run = self._manifest
        if told is not None:
            if run.created_at >= told.started_at:
                return told
            submitting = Phase(Activity.SUBMITTING, run.created_at, told.started_at)
            return replace(told, started_at=run.created_at, phases=(submitting, *told.phases))
        return report_of_rounds(run.name, run.run_id, run.backend, record.rounds, record.error)

    def forget(self) -> None:
        """Have the cluster remove what it keeps of it."""
        self._job.forget()

    def collect(self) -> None:
        """Count its result as taken."""
        if not self.status().ended:
            raise self._pending(f"The run {self.run_id} has not ended, and has no result to collect.")
        if collected(self._folder) is None:
            self._forget()
            collect(self._folder)

    def _remove_what_it_left(self) -> None:
        """On the cluster and in the storage, of a run that brings no values."""
        self._forget()
        _removing(discard, self._folder)

    def _forget(self) -> None:
        """Have the cluster remove what it keeps of a job that is over."""
        try:
            self.forget()
        except KfpytorchRayError as error:
            logger.info("The job of the run %s stays where it is: %s", self.run_id, error)

    def follow(self) -> ElasticResult:
        """Pass on its log while it runs, and take its result; what an interruption does, its options say."""
        try:
            with interruptible():
                for line in self.logs(follow=True):
                    write(sys.stdout, f"{line}\n")
        except (KeyboardInterrupt, SystemExit):
            self._interrupted()
            raise
        return self.result()

    def _interrupted(self) -> None:
        if not wants_to_stop(self._options.on_interrupt, self.run_id):
            tell(
                f"the run {self.run_id} goes on. Follow it: {self.command('logs -f')}; take its result: "
                f"{self.command('result')}"
            )
            return
        tell(f"stopping the run {self.run_id} ...")
        try:
            status = self.cancel()
        except KfpytorchRayError as error:
            tell(f"the run {self.run_id} may still be at work: {error}")
        else:
            tell(f"the run {self.run_id} is {status.value}.")

    def command(self, verb: str) -> str:
        """The command line that does something with this run."""
        return f"kfpytorch-ray {verb} {self.run_id} --storage {self._manifest.storage}"

    def _looks(self, timeout: float | None) -> Iterator[None]:
        """Once for every time that the run has not ended yet; the caller waits in between.

        Raises:
            RunPendingError: It has not ended within the timeout.
            ClusterUnreachableError: The cluster has not answered for ``reconnect_timeout_s``.
        """
        with contextlib.ExitStack() as following:
            followed = False
            for state in self._states(timeout):
                if state is not None and not followed:
                    following.enter_context(self._job.followed())
                    followed = True
                yield

    def _states(self, timeout: float | None) -> Iterator[JobState | None]:
        """Its states until it has ended; None where it cannot be asked now."""
        began, waits_for = time.monotonic(), ""
        patience = self._patience()
        while True:
            raise_if_lost()
            state = None
            try:
                state = self._state()
                patience.answered()
                if state.status.ended:
                    return
                if state.message not in ("", waits_for):
                    waits_for = state.message
                    tell(f"the run {self.run_id} {waits_for}")
            except (ClusterUnreachableError, StorageError) as error:
                if not patience.lasts(error):
                    raise self._unreachable(error) from error
            if timeout is not None and time.monotonic() - began >= timeout:
                raise self._pending(f"The run {self.run_id} has not ended within {timeout:g} s.")
            yield state

    def _patience(self) -> Patience:
        return Patience(self.run_id, self._options.reconnect_timeout_s)

    def _pending(self, what: str) -> RunPendingError:
        fix = f"Ask again later, or see what it does: {self.command('logs -f')}"
        return RunPendingError(explain(what, "It waits for nodes, or trains.", fix))

    def _unreachable(self, error: ClusterUnreachableError | StorageError) -> ClusterUnreachableError:
        what = f"The run {self.run_id} cannot be followed any more, and has left no outcome."
        why = f"{str(error).splitlines()[1].removeprefix('Why: ')} So for {self._options.reconnect_timeout_s:g} s"
        return ClusterUnreachableError(
            explain(
                what,
                f"{why} (reconnect_timeout_s=...).",
                f"If the cluster still runs, take the result when it can be reached: {self.command('result')}",
            )
        )

    def _without_outcome(self) -> KfpytorchRayError:
        """The error for a run that is over and has not said how; it is left as its outcome."""
        state, last_lines = None, ""
        with contextlib.suppress(ClusterUnreachableError, StorageError):
            state = self._job.look()
            if state is not None and state.status is RunStatus.LOST and state.error is None:
                last_lines = "\n".join(self._whole_log().splitlines()[-_TAIL_LINES:])
        if state is None:
            return self._lost("Its cluster does not know it any more")
        if state.status is RunStatus.STOPPED:
            error: KfpytorchRayError = self._stopped("Its job was stopped.")
        else:
            error = state.error or self._lost(state.message, last_lines)
        if state.status.ended:
            self._give_up(error)
        return error

    def _lost(self, message: str, last_lines: str = "") -> RunLostError:
        text = explain(
            f"The run {self.run_id} is over and has left no outcome.",
            f"{message.rstrip('.')}. Its driver, or a pod of it, was killed, could not start, or could not write to "
            f"{self._folder.uri}.",
            "Look into the last lines of its log, and whether memory ran out there; then launch it again.",
        )
        return RunLostError(f"{text}\n\nLast lines of its log:\n{last_lines}" if last_lines else text, time.time())

    def _give_up(self, error: KfpytorchRayError) -> None:
        """Remove a job that is over, or can only wait in vain, and leave why."""
        with contextlib.suppress(KfpytorchRayError, TimeoutError):
            self._job.stop(_STOP_WAIT_S)
        write_failure(self._folder, error)
        outcome = read_outcome(self._folder)
        # It may have come after all.
        if outcome is None or outcome.state != RunStatus.SUCCEEDED.value:
            discard(self._folder)

    def _stopped(self, why: str) -> RunStoppedError:
        return RunStoppedError(explain(f"The run {self.run_id} was stopped.", why, "Launch it again."))


def stop_job(job: ClusterJob, run_id: str, options: StoredRunOptions) -> None:
    """Stop a run's job, and return when it is.

    Raises:
        ClusterError: It does not end.
    """
    try:
        job.stop(options.stop_grace_s + _STOP_WAIT_S)
    except TimeoutError as error:
        raise ClusterError(
            explain(
                f"The run {run_id} was told to stop and still runs.",
                str(error),
                f"Look at its job in {job.place}, and stop it there.",
            )
        ) from error


def _collect_if_taken(downloads: Downloads, folder: Storage) -> None:
    """At the end of a result that was handed out: what nobody has fetched must not be lost with it."""
    if downloads.taken:
        _removing(collect, folder)


def _removing(remove: Callable[[Storage], None], folder: Storage) -> None:
    """Remove what was taken; runs at the end of the process, too, and must not spoil that."""
    try:
        remove(folder)
    except KfpytorchRayError as error:
        logger.warning("What the run has left in %s could not be removed: %s", folder.uri, error)


def _lines(texts: Iterator[str]) -> Iterator[str]:
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).split("\n")
        yield from lines
    if rest:
        yield rest


def _rank_of(line: str) -> int | None:
    found = _RANK.search(_COLOURS.sub("", line))
    return int(found[1]) if found else None
