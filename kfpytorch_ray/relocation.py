"""A plan for machines that do not see this one's disk: its files, outputs and checkpoints lie in the storage instead.

What is remote already, as everything is in a Flyte execution, stays where it is. What functions write there is the
user's and is never removed by us; the copies of local inputs are, with the rest of what was staged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.data_persistence import FileAccessProvider

from kfpytorch_ray.errors import StorageError, explain, text_of
from kfpytorch_ray.flyte_files import upload_files
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.runs import INPUTS, run_folder
from kfpytorch_ray.storage import Storage

OUTPUTS = "outputs"
CHECKPOINTS = "checkpoints"
LOGS = "logs"


def outputs_of(plan: LaunchPlan, storage: Storage, run_id: str) -> tuple[str, str]:
    """Where the workers write their outputs, and where what they print is kept.

    Args:
        plan: As it was made here.
        storage: That this machine and the workers share.
        run_id: Names the run's folders there.
    """
    flyte = plan.flyte
    if _is_remote(flyte.raw_output_prefix):
        return flyte.raw_output_prefix, flyte.logs_prefix
    outputs = f"{storage.prefix}/{OUTPUTS}/{run_id}"
    return outputs, f"{outputs}/{LOGS}"


def relocated(plan: LaunchPlan, storage: Storage, run_id: str, log_archive: str | None = None) -> LaunchPlan:
    """The plan with places that its workers reach; files among its inputs are uploaded.

    Args:
        plan: As it was made here.
        storage: That this machine and the workers share.
        run_id: Names the run's folders there.
        log_archive: Where what ranks print is kept; empty: nowhere. None: beside the outputs.

    Raises:
        StorageError: A file among the inputs cannot be uploaded.
    """
    flyte = plan.flyte
    outputs, logs = outputs_of(plan, storage, run_id)
    destination = flyte.checkpoint_dest
    if destination is not None and not _is_remote(destination):
        # Not by the plan's name: every task that is executed locally is "local".
        destination = f"{storage.prefix}/{CHECKPOINTS}/{run_id}"
    source = flyte.checkpoint_src if flyte.checkpoint_src and _is_remote(flyte.checkpoint_src) else None
    inputs = run_folder(storage, run_id).folder(INPUTS)
    context = FlyteContextManager.current_context()
    before = context.file_access
    access = FileAccessProvider(before.local_sandbox_dir, inputs.prefix, before.data_config)
    with _told(inputs.uri), FlyteContextManager.with_context(context.with_file_access(access)):
        args, kwargs = upload_files(plan.args), upload_files(dict(plan.kwargs))
    moved = replace(
        flyte,
        raw_output_prefix=outputs,
        checkpoint_dest=destination,
        checkpoint_src=source,
        staged_prefix=inputs.prefix,
        logs_prefix=logs if log_archive is None else log_archive,
    )
    return replace(plan, args=args, kwargs=kwargs, flyte=moved)


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise StorageError(
            explain(
                f"A file or folder among the inputs cannot be uploaded to {where}.",
                text_of(error),
                "Check that the file is there, that the storage has room, and that this machine has the rights for it; "
                "or pass the URI of a file that the cluster reaches.",
            )
        ) from error


def _is_remote(path: str) -> bool:
    return bool(FileAccessProvider.is_remote(path))
