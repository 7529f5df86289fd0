"""``kfpytorch-ray stacks`` and ``flamegraph``: inside the ranks of a run that goes on."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from kfpytorch_ray.cli.options import Reach, json_option, reach_options, seconds
from kfpytorch_ray.cli.reporting import print_json
from kfpytorch_ray.config import BackendOptions, RayBackend
from kfpytorch_ray.inspection import flamegraph as flamegraph_of
from kfpytorch_ray.inspection import stacks as stacks_of

_EPILOG = (
    "A run of this machine, or of a cluster that it belongs to, is found by itself, or by --address auto|HOST:PORT; "
    "one on a cluster elsewhere by --storage."
)


@click.command(epilog=_EPILOG)
@click.argument("run")
@click.option("--rank", type=click.IntRange(min=0), metavar="N", help="Only this rank.")
@json_option
@reach_options
def stacks(
    run: str, rank: int | None, as_json: bool, storage: str | None, address: str | None, verify: bool | str | None
) -> None:
    """Show what the ranks of a run are doing: the stacks of all their threads."""
    found = stacks_of(run, rank=rank, storage=storage, backend=_reached(Reach(storage, address, verify)))
    if as_json:
        print_json({str(number): text for number, text in found.items()})
        return
    for number, text in found.items():
        click.echo(f"--- rank {number}\n{text}\n")


@click.command(epilog=_EPILOG)
@click.argument("run")
@click.option("--rank", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help="The rank.")
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, metavar="FILE", help="An SVG."
)
@click.option(
    "--duration", type=seconds, default="10s", show_default=True, metavar="TIME", help="How long to watch it."
)
@reach_options
def flamegraph(
    run: str,
    rank: int,
    output: Path,
    duration: float,
    storage: str | None,
    address: str | None,
    verify: bool | str | None,
) -> None:
    """Draw where a rank of a run spends its time. Needs py-spy on the nodes."""
    if not output.parent.is_dir():
        msg = f"there is no folder {str(output.parent)!r}"
        raise click.BadParameter(msg, param_hint="--output")
    backend = _reached(Reach(storage, address, verify))
    svg = flamegraph_of(run, rank, duration_s=max(1, round(duration)), storage=storage, backend=backend)
    output.write_text(svg, encoding="utf-8")
    click.echo(f"{output}: {round(duration)} s of rank {rank}", err=True)


def _reached(reach: Reach) -> BackendOptions | None:
    return reach.options(RayBackend.name)
