"""The handle of a run whose storage goes away for a while: a file system in memory whose reads fail as told."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import sample_reports
from fsspec.implementations.memory import MemoryFileSystem

from kfpytorch_ray import (
    ElasticWorkerResult,
    LaunchError,
    NodeLostError,
    RayBackend,
    ResultCollectedError,
    RunLostError,
    RunStoppedError,
    StorageError,
)
from kfpytorch_ray.cluster.pickling import dump_result_parts
from kfpytorch_ray.cluster.remote import handle, patience
from kfpytorch_ray.cluster.remote.handle import RemoteRun
from kfpytorch_ray.cluster.remote.job import JobState
from kfpytorch_ray.cluster.remote.outcome import NOTHING, Record, result_name, write_failure, write_outcome
from kfpytorch_ray.cluster.remote.received import Received
from kfpytorch_ray.cluster.spool import map_spooled, spool
from kfpytorch_ray.report.data import Activity
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import COLLECTED, DRIVER_LOG, LEASE, MANIFEST, OLD_RECORD, OUTCOME, RECORDS, Manifest, discard
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import wait_until


class FlakyFileSystem(MemoryFileSystem):
    """Reads of the files that are named fail, as often as they are named."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failing: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        self._may_fail(path, mode)
        return super()._open(path, mode, **kwargs)

    def cat_file(self, path: str, **kwargs: Any) -> Any:
        self._may_fail(path, "rb")
        return super().cat_file(path, **kwargs)

    def _may_fail(self, path: str, mode: str) -> None:
        for name in self.failing:
            if mode == "rb" and path.endswith(name):
                self.failing.remove(name)
                msg = "the link is down"
                raise ConnectionResetError(msg)


class Job:
    """A job that is over, and whose log was received up to its last line."""

    place = "nowhere"

    def look(self) -> JobState | None:
        return None

    def followed(self) -> AbstractContextManager[object]:
        return nullcontext()

    def log(self) -> str:
        return ""

    def tail(self) -> AbstractContextManager[Any]:
        return nullcontext(Tail())

    def stop(self, timeout_s: float) -> None: ...

    def forget(self) -> None: ...


class Tail(Received):
    def rest(self, whole: str) -> str:
        return whole[self.delivered :]

    def stop(self) -> None: ...


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that cannot be read next."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    monkeypatch.setattr(patience, "_PAUSE_S", 0.01)
    yield FlakyFileSystem.failing
    FlakyFileSystem.failing.clear()
    FlakyFileSystem.store.clear()


@pytest.fixture
def folder(failing: list[str], tmp_path: Path) -> Storage:
    """Of a run that has succeeded, and whose rank 0 has returned 42."""
    folder = Storage("flaky://storage/runs/kfr-one")
    path = spool(dump_result_parts(ElasticWorkerResult(42, [], None)), [str(tmp_path)], "rank-0")
    digest = folder.upload(result_name(0), [map_spooled(Path(path)).data])
    folder.write(MANIFEST, manifest().to_json())
    folder.write(DRIVER_LOG, b"one\ntwo\n")
    write_outcome(folder, RunStatus.SUCCEEDED, Record(()), ((digest.sha256, digest.size_bytes),))
    return folder


def manifest() -> Manifest:
    now = time.time()
    return Manifest("kfr-one", "train", "ray", "flaky://storage", "http://head:1", now, "ada", "1", 1, 60.0)


def opened(folder: Storage, reconnect_timeout_s: float = 600.0) -> RemoteRun:
    return RemoteRun(manifest(), folder, RayBackend(reconnect_timeout_s=reconnect_timeout_s), Job)


class RunningJob(Job):
    """A job that runs, and whose driver does as told when it is stopped."""

    def __init__(self, at_stop: Callable[[], None]) -> None:
        self._at_stop = at_stop

    def look(self) -> JobState:
        return JobState(RunStatus.RUNNING)

    def stop(self, timeout_s: float) -> None:
        self._at_stop()


def cancelled(folder: Storage, at_stop: Callable[[], None]) -> RunStatus:
    """What ``cancel()`` says of a run that runs; ``at_stop`` is what its driver does when it is stopped."""
    return RemoteRun(manifest(), folder, RayBackend(), lambda: RunningJob(at_stop)).cancel()


def unfinished(folder: Storage) -> bytes:
    """Take a run's outcome back; returns it."""
    outcome = folder.read(OUTCOME)
    assert outcome is not None
    folder.remove(OUTCOME)
    return outcome


def test_a_run_that_succeeds_while_it_is_cancelled_keeps_its_result(folder: Storage) -> None:
    """It was seen at work, and its outcome comes before the stop does."""
    outcome = unfinished(folder)
    assert cancelled(folder, lambda: folder.write(OUTCOME, outcome)) is RunStatus.SUCCEEDED
    assert opened(folder).result()[0].return_value == 42


def test_a_run_that_fails_while_it_is_cancelled_stays_as_it_is(folder: Storage) -> None:
    """It was not the stop that ended it."""
    unfinished(folder)
    before = set(folder.files())
    assert cancelled(folder, lambda: write_failure(folder, NodeLostError("What.", 12.5))) is RunStatus.FAILED
    assert before | {OUTCOME} <= set(folder.files())
    with pytest.raises(NodeLostError):
        opened(folder).result()


def test_what_a_run_that_was_cancelled_has_left_is_removed(folder: Storage) -> None:
    """Whether its driver could say so or not."""
    for at_stop in (lambda: None, lambda: write_failure(folder, RunStoppedError("The job was asked to stop."))):
        folder.remove(OUTCOME)
        folder.write(result_name(0), b"half a result")
        assert cancelled(folder, at_stop) is RunStatus.STOPPED
        assert result_name(0) not in folder.files()


def test_a_success_that_comes_while_the_run_is_given_up_stays(folder: Storage) -> None:
    """Its job was over and had left no outcome yet; whoever asks again has the result."""
    outcome = unfinished(folder)

    class LateJob(RunningJob):
        def look(self) -> JobState:
            return JobState(RunStatus.LOST)

    with pytest.raises(RunLostError):
        RemoteRun(manifest(), folder, RayBackend(), lambda: LateJob(lambda: folder.write(OUTCOME, outcome))).result()
    assert opened(folder).result()[0].return_value == 42


def test_two_that_give_a_run_up_at_the_same_time(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks later is told by one of them, whichever came last."""
    unfinished(folder)
    write = Storage.write

    def after_another(self: Storage, name: str, data: bytes) -> None:
        if name == OUTCOME:
            monkeypatch.setattr(Storage, "write", write)
            write_failure(folder, RunLostError("the second", 2.0))
        write(self, name, data)

    monkeypatch.setattr(Storage, "write", after_another)
    write_failure(folder, RunLostError("the first", 1.0))
    with pytest.raises(RunLostError, match="the first"):
        opened(folder).result()


def test_a_run_that_another_version_has_left(folder: Storage) -> None:
    """It did not say what its record is called."""
    written = json.loads(unfinished(folder))
    record = folder.read(written.pop("record_name"))
    assert record is not None
    folder.remove(RECORDS)
    folder.write(OLD_RECORD, record)
    folder.write(OUTCOME, json.dumps(written).encode())
    assert opened(folder).result()[0].return_value == 42


@pytest.mark.parametrize("ends", ["stopped", "cancelled", "failed"])
def test_the_lease_is_not_kept_any_more_when_what_is_left_is_removed(
    folder: Storage, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """It would be written anew, into a folder that nobody looks after."""
    unfinished(folder)
    others = set(threading.enumerate())
    kept = []

    def discard_then(folder: Storage) -> None:
        kept.append(not set(threading.enumerate()) <= others)
        discard(folder)

    monkeypatch.setattr(handle, "discard", discard_then)
    run = RemoteRun(replace(manifest(), lease_s=600.0), folder, RayBackend(), lambda: RunningJob(lambda: None))
    run.keep_lease()
    wait_until(lambda: LEASE in folder.files(), "the first sign of life")
    if ends == "cancelled":
        run.cancel()
    else:
        write_failure(folder, RunStoppedError("What.") if ends == "stopped" else NodeLostError("What.", 12.5))
        with pytest.raises((RunStoppedError, NodeLostError)):
            run.result()
    assert kept == [False]
    assert LEASE not in folder.files()


@pytest.mark.parametrize("name", [OUTCOME, COLLECTED, ".pkl", result_name(0)])
def test_a_link_that_is_lost_after_the_end(
    folder: Storage, failing: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is read then is read again; it is told once that it is tried, and once that it went well."""
    run = opened(folder)
    # A file that is not there yet is asked for, too.
    failing += [name] * 3
    result = run.result()
    assert result[0].return_value == 42
    assert failing == []
    said = capsys.readouterr().err
    assert (said.count("Trying again."), said.count("can be reached again.")) == (1, 1)
    del result
    with pytest.raises(ResultCollectedError):
        run.result()


@pytest.mark.parametrize("name", [COLLECTED, ".pkl", result_name(0)])
def test_a_link_that_does_not_come_back(folder: Storage, failing: list[str], name: str) -> None:
    """After ``reconnect_timeout_s`` it is an error, and the result stays."""
    failing += [name] * 10_000
    with pytest.raises(StorageError, match="the link is down"):
        opened(folder, 0.05).result()[0]
    failing.clear()
    assert opened(folder).result()[0].return_value == 42


def test_the_report_comes_home(folder: Storage) -> None:
    """With the result, with the error, and of a run without a driver what follows from its rounds."""
    told = sample_reports.success()
    write_outcome(folder, RunStatus.SUCCEEDED, Record((), report=told), ((NOTHING.sha256, NOTHING.size_bytes),))
    assert opened(folder).result(keep=True).report == told
    # The driver's word begins with the driver.
    later = replace(told, started_at=time.time() + 60)
    write_outcome(folder, RunStatus.SUCCEEDED, Record((), report=later), ((NOTHING.sha256, NOTHING.size_bytes),))
    report = opened(folder).result(keep=True).report
    assert report is not None
    assert (report.phases[0].activity, report.phases[0].ended_at) == (Activity.SUBMITTING, later.started_at)
    assert report.started_at == report.phases[0].started_at < later.started_at
    error = NodeLostError("What.", 12.5)
    error.report = sample_reports.failure()
    folder.remove(OUTCOME)
    write_failure(folder, error)
    with pytest.raises(NodeLostError) as caught:
        opened(folder).result(keep=True)
    assert caught.value.report == sample_reports.failure()
    rank = RankRecord(0, 0, 0, "pod-0", Outcome.EXITED, 3, 5.0)
    record = RoundRecord(0, 1, ("pod-0",), 1.0, 6.0, (rank,), Ending.FAILED)
    folder.remove(OUTCOME)
    write_failure(folder, LaunchError("What.", 5.0, (record,)))
    with pytest.raises(LaunchError) as caught_of_pods:
        opened(folder).result(keep=True)
    report = caught_of_pods.value.report
    assert report is not None
    assert (report.name, report.backend, report.rounds[0].cause) == ("train", "ray", 0)


def test_what_no_wait_mends_is_told_at_once(folder: Storage) -> None:
    """A result that is not there will not be there later."""
    folder.remove(result_name(0))
    with pytest.raises(StorageError, match="FileNotFoundError"):
        opened(folder).result()[0]


def test_a_log_that_cannot_be_had_does_not_fail_the_run(
    folder: Storage, failing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The last lines are asked for again, and given up after a while: the run has succeeded."""
    outcome = folder.read(OUTCOME)
    assert outcome is not None
    folder.remove(OUTCOME)

    class EndingJob(Job):
        def look(self) -> JobState:
            folder.write(OUTCOME, outcome)
            return JobState(RunStatus.RUNNING)

    def follow(reconnect_timeout_s: float) -> list[str]:
        run = RemoteRun(manifest(), folder, RayBackend(reconnect_timeout_s=reconnect_timeout_s), EndingJob)
        run.follow()
        return capsys.readouterr().out.splitlines()

    failing += [DRIVER_LOG] * 3
    assert follow(600) == ["one", "two"]
    folder.remove(OUTCOME)
    failing += [DRIVER_LOG] * 10_000
    assert follow(0.05) == []


def test_a_pipe_whose_reader_has_gone_does_not_end_a_run_that_is_followed(
    folder: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on, and its result comes home."""

    class Pipe(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(RemoteRun, "logs", lambda *_, **__: iter(["one", "two"]))
    monkeypatch.setattr(sys, "stdout", Pipe())
    assert opened(folder).follow()[0].return_value == 42
