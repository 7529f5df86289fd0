"""A training process: a fork of the agent's warm server that runs the user's function once.

Loaded into the fork server, so this module must not import ray. What a worker promises is what ``spawn`` promises:
nothing of its parent's state but imported modules. It leads a process group of its own and dies with the fork server.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

from kfpytorch_ray import flyte_worker, rank_decks
from kfpytorch_ray.cluster.forkserver import die_with_server, leave_fork_server
from kfpytorch_ray.cluster.pickling import dump_result_parts
from kfpytorch_ray.cluster.protocol import WorkerSpec
from kfpytorch_ray.cluster.spool import spool
from kfpytorch_ray.cluster.stacks import answer_with_stacks, let_look
from kfpytorch_ray.cluster.worker_failure import failures_written, format_traceback
from kfpytorch_ray.flyte_files import upload_files
from kfpytorch_ray.heartbeat import MARK_VARIABLE
from kfpytorch_ray.payload import load_payload
from kfpytorch_ray.results import Stage

_LINE_BUFFERED = 1
"""_IOLBF of stdio.h."""


def main(spec: WorkerSpec) -> None:
    """Run one worker; returns when the function did, exits or raises as the function does.

    Before an exception leaves, it is written to ``spec.failure``, and by torch's ``record`` to the error file that
    TORCHELASTIC_ERROR_FILE names.
    """
    _separate_from_parent()
    _leave_finalizers()
    answer_with_stacks(spec.stacks)
    let_look(int(spec.environment[MARK_VARIABLE].split(os.pathsep)[0]))
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
        sys.stderr.write(format_traceback(error))
        sys.exit(1)
    finally:
        # As at the end of a spawned process: threads may use what exit handlers remove. A fork leaves by os._exit.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def _run(spec: WorkerSpec) -> None:
    with failures_written(Path(spec.failure), Stage.CALL):
        finish = partial(upload_files, staged_prefix=spec.flyte.staged_prefix) if spec.upload_files else None
        result = flyte_worker.run_in_flyte_context(
            partial(_load_and_call, spec), spec.flyte, finish, _deck_keeper(spec) if spec.decks else None
        )

    with failures_written(Path(spec.failure), Stage.RESULT):
        spool(dump_result_parts(result), spec.result_directories, spec.result)


def _load_and_call(spec: WorkerSpec) -> Any:
    with failures_written(Path(spec.failure), Stage.LOAD):
        data = Path(spec.payload).read_bytes()
        if hashlib.sha256(data).hexdigest() != spec.payload_sha256:
            msg = "the payload differs from the one that the driver sent; it was not unpickled"
            raise ValueError(msg)
        call = load_payload(data)
    flyte_worker.leave_marker(flyte_worker.CALLED_MARKER)
    return call()


def _deck_keeper(spec: WorkerSpec) -> Callable[[list[Any]], AbstractContextManager[None]]:
    rank = int(spec.environment["RANK"])
    return lambda decks: rank_decks.kept(decks, Path(spec.decks), rank, always=spec.all_decks)


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


def _leave_finalizers() -> None:
    """What is to be undone of the server's objects at its exit is not done by its forks; those of torch take 50 ms."""
    for finalizer in [*weakref.finalize._registry]:  # type: ignore[attr-defined]
        finalizer.atexit = False


def _redirect_output(spec: WorkerSpec) -> None:
    for stream, path in ((sys.stdout, spec.stdout), (sys.stderr, spec.stderr)):
        stream.flush()
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, stream.fileno())
        os.close(target)
        # Whole lines are there as soon as they are printed, and a line of two threads or children stays one.
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _buffer_lines_of_c()


def _buffer_lines_of_c() -> None:
    """C libraries would keep what they print to a file until 4096 bytes are together, and lose it at a crash."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(ValueError):
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, _LINE_BUFFERED, ctypes.c_size_t(0))


def _reseed() -> None:
    # Forks of one server share numpy's global generator; Python and torch reseed or fix theirs themselves.
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
