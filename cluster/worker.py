"""A training process: a fork of the agent's warm server that runs the user's function once.

Loaded into the fork server, so this module must not import ray. What a worker promises is what ``spawn`` promises:
nothing of its parent's state but imported modules. It leads a process group of its own and dies with the fork server.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import pickle
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
from flytekit.exceptions.user import FlyteRecoverableException
from torch.distributed.elastic.multiprocessing.errors import record

from kfpytorch_ray import flyte_worker
from kfpytorch_ray.cluster.forkserver import die_with_server, leave_fork_server
from kfpytorch_ray.cluster.pickling import dump_parts
from kfpytorch_ray.cluster.protocol import WorkerFailure, WorkerSpec
from kfpytorch_ray.cluster.spool import spool
from kfpytorch_ray.cluster.stacks import answer_with_stacks
from kfpytorch_ray.errors import ResultError
from kfpytorch_ray.flyte_files import upload_files
from kfpytorch_ray.payload import blame_result, load_payload
from kfpytorch_ray.results import ElasticWorkerResult, Stage

_OWN_FILES = frozenset({__file__, contextlib.__file__, flyte_worker.__file__, record.__code__.co_filename})


def main(spec: WorkerSpec) -> None:
    """Run one worker; returns when the function did, exits or raises as the function does.

    Before an exception leaves, it is written to ``spec.failure``, and by torch's ``record`` to the error file that
    TORCHELASTIC_ERROR_FILE names.
    """
    _separate_from_parent()
    answer_with_stacks(spec.stacks)
    _redirect_output(spec)
    os.environ.clear()
    os.environ.update(spec.environment)
    time.tzset()
    sys.path[:] = search_path(sys.path, spec.sys_path)
    if spec.working_directory:
        os.chdir(spec.working_directory)
    _reseed()
    try:
        record(_run)(spec)
    except Exception as error:  # noqa: BLE001 - the process ends here; the error is written down
        sys.stderr.write(_format_traceback(error))
        sys.exit(1)
    finally:
        # A spawned process runs them; a fork server's child leaves by os._exit.
        atexit._run_exitfuncs()


def _run(spec: WorkerSpec) -> None:
    with _failures_written(spec, Stage.CALL):
        finish = upload_files if spec.upload_files else None
        result = flyte_worker.run_in_flyte_context(partial(_load_and_call, spec), spec.flyte, finish)

    with _failures_written(spec, Stage.RESULT):
        spool(_parts(result), spec.result_directories, spec.result)


def _parts(result: ElasticWorkerResult) -> list[memoryview]:
    try:
        return dump_parts(result)
    except Exception as error:  # noqa: BLE001 - objects of the user's may fail to pickle in any way
        raise ResultError(blame_result(result, int(os.environ["RANK"]), error)) from None


def _load_and_call(spec: WorkerSpec) -> Any:
    with _failures_written(spec, Stage.LOAD):
        data = Path(spec.payload).read_bytes()
        if hashlib.sha256(data).hexdigest() != spec.payload_sha256:
            msg = "the payload differs from the one that the driver sent; it was not unpickled"
            raise ValueError(msg)
        call = load_payload(data)
    return call()


@contextlib.contextmanager
def _failures_written(spec: WorkerSpec, stage: Stage) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        path = Path(spec.failure)
        # An inner stage has said it already.
        if not path.exists():
            sys.stderr.flush()
            failure = WorkerFailure(
                stage=stage,
                message=f"{type(error).__name__}: {error}",
                traceback=_format_traceback(error),
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


def _format_traceback(error: Exception) -> str:
    """The traceback as Python prints it, from the user's function on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in _OWN_FILES:
        frames = frames.tb_next
    if frames is None:
        # One of this module's own checks: its message says all.
        return "".join(traceback.format_exception_only(error))
    return "".join(traceback.format_exception(type(error), error, frames))


def _pickled(error: Exception) -> bytes | None:
    try:
        pickled: bytes = cloudpickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - any class of the user's may fail in any way; its text is kept
        return None
    return pickled


def search_path(own: Sequence[str], given: Sequence[str]) -> list[str]:
    """Where a worker looks for modules.

    Args:
        own: Its search path as it started.
        given: As in ``WorkerSpec``. What was sent comes first, in the order that it has where the function comes from:
            else a module in another of its folders could be taken for the function's.
    """
    sent = [os.path.abspath(path) for path in given if not os.path.isabs(path)]
    others = [path for path in given if os.path.isabs(path) and path not in own]
    return [*filter(os.path.isdir, sent), *own, *filter(os.path.isdir, others)]


def _separate_from_parent() -> None:
    os.setsid()
    die_with_server()
    leave_fork_server()


def _redirect_output(spec: WorkerSpec) -> None:
    for stream, path in ((sys.stdout, spec.stdout), (sys.stderr, spec.stderr)):
        stream.flush()
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, stream.fileno())
        os.close(target)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _reseed() -> None:
    # Forks of one server share numpy's global generator; Python and torch reseed or fix theirs themselves.
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
