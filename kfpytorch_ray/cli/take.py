"""``kfpytorch-ray result`` and ``cancel``: the end of a run."""

from __future__ import annotations

import contextlib
import pickle
import uuid
from pathlib import Path
from typing import Any

import cloudpickle
import rich_click as click

from kfpytorch_ray.cli.options import Reach, json_option, reach_options, seconds
from kfpytorch_ray.cli.reaching import opened
from kfpytorch_ray.cli.reporting import output_on_stderr, print_json, result_as_json
from kfpytorch_ray.errors import ConfigError, KfpytorchRayError, StorageError, explain, text_of
from kfpytorch_ray.notices import tell
from kfpytorch_ray.payload import PICKLE_PROTOCOL
from kfpytorch_ray.run import Run, RunStatus


@click.command()
@click.argument("run")
@click.option("--timeout", type=seconds, metavar="TIME", help="Longest wait for its end; 0 does not wait.")
@click.option("--keep", is_flag=True, help="Leave the result in the storage, so that it can be taken again.")
@click.option("--rank", type=click.IntRange(min=0), default=0, metavar="N", help="Whose value; rank 0's by default.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write the value there as a pickle, which pickle.load() reads, instead of printing it.",
)
@json_option
@reach_options
def result(
    run: str,
    timeout: float | None,
    keep: bool,
    rank: int,
    output: Path | None,
    as_json: bool,
    storage: str | None,
    address: str | None,
    verify: bool | str | None,
) -> None:
    """Wait for a run's end and print its result.

    That is what rank 0 returned; a run that failed has the error and the exit code here that `run` would have had. It
    is removed from the storage once it was printed or written, but with --keep.
    """
    _, handle = opened(run, Reach(storage, address, verify))
    try:
        # Kept until it has arrived: it may not unpickle here, or FILE's disk may be full.
        taken = handle.result(timeout, keep=True)
    except KfpytorchRayError:
        if not keep:
            _remove_what_it_left(handle)
        raise
    if rank not in taken:
        last = len(taken) - 1
        problem = explain(f"--rank {rank} has no value.", f"Its ranks are 0 to {last}.", "Name one of these.")
        raise ConfigError(run, (problem,))
    # Modules that are imported with a value may print.
    with output_on_stderr(as_json):
        value = taken[rank].return_value
    if output is not None:
        _write(output, value)
        tell(f"the value of rank {rank} is in {output}")
    if as_json:
        print_json(result_as_json(taken, rank, None if output is None else str(output)))
    elif output is None:
        click.echo(repr(value))
    if not keep:
        handle.collect()


@click.command()
@click.argument("run")
@json_option
@reach_options
def cancel(run: str, as_json: bool, storage: str | None, address: str | None, verify: bool | str | None) -> None:
    """Stop a run, and wait until it is stopped.

    One that has ended stays as it is.
    """
    _, handle = opened(run, Reach(storage, address, verify))
    tell(f"stopping the run {run} ...")
    ended = handle.cancel()
    if as_json:
        print_json({"run_id": run, "status": ended.value})
        return
    click.echo(ended.value)
    if ended is not RunStatus.STOPPED:
        tell(f"the run {run} had ended before it could be stopped")


def _remove_what_it_left(handle: Run) -> None:
    """Of a run that has ended without values, whatever its error; of another one nothing, as it may be taken later."""
    with contextlib.suppress(KfpytorchRayError):
        status = handle.status()
        if status.ended and status is not RunStatus.SUCCEEDED:
            # Raises the same again, once what is large is removed.
            handle.result(0)


def _write(path: Path, value: Any) -> None:
    """Write a value whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with unfinished.open("wb") as file:
            cloudpickle.dump(value, file, protocol=PICKLE_PROTOCOL)
        unfinished.replace(path)
    except OSError as error:
        why = text_of(error)
        fix = "Name another file with --output; the result is still in the storage."
        raise StorageError(explain(f"{path} cannot be written.", why, fix)) from error
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        kind = type(value).__qualname__
        problem = explain(f"a {kind} cannot be pickled.", str(error), "Leave --output out to see its repr.")
        raise ConfigError("--output", (problem,)) from error
    finally:
        unfinished.unlink(missing_ok=True)
