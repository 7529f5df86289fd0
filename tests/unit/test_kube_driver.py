"""The driver of a run on KubeRay, which may be submitted more than once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kfpytorch_ray.cluster.kube import driver
from kfpytorch_ray.cluster.remote.outcome import read_record, write_failure
from kfpytorch_ray.errors import RunLostError, RunStoppedError, StorageError
from kfpytorch_ray.runs import CODE, DRIVER, MANIFEST, OUTCOME, Outcome, read_outcome
from kfpytorch_ray.storage import Storage

RUN = "kfr-train-1"


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    """Of a run whose request is gone: a driver that begins ends at once, and says so."""
    storage = Storage(str(tmp_path))
    storage.write(MANIFEST, b"{}")
    return storage


def started(
    folder: Storage, cluster: str, monkeypatch: pytest.MonkeyPatch, capfd: Any, packed: str = ""
) -> tuple[int, str]:
    """Exit code and what a driver on a cluster says."""
    monkeypatch.setenv(driver.CLUSTER_VARIABLE, cluster)
    code = driver.main(RUN, f"{folder.uri}#sha", packed)
    return code, capfd.readouterr().err


def outcome_of(folder: Storage) -> Outcome:
    found = read_outcome(folder)
    assert found is not None
    return found


def test_a_second_start_on_a_cluster_is_a_lost_head(
    folder: Storage, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The first one went with its pod: that is the outcome, and nothing is trained twice."""
    folder.write(DRIVER, b"c-1")
    code, said = started(folder, "c-1", monkeypatch, capfd)
    assert code == 1
    assert "head pod of the run kfr-train-1 was lost" in said
    assert isinstance(read_record(folder, outcome_of(folder)).error, RunLostError)


def test_another_cluster_is_another_try(folder: Storage, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """A queue took the first one back: it begins anew."""
    folder.write(DRIVER, b"c-1")
    assert "has no request" in started(folder, "c-2", monkeypatch, capfd)[1]
    assert folder.read(DRIVER) == b"c-2"
    assert isinstance(read_record(folder, outcome_of(folder)).error, StorageError)


def test_a_run_that_is_over_is_not_begun_again(folder: Storage, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Its outcome stays."""
    write_failure(folder, RunStoppedError("stopped"))
    assert started(folder, "c-2", monkeypatch, capfd) == (1, f"The run {RUN} is over already: it stopped.\n")
    assert outcome_of(folder).state == "stopped"


@pytest.mark.parametrize("packed", ["", "00:1"], ids=["code in the image", "code in the folder"])
def test_a_run_that_was_removed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, packed: str
) -> None:
    """Neither the note of a driver nor an outcome makes a run of an empty folder."""
    removed = Storage(str(tmp_path / "removed"))
    assert "holds no run" in started(removed, "c-1", monkeypatch, capfd, packed)[1]
    assert removed.names() == []


def test_code_that_cannot_be_received_is_the_outcome(
    folder: Storage, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """Whoever follows the run reads why, also where it was removed or is no zip."""
    assert started(folder, "c-1", monkeypatch, capfd, "00:1")[0] == 1
    assert outcome_of(folder).error == "StorageError"
    folder.remove(OUTCOME)
    digest = folder.upload(CODE, [b"no zip"])
    assert started(folder, "c-2", monkeypatch, capfd, f"{digest.sha256}:{digest.size_bytes}")[0] == 1
    assert outcome_of(folder).error == "LaunchError"
    assert "BadZipFile" in outcome_of(folder).message
