"""What a command says, and where: results on standard output, everything else on standard error.

With ``--json`` standard output is one JSON document, for a script; an error of ours is such a document, too. Wrong use
and Ctrl-C have only their exit codes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import rich_click as click

from kfpytorch_ray.errors import KfpytorchRayError
from kfpytorch_ray.notices import is_terminal
from kfpytorch_ray.results import ElasticResult, RoundRecord

JSON_KEY = "kfpytorch_ray.json"
VERBOSE_KEY = "kfpytorch_ray.verbose"
"""What the options leave in click's ``meta``, which a group and its commands share."""

_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
_TABLE_WIDTH = 400
"""Where nobody looks: a file or a pipe gets every cell whole."""


def print_json(document: Any) -> None:
    """The answer to a script."""
    click.echo(json.dumps(document, indent=2))


def report(error: KfpytorchRayError, ctx: click.Context) -> None:
    """Say what went wrong: the message, the traceback where it was asked for, and JSON where a script waits for it."""
    if ctx.meta.get(VERBOSE_KEY):
        click.echo("".join(traceback.format_exception(error)), err=True)
    else:
        click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(str(error), err=True)
    if ctx.meta.get(JSON_KEY):
        print_json({"error": type(error).__name__, "message": str(error), "retryable": error.retryable})


@contextlib.contextmanager
def output_on_stderr(wanted: bool) -> Iterator[None]:
    """Have what others print go to standard error: by this process, and by those that it starts."""
    if not wanted:
        yield
        return
    with contextlib.ExitStack() as undo:
        sys.stdout.flush()
        # Under a test runner, and where somebody has replaced it, it is no file of the system.
        with contextlib.suppress(OSError, ValueError):
            own, others = sys.stdout.fileno(), sys.stderr.fileno()
            kept = os.dup(own)
            undo.callback(os.close, kept)
            os.dup2(others, own)
            undo.callback(os.dup2, kept, own)
        undo.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def value_as_json(value: Any) -> dict[str, Any]:
    """A value under ``value`` where JSON can say it, else its ``repr`` under ``value_repr``."""
    try:
        plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        # NaN and infinity are no JSON.
        json.dumps(plain, allow_nan=False)
    except Exception:  # noqa: BLE001 - copying a field is the business of the user's class
        return {"value_repr": repr(value)}
    return {"value": plain}


def result_as_json(result: ElasticResult, rank: int, output: str | None = None) -> dict[str, Any]:
    """A result with the value of one of its ranks, or the file that it was written to."""
    return {
        "run_id": result.run_id or None,
        "status": "succeeded",
        "rank": rank,
        **(value_as_json(result[rank].return_value) if output is None else {"output": output}),
        "rounds": [_round_as_json(ended) for ended in result.rounds],
    }


def ago(timestamp: float, now: float | None = None) -> str:
    """How long ago something was, for people."""
    return f"{span((time.time() if now is None else now) - timestamp)} ago"


def span(seconds: float) -> str:
    """A time in the largest unit that fits, rounded down; what clocks disagree by is no time."""
    for unit, length in _UNITS:
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "0 s"


def local_time(timestamp: float) -> str:
    """A point in time on this machine's clock."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(timestamp))


def table_width() -> int | None:
    """How wide a table may be; None: as the terminal is."""
    return None if is_terminal(sys.stdout) else _TABLE_WIDTH


def _round_as_json(ended: RoundRecord) -> dict[str, Any]:
    outcomes = [rank.outcome.value for rank in ended.ranks]
    return {
        "index": ended.index,
        "ending": ended.ending.value,
        "world_size": ended.world_size,
        "nodes": list(ended.nodes),
        "started_at": ended.started_at,
        "ended_at": ended.ended_at,
        "ranks": {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)},
    }
