"""What a worker writes of its own failure."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from flytekit.exceptions.user import FlyteRecoverableException

from kfpytorch_ray.cluster.protocol import WorkerFailure
from kfpytorch_ray.cluster.worker_failure import failures_written, read_failure
from kfpytorch_ray.results import Stage

MIB = 2**20

pytestmark = pytest.mark.usefixtures("capfd")
"""A worker's standard error is a file."""


class OnBatchError(Exception):
    """Has what it failed on with it, as some write it for a debugger."""


class MuteError(FlyteRecoverableException):
    """Says nothing of itself."""

    def __str__(self) -> str:
        raise AttributeError("code")

    __repr__ = __str__


def written(folder: Path, error: Exception) -> WorkerFailure:
    file = folder / "failure"
    with pytest.raises(type(error)), failures_written(file, Stage.CALL):
        raise error
    failure = read_failure(file)
    assert failure is not None
    return failure


def test_an_exception_is_written_whole(tmp_path: Path) -> None:
    """With what it carries, up to a size that a driver can hold of many ranks and rounds."""
    failure = written(tmp_path, OnBatchError("bad batch", bytes(MIB // 2)))
    assert failure.exception is not None
    assert pickle.loads(failure.exception).args[1] == bytes(MIB // 2)
    assert failure.message.startswith("OnBatchError: ('bad batch', b'")


def test_of_an_exception_that_is_too_large_the_text_is_written(tmp_path: Path) -> None:
    """It says why the launch's error has no cause; all that the driver keeps of it is small."""

    class Batch:
        def __init__(self) -> None:
            self.data = bytes(2 * MIB)

        def __repr__(self) -> str:
            return "a batch"

    failure = written(tmp_path, OnBatchError("bad", Batch()))
    assert failure.exception is None
    assert failure.message == "OnBatchError: ('bad', a batch)"
    assert "raise error" in failure.traceback
    assert "larger than 1 MiB" in failure.traceback.splitlines()[-1]
    assert len(pickle.dumps(failure)) < MIB


@pytest.mark.parametrize("length", [0, 2**16 - 100, MIB // 2])
def test_a_text_has_its_beginning_and_its_end(tmp_path: Path, length: int) -> None:
    """What a user reads are the frames, and the first and the last words; in between it is left out."""
    failure = written(tmp_path, ValueError(f"first {'x' * length} last"))
    assert failure.message.startswith("ValueError: first ")
    assert failure.message.endswith(" last")
    assert failure.traceback.startswith("Traceback (most recent call last):")
    assert "raise error" in failure.traceback
    assert failure.traceback.endswith(" last\n")
    assert ("characters are left out here" in failure.message) is (length == MIB // 2)
    assert len(failure.message) + len(failure.traceback) < 2**17 + 200


def test_an_exception_whose_text_cannot_be_had_is_written(tmp_path: Path) -> None:
    """Its class, its traceback and that Flyte may retry are known all the same."""
    failure = written(tmp_path, MuteError())
    assert failure.message == "MuteError: <exception str() failed>"
    assert "raise error" in failure.traceback
    assert failure.recoverable
    assert failure.exception is not None
    assert type(pickle.loads(failure.exception)) is MuteError
