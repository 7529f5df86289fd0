"""The entrypoint of a remote run's job, where it must not run anything."""

from __future__ import annotations

import os
import pickle
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sample_reports
from ray.exceptions import OwnerDiedError

from kfpytorch_ray import RayBackend
from kfpytorch_ray.cluster import fetching
from kfpytorch_ray.cluster.launching import Launched
from kfpytorch_ray.cluster.remote import driver
from kfpytorch_ray.cluster.remote.driver import main
from kfpytorch_ray.cluster.remote.outcome import read_record, write_outcome
from kfpytorch_ray.cluster.remote.versions import here
from kfpytorch_ray.results import Ending, RoundRecord
from kfpytorch_ray.runs import MANIFEST, REQUEST, Manifest, Outcome, read_outcome
from kfpytorch_ray.storage import Storage, digest_of

RUN = Manifest("kfr-one", "train", "ray", "s3://bucket", "http://head:8265", 0.0, "ada", "1", 1, 60.0)


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    """A run that was staged."""
    folder = Storage(str(tmp_path / "runs" / "kfr-one"))
    folder.write(MANIFEST, RUN.to_json())
    folder.write(REQUEST, pickle.dumps(Trap(tmp_path / "sprung")))
    return folder


def test_a_request_that_was_altered_is_not_unpickled(
    folder: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The SHA-256 came by the job API; what has another one is refused, and the job fails with the reason."""
    assert main(f"{folder.uri}#{digest_of(b'what was submitted').sha256}") == 1
    assert "SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()
    left = read_outcome(folder)
    assert left is not None
    assert (left.state, left.error) == ("failed", "IntegrityError")


@pytest.mark.parametrize("sha256", ["", "#"])
def test_a_request_without_a_hash_is_not_unpickled(folder: Storage, tmp_path: Path, sha256: str) -> None:
    """An entrypoint that was cut short is no way around the check."""
    assert main(f"{folder.uri}{sha256}") == 1
    assert not (tmp_path / "sprung").exists()


@dataclass(frozen=True)
class Setup:
    """Of a launch that has no ranks."""

    name: str = "train"
    known_as: str = ""


@dataclass(frozen=True)
class Request:
    setup: Setup = Setup()


def test_a_driver_that_is_stopped_in_the_instant_after_its_success(
    folder: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The success that was said is not taken back."""

    def write_outcome_then(*arguments: Any) -> None:
        write_outcome(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(driver, "read_request", lambda *_: (RUN, (Request(), RayBackend())))
    monkeypatch.setattr(driver, "run_request", lambda *_, **__: Launched((), (), sample_reports.success()))
    monkeypatch.setattr(driver, "write_outcome", write_outcome_then)
    assert main(f"{folder.uri}#00") == 0
    left = read_outcome(folder)
    assert left is not None
    assert left.state == "succeeded"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """A launch of one rank that has succeeded."""
    rounds = (RoundRecord(0, 1, ("node",), 1.0, 2.0, (), Ending.SUCCEEDED),)
    done = Launched(("its result",), rounds, sample_reports.success())
    monkeypatch.setattr(driver, "read_request", lambda *_: (RUN, (Request(), RayBackend())))
    monkeypatch.setattr(driver, "run_request", lambda *_, **__: done)
    return done


def failed_fetching(error: Exception, folder: Storage, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """What a run leaves whose driver cannot have a result."""

    def get(ref: str) -> None:
        raise error

    monkeypatch.setattr(fetching.ray, "get", get)
    assert main(f"{folder.uri}#00") == 1
    left = read_outcome(folder)
    assert left is not None
    assert left.state == "failed"
    return left


def test_a_node_that_is_lost_with_a_result(
    folder: Storage, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said which, and what became of the ranks."""
    left = failed_fetching(OwnerDiedError("", None, ""), folder, monkeypatch)
    assert left.error == "NodeLostError"
    assert "result of rank 0 is lost" in left.message
    record = read_record(folder, left)
    assert record.rounds == launched.rounds
    assert record.error is not None
    assert record.error.report == launched.report


def test_a_driver_that_fails_by_itself(folder: Storage, launched: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody thought of is an outcome, too: without one the run would count as killed."""
    left = failed_fetching(KeyError("unheard of"), folder, monkeypatch)
    assert left.error == "LaunchError"
    assert "KeyError: 'unheard of'" in left.message


def failed_with(request: bytes, folder: Storage) -> Outcome:
    """What a run leaves that cannot begin with this request."""
    folder.write(MANIFEST, replace(RUN, versions="kfpytorch_ray 9.9").to_json())
    folder.write(REQUEST, request)
    assert main(f"{folder.uri}#{digest_of(request).sha256}") == 1
    left = read_outcome(folder)
    assert left is not None
    assert left.state == "failed"
    return left


def test_a_request_of_another_version(folder: Storage) -> None:
    """It cannot be unpickled: the outcome names what is installed on both sides."""
    left = failed_with(b"ckfpytorch_ray.of_another_version\nRequest\n.", folder)
    assert left.error == "VersionMismatchError"
    assert "No module named 'kfpytorch_ray.of_another_version'" in left.message
    assert "Where it was launched: kfpytorch_ray 9.9." in left.message
    assert f"Where it is to run: {here()}." in left.message
    assert "Fix: " in left.message


def test_a_request_that_holds_something_else(folder: Storage) -> None:
    """Another version's may unpickle all the same; what fails then is the outcome, too."""
    left = failed_with(pickle.dumps((object(), RayBackend())), folder)
    assert left.error == "LaunchError"
    assert "The driver of the run failed by an error that it does not know." in left.message
    assert "AttributeError" in left.message


def test_a_run_whose_request_was_removed(folder: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    """It fails with what is missing."""
    folder.remove(REQUEST)
    assert main(f"{folder.uri}#00") == 1
    assert "has no request" in capsys.readouterr().err
    left = read_outcome(folder)
    assert left is not None
    assert (left.state, left.error) == ("failed", "StorageError")


def test_a_run_that_was_removed(folder: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    """It fails, and leaves nothing where nobody would find it."""
    folder.remove()
    assert main(f"{folder.uri}#00") == 1
    assert "holds no run" in capsys.readouterr().err
    assert folder.names() == []
