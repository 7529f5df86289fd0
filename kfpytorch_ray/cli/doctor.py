"""``kfpytorch-ray doctor``: what may stand in the way of a launch, here and on a cluster, with the fix of each.

Findings are made elsewhere; here they are gathered and shown. 0 if nothing fails, warnings or not, else 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

import rich_click as click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kfpytorch_ray.backends import BackendChoice, load_adapter
from kfpytorch_ray.cli.exit_codes import ExitCode
from kfpytorch_ray.cli.options import (
    headers,
    json_option,
    seconds,
    storage_option,
    verbose_option,
    verify_option,
)
from kfpytorch_ray.cli.reporting import output_on_stderr, print_json
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.doctor.examining import ExaminingAdapter
from kfpytorch_ray.doctor.finding import Finding, Group, Level, failed, of_message
from kfpytorch_ray.doctor.judgement import judge
from kfpytorch_ray.doctor.machine import measure, try_storage
from kfpytorch_ray.doctor.settings import judge_settings, read_settings
from kfpytorch_ray.errors import KfpytorchRayError
from kfpytorch_ray.notices import is_terminal
from kfpytorch_ray.runs import STORAGE_VARIABLE, storage_of

_COLOURS = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
_PLAIN_WIDTH = 120
_WAIT_S = 90.0


@click.command()
@click.option(
    "--address",
    metavar="URL|auto|HOST:PORT",
    help="The cluster to look at: http(s)://HOST:8265 of its job API; auto or HOST:PORT of the GCS where this machine "
    "belongs to it. Without it only this machine is looked at.",
)
@click.option(
    "--wait",
    "wait_s",
    metavar="TIME",
    type=seconds,
    default=f"{_WAIT_S:g}s",
    show_default=True,
    help="How long to wait for a node that is free.",
)
@click.option("--local-ray", is_flag=True, help="Also start a Ray on this machine, and two agents on it.")
@json_option
@storage_option
@verify_option
@verbose_option
@click.pass_context
def doctor(
    ctx: click.Context,
    address: str | None,
    wait_s: float,
    local_ray: bool,
    as_json: bool,
    storage: str | None,
    verify: bool | str | None,
) -> None:
    """Check this machine and, given an address, a cluster.

    On a cluster every node is looked at by a small launch that goes the way of any launch; nothing of it stays there.
    Exits with 0 if nothing fails, warnings or not, else with 1.
    """
    options = RayBackend(
        address=address,
        storage=storage or os.environ.get(STORAGE_VARIABLE),
        headers=headers() or {},
        verify=True if verify is None else verify,
    )
    found = []
    with output_on_stderr(as_json), Console(stderr=True).status("Looking at this machine ...") as status:
        for finding in examine(options, wait_s, local_ray=local_ray):
            found.append(finding)
            status.update(f"Looking at {address or 'this machine'} ({finding.check}: {finding.level.value}) ...")
    if as_json:
        print_json([finding.to_json() for finding in found])
    else:
        _print(found)
    ctx.exit(ExitCode.FAILED if failed(found) else ExitCode.OK)


def examine(options: RayBackend, wait_s: float, *, local_ray: bool = False) -> Iterator[Finding]:
    """Find out everything, one after another.

    Args:
        options: Name the cluster, if there is one to look at, and how it is reached.
        wait_s: Seconds to wait for a node.
        local_ray: Whether a Ray is started here.
    """
    address = options.address
    is_node = local_ray or (address is not None and "://" not in address)
    yield from judge(measure(), is_node=is_node)
    yield from judge_settings(read_settings(os.environ), address)
    if options.storage:
        yield examine_storage(options.storage)
    if address is None and not local_ray:
        return
    try:
        adapter = load_adapter(BackendChoice("ray", options))
        assert isinstance(adapter, ExaminingAdapter)
        if local_ray:
            yield from adapter.examine_here(wait_s)
        if address is not None:
            yield from adapter.examine(wait_s)
    except KfpytorchRayError as error:
        yield of_message("ray", error, Group.CLUSTER)


def examine_storage(uri: str) -> Finding:
    """Whether this machine can write a storage."""
    try:
        storage = storage_of(uri)
        try_storage(storage.uri)
    except KfpytorchRayError as error:
        return of_message("storage", error)
    return Finding("storage", Level.OK, f"{storage.uri} is read and written")


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print findings, what was looked at one after another."""
    width = max((len(finding.check) for finding in findings), default=0)
    for group in Group:
        of_group = [finding for finding in findings if finding.group is group]
        if of_group:
            console.print(Text(group.value, style="bold"))
            console.print(_table(of_group, width))
            console.print()
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    console.print(Text(", ".join(f"{count} {level.value}" for level, count in counts.items())))


def _table(findings: Sequence[Finding], width: int) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(width=max(len(level.value) for level in Level))
    table.add_column(width=width, no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        said = Text(finding.text)
        if finding.fix:
            said.append(f"\nFix: {finding.fix}", style="bold")
        table.add_row(Text(finding.level.value, style=_COLOURS[finding.level]), Text(finding.check), said)
    return table


def _print(findings: Sequence[Finding]) -> None:
    if is_terminal(sys.stdout):
        show(findings, Console(highlight=False))
        return
    # In a pipe rich takes 80 columns, which is little for sentences, and fills every line up.
    console = Console(highlight=False, width=_PLAIN_WIDTH)
    with console.capture() as captured:
        show(findings, console)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))
