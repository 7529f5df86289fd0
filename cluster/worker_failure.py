"""A worker's failure as a file: written by itself, because outside of it an exception is text only. Without ray."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
from flytekit.exceptions.user import FlyteRecoverableException
from torch.distributed.elastic.multiprocessing.errors import record

from kfpytorch_ray import flyte_worker
from kfpytorch_ray.cluster.protocol import WorkerFailure
from kfpytorch_ray.errors import text_of
from kfpytorch_ray.results import Stage

_AROUND = frozenset({contextlib.__file__, flyte_worker.__file__, record.__code__.co_filename})
_MACHINERY = str(Path(__file__).parent)
"""What stands between the start of a worker and the user's function."""
_LONGEST_TEXT = 64 * 1024
"""Characters of a message or of a traceback: the driver keeps them of every rank and round."""
_LARGEST_EXCEPTION_BYTES = 2**20
_TOO_LARGE = "kfpytorch_ray: pickled this exception is larger than 1 MiB, so no more than its text left the rank.\n"


@contextlib.contextmanager
def failures_written(path: Path, stage: Stage) -> Iterator[None]:
    """Write down an exception that leaves the block, and let it go on.

    Args:
        path: Of the file; an inner block has written it already where it is there.
        stage: What the block does.
    """
    try:
        yield
    except Exception as error:
        if not path.exists():
            sys.stderr.flush()
            exception, note = _pickled(error)
            failure = WorkerFailure(
                stage=stage,
                message=_shortened(text_of(error)),
                traceback=_shortened(format_traceback(error)) + note,
                timestamp=time.time(),
                recoverable=isinstance(error, FlyteRecoverableException),
                stderr_size_bytes=os.fstat(sys.stderr.fileno()).st_size,
                exception=exception,
            )
            # Renamed into place, so that a worker killed while it writes leaves no half of a file.
            partial = path.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(failure))
            partial.rename(path)
        raise


def read_failure(path: Path) -> WorkerFailure | None:
    """What a worker has written of its failure; None if it has not failed."""
    if not path.exists():
        return None
    failure: WorkerFailure = pickle.loads(path.read_bytes())
    return failure


def format_traceback(error: Exception) -> str:
    """The traceback as Python prints it, from the user's function on."""
    frames = error.__traceback__
    while frames is not None and _is_ours(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    if frames is None:
        # One of our own checks: its message says all.
        return "".join(traceback.format_exception_only(error))
    return "".join(traceback.format_exception(type(error), error, frames))


def _is_ours(file: str) -> bool:
    return file in _AROUND or os.path.dirname(file).startswith(_MACHINERY)


def _shortened(text: str) -> str:
    """A text with its beginning and its end, where all of it is too long."""
    left_out = len(text) - _LONGEST_TEXT
    if left_out <= 0:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]}\n... {left_out} characters are left out here ...\n{text[-half:]}"


def _pickled(error: Exception) -> tuple[bytes | None, str]:
    """The exception, None where it cannot leave this process; and a line about it for the user, or none."""
    try:
        pickled: bytes = cloudpickle.dumps(error)
        if len(pickled) > _LARGEST_EXCEPTION_BYTES:
            return None, _TOO_LARGE
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - any class of the user's may fail in any way; its text is kept
        return None, ""
    return pickled, ""
