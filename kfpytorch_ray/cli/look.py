"""``kfpytorch-ray status``, ``list`` and ``logs``: what runs do, without a change to any."""

from __future__ import annotations

import dataclasses
import textwrap
import time
from typing import Any
from urllib.parse import urlsplit

import rich_click as click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kfpytorch_ray.cli.options import Reach, json_option, reach_options
from kfpytorch_ray.cli.reaching import Standing, opened, standings
from kfpytorch_ray.cli.reporting import ago, local_time, print_json, span, table_width
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import Manifest, Outcome, RunSummary, collected, list_runs, read_outcome, run_folder

_SHOWN = 20
"""Runs that ``list`` shows without ``--all``: a screen."""

_COLUMNS = ("run", "name", "status", "nodes", "created", "by", "cluster")
_WIDE = 100
"""Columns of a terminal below which the last two are left out: they would be cut to nothing."""
_STATUS_WIDTH = 16
"""Of the lines that a status is broken into on a terminal."""

_COLOURS = {
    RunStatus.RUNNING: "cyan",
    RunStatus.SUCCEEDED: "green",
    RunStatus.FAILED: "red",
    RunStatus.LOST: "red",
    RunStatus.STOPPED: "yellow",
}


@click.command()
@click.argument("run")
@json_option
@reach_options
def status(run: str, as_json: bool, storage: str | None, address: str | None, verify: bool | str | None) -> None:
    """Show where a run stands, and how it ended."""
    reach = Reach(storage, address, verify)
    manifest, handle = opened(run, reach)
    now = handle.status()
    folder = run_folder(Reach(manifest.storage).open_storage(), run)
    outcome, taken = read_outcome(folder), collected(folder)
    if as_json:
        print_json(_as_json(manifest, Standing(now), outcome, taken is not None))
        return
    facts = {
        "run": run,
        "function": manifest.name,
        "status": now.value,
        "nodes": f"{manifest.nodes}, workers on each: {manifest.nproc_per_node}",
        "created": f"{local_time(manifest.created_at)} ({ago(manifest.created_at)}) by {manifest.created_by}",
        "cluster": manifest.address,
        "storage": manifest.storage,
    }
    if outcome is not None:
        lasted = span(outcome.ended_at - manifest.created_at)
        facts["ended"] = f"{local_time(outcome.ended_at)}, {lasted} after it was created"
    if taken is not None:
        facts["result"] = taken
    for name, value in facts.items():
        click.echo(f"{name:<9} {value}")
    if outcome is not None and outcome.message:
        click.echo(f"\n{outcome.error}: {outcome.message}")
    elif not now.ended:
        click.echo(f"\nFollow it:  {reach.command(f'logs -f {run}')}", err=True)
        click.echo(f"Stop it:    {reach.command(f'cancel {run}')}", err=True)
    elif now is RunStatus.SUCCEEDED and taken is None:
        click.echo(f"\nTake its result:  {reach.command(f'result {run}')}", err=True)


@click.command(name="list")
@click.option("--all", "everything", is_flag=True, help=f"All runs, not the {_SHOWN} newest.")
@json_option
@reach_options
def list_(everything: bool, as_json: bool, storage: str | None, address: str | None, verify: bool | str | None) -> None:
    """List the runs of a storage, newest first."""
    reach = Reach(storage, address, verify)
    place = reach.open_storage()
    runs = list_runs(place)
    shown = runs if everything else runs[:_SHOWN]
    known = standings(shown, reach)
    if as_json:
        print_json([_as_json(run.manifest, known[run.manifest.run_id], run.outcome, run.collected) for run in shown])
        return
    if not runs:
        click.echo(f"There are no runs in {place.uri}.", err=True)
        return
    console = Console(width=table_width())
    console.print(_table(shown, known, console))
    if len(shown) < len(runs):
        click.echo(f"{len(runs) - len(shown)} older runs are not shown: --all shows them.", err=True)


@click.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on with what it prints until it ends.")
@click.option("--rank", type=click.IntRange(min=0), metavar="N", help="Only the lines of this rank.")
@reach_options
def logs(
    run: str,
    follow: bool,
    rank: int | None,
    storage: str | None,
    address: str | None,
    verify: bool | str | None,
) -> None:
    """Print the log of a run: of its driver and its ranks."""
    _, handle = opened(run, Reach(storage, address, verify))
    for line in handle.logs(follow=follow, rank=rank):
        click.echo(line)


def _table(runs: list[RunSummary], known: dict[str, Standing], console: Console) -> Table:
    now = time.time()
    columns = _COLUMNS if console.width >= _WIDE else _COLUMNS[:-2]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        # An id is to be copied whole; where the terminal is narrow, names and addresses are cut.
        table.add_column(name, no_wrap=name not in ("name", "by", "cluster"), overflow="ellipsis")
    for run in runs:
        manifest, standing = run.manifest, known[run.manifest.run_id]
        colour = _COLOURS.get(standing.status, "default") if standing.status else "dim"
        said = textwrap.fill(str(standing), _STATUS_WIDTH) if console.is_terminal else str(standing)
        cells = (
            manifest.run_id,
            manifest.name,
            said,
            f"{manifest.nodes} x {manifest.nproc_per_node}",
            ago(manifest.created_at, now),
            manifest.created_by,
            urlsplit(manifest.address).netloc or manifest.address,
        )
        # As text: what others have written into the storage is no markup.
        shown = [
            Text(cell, style=colour if name == "status" else "") for name, cell in zip(_COLUMNS, cells, strict=True)
        ]
        table.add_row(*shown[: len(columns)])
    return table


def _as_json(manifest: Manifest, standing: Standing, outcome: Outcome | None, taken: bool) -> dict[str, Any]:
    return {
        "run_id": manifest.run_id,
        "status": standing.status.value if standing.status else "unknown",
        **({"detail": standing.why_unknown} if standing.why_unknown else {}),
        **{name: value for name, value in dataclasses.asdict(manifest).items() if name != "run_id"},
        "ended_at": outcome.ended_at if outcome else None,
        "error": (outcome.error or None) if outcome else None,
        "message": (outcome.message or None) if outcome else None,
        "collected": taken,
    }
