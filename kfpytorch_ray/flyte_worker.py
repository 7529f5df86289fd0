"""Running the user's function in a worker process, with the Flyte context that the task gave it.

Every backend's workers come through here: the context is set up, the function called, and decks and output metadata
are collected with its value. What kind of failure it was is told by markers beside torch elastic's error file,
because an agent gets the exception as text only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import cloudpickle
import flytekit
from flytekit import Deck
from flytekit.core.context_manager import FlyteContextManager
from flytekit.exceptions.user import FlyteRecoverableException

from kfpytorch_ray.checkpoint import WorkerCheckpoint
from kfpytorch_ray.flyte_files import whole_downloads
from kfpytorch_ray.plan import FlyteContext
from kfpytorch_ray.results import ElasticWorkerResult

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
RECOVERABLE_MARKER = "recoverable_error"
UNPICKLABLE_MARKER = "unpicklable_result"
CALLED_MARKER = "called"
"""Left when the user's function is about to be called."""


def spawn_helper(
    fn: bytes,
    raw_output_prefix: str,
    checkpoint_dest: str | None,
    checkpoint_src: str | None,
    kwargs: Mapping[str, Any],
) -> ElasticWorkerResult:
    """Call a pickled function in a fresh process, under a Flyte context. Same arguments as upstream's.

    Args:
        fn: The function, pickled by cloudpickle.
        raw_output_prefix: Where files, folders and dataframes are written.
        checkpoint_dest: Where this attempt writes its checkpoints.
        checkpoint_src: Where an earlier attempt left them.
        kwargs: Keyword arguments of the function.

    Returns:
        The function's value, the decks made in this process, and the output metadata.
    """
    # Unpickling imports the user's modules, which may ask for the Flyte context: so only once it is set up.
    context = FlyteContext(raw_output_prefix, checkpoint_dest, checkpoint_src)
    return run_in_flyte_context(lambda: cloudpickle.loads(fn)(**kwargs), context)


def run_in_flyte_context(
    call: Callable[[], Any],
    flyte: FlyteContext,
    finish: Callable[[Any], Any] | None = None,
    keep_decks: Callable[[list[Deck]], AbstractContextManager[None]] | None = None,
) -> ElasticWorkerResult:
    """Set up the Flyte context of a worker, which sets the execution's variables in ``os.environ``, and call.

    Args:
        call: The user's function with its inputs.
        flyte: What the context is made of.
        finish: What becomes of the value under that context, once its metadata is found.
        keep_decks: Given the list of the worker's decks, what is to be around the call.
    """
    from flytekit.bin.entrypoint import setup_execution

    os.environ.update(flyte.execution_id)
    with setup_execution(raw_output_data_prefix=flyte.raw_output_prefix) as context:
        try:
            with (
                FlyteContextManager.with_context(_with_checkpoint(context, flyte)) as inner,
                keep_decks(inner.user_space_params.decks) if keep_decks else contextlib.nullcontext(),
            ):
                result = run_in_current_context(call)
                return result if finish is None else result._replace(return_value=finish(result.return_value))
        finally:
            _remove_empty_folders(context.file_access.local_sandbox_dir)


def _with_checkpoint(context: Any, flyte: FlyteContext) -> Any:
    """flytekit's context with our checkpoint in it, where there is a place for one."""
    builder = context.user_space_params.builder()
    if flyte.checkpoint_dest:
        builder.checkpoint = WorkerCheckpoint(flyte.checkpoint_dest, flyte.checkpoint_src)
    execution = context.execution_state.with_params(user_space_params=builder.build())
    return context.with_execution_state(execution)


def run_in_current_context(call: Callable[[], Any]) -> ElasticWorkerResult:
    """Call under the Flyte context that is there, as in a process that was forked from the task's.

    ``sys.exit(0)`` counts as returning None.
    """
    try:
        with whole_downloads():
            value = call()
    except SystemExit as exit_request:
        if exit_request.code not in (0, None):
            raise
        value = None
    except FlyteRecoverableException:
        leave_marker(RECOVERABLE_MARKER)
        raise
    tracker = FlyteContextManager.current_context().output_metadata_tracker
    metadata = tracker.get(value) if tracker else None
    return ElasticWorkerResult(return_value=value, decks=flytekit.current_context().decks, om=metadata)


def _remove_empty_folders(sandbox: str) -> None:
    """flytekit leaves a sandbox behind for every process; files in it may be outputs that are still to be read."""
    folder = Path(sandbox)
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):
            Path(parent).rmdir()
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def leave_marker(name: str) -> None:
    """Leave a marker beside this worker's error file. Without an agent there is nobody to tell."""
    if error_file := os.environ.get(ERROR_FILE_VARIABLE):
        Path(error_file).with_name(name).touch()


def has_marker(error_file: str, name: str) -> bool:
    """Whether the worker that wrote this error file left a marker.

    A worker that was killed wrote none; torch then gives ``"<N/A>"``, which is not a place to look for markers.
    """
    path = Path(error_file)
    return path.is_file() and path.with_name(name).exists()


def marked_at(error_file: str, name: str) -> float | None:
    """When a worker that has this error file left a marker, in seconds since the epoch; None if it did not."""
    try:
        return Path(error_file).with_name(name).stat().st_mtime
    except (OSError, ValueError):
        return None
