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
from kfpytorch_ray.results import Stage

_AROUND = frozenset({contextlib.__file__, flyte_worker.__file__, record.__code__.co_filename})
_MACHINERY = str(Path(__file__).parent)
"""What stands between the start of a worker and the user's function."""


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
            failure = WorkerFailure(
                stage=stage,
                message=f"{type(error).__name__}: {error}",
                traceback=format_traceback(error),
                timestamp=time.time(),
                recoverable=isinstance(error, FlyteRecoverableException),
                stderr_size_bytes=os.fstat(sys.stderr.fileno()).st_size,
                exception=_pickled(error),
            )
            # Renamed into place, so that a worker killed while it writes leaves no half of a file.
            partial = path.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(failure))
            partial.rename(path)
        raise


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


def _pickled(error: Exception) -> bytes | None:
    try:
        pickled: bytes = cloudpickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - any class of the user's may fail in any way; its text is kept
        return None
    return pickled
