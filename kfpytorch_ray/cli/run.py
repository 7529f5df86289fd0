"""``kfpytorch-ray run``: launch a function or a Flyte task from a shell."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import rich_click as click

from kfpytorch_ray.cli.arguments import bind
from kfpytorch_ray.cli.job import Wanted, elastic_of, pod_resources
from kfpytorch_ray.cli.options import (
    amounts,
    json_option,
    pair,
    runtime_environment,
    seconds,
    storage_option,
    verbose_option,
    verify_option,
)
from kfpytorch_ray.cli.reporting import output_on_stderr, print_json, result_as_json, span
from kfpytorch_ray.cli.targets import find_target
from kfpytorch_ray.config import LOGS
from kfpytorch_ray.notices import tell
from kfpytorch_ray.plain_call import launch_function
from kfpytorch_ray.results import ElasticResult
from kfpytorch_ray.run import Run

_ELASTIC = ("nnodes", "nproc_per_node", "max_restarts")
_BACKEND = (
    *("address", "storage", "working_dir", "resources_per_node", "lease_s", "on_interrupt", "verify", "logs"),
    *("image", "namespace", "context"),
)
"""Our options by the fields of ``Elastic`` and of the backend's options object that they are."""


@click.command()
@click.argument("target", metavar="FILE:FUNCTION")
@click.option(
    "--arg",
    "arguments",
    type=pair,
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of the function, as its annotation says; JSON for lists, dicts and dataclasses. Repeatable.",
)
@click.option("--nnodes", metavar="N|MIN:MAX", help="Nodes, or a range of them.")
@click.option("--nproc-per-node", type=int, metavar="N", help="Workers on each node.")
@click.option("--max-restarts", type=int, metavar="N", help="Restarts of all workers before the run fails.")
@click.option(
    "--resources",
    "resources_per_node",
    type=amounts,
    metavar="NAME=AMOUNT,...",
    help="Resources of a node, such as CPU=8,GPU=1,memory=64Gi. The default is the task's, else one CPU for each "
    "worker.",
)
@click.option(
    "--address",
    metavar="URL|auto|local",
    help="Which Ray: http(s)://HOST:8265 for the job API of a cluster elsewhere, 'auto' for the cluster that this "
    "machine belongs to, 'local' for one of its own (the default, but for RAY_ADDRESS).",
)
@storage_option
@click.option("--backend", metavar="NAME", help="The default is the task's, else ray.")
@click.option("--image", metavar="IMAGE", help="Of all pods, for the backends kuberay and kubeflow.")
@click.option("--namespace", metavar="NAME", help="Of those pods. The default is that of the context.")
@click.option("--context", metavar="NAME", help="Of the kubeconfig. The default is its current one.")
@click.option(
    "--working-dir",
    type=click.Path(exists=True, file_okay=False),
    metavar="DIR",
    help="Folder that is sent to the cluster. The default is the current one, or FILE's where that lies elsewhere.",
)
@click.option(
    "--exclude",
    "excludes",
    multiple=True,
    metavar="PATTERN",
    help="What of that folder is not sent, as in .gitignore, beside what is left out anyway. Repeatable.",
)
@click.option(
    "--runtime-env",
    type=runtime_environment,
    metavar="FILE|JSON",
    help="Ray's runtime environment of the run (pip, env_vars, ...): a YAML or JSON file, or JSON.",
)
@click.option(
    "--env", type=pair, multiple=True, metavar="NAME=VALUE", help="An environment variable of the workers. Repeatable."
)
@click.option(
    "--lease", "lease_s", type=seconds, metavar="TIME", help="Stop the run when this process has been gone this long."
)
@click.option(
    "--on-interrupt",
    type=click.Choice(["ask", "stop", "detach"]),
    help="What Ctrl-C does to a run on a cluster elsewhere. The default is to ask.",
)
@click.option(
    "--logs",
    type=click.Choice(LOGS),
    help="Whose lines are printed. The default is rank 0's, and the last ones of ranks that fail.",
)
@click.option("--detach", is_flag=True, help="Print the run's id and return; the run goes on, on a cluster elsewhere.")
@verify_option
@json_option
@verbose_option
def run(
    target: str,
    arguments: tuple[tuple[str, str], ...],
    env: tuple[tuple[str, str], ...],
    excludes: tuple[str, ...],
    runtime_env: dict[str, Any] | None,
    backend: str | None,
    detach: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Launch a function and print what rank 0 returns.

    It is called on all workers of a torch elastic job. FILE is a path or a dotted module, FUNCTION a plain function or
    a Flyte task, whose own config then counts where no option says otherwise.

    Example: kfpytorch-ray run train.py:main --arg epochs=3 --nnodes 2 --nproc-per-node 4
    """
    given = {name: value for name, value in options.items() if value is not None}
    wanted = Wanted(
        elastic={name: given[name] for name in _ELASTIC if name in given},
        backend=backend,
        options={name: given[name] for name in _BACKEND if name in given},
        env=dict(env),
        excludes=excludes,
        runtime_env=runtime_env or {},
    )
    # What is imported and what runs may print, too.
    with output_on_stderr(as_json or detach):
        found = find_target(target)
        bound = bind(found.function, arguments)
        config = elastic_of(found, wanted)
        call = (found.function, bound.args, bound.kwargs, config)
        launch = partial(launch_function, *call, task=found.task, resources=pod_resources(found, wanted))
        if detach:
            submitted = cast(Run, launch(wait=False))
        else:
            result = cast(ElasticResult, launch())
            answer = result_as_json(result, 0) if as_json else {}
    if detach:
        _say_submitted(submitted, given.get("lease_s"), as_json)
    elif as_json:
        print_json(answer)
    else:
        click.echo(repr(result[0].return_value))


def _say_submitted(submitted: Run, lease_s: float | None, as_json: bool) -> None:
    if as_json:
        print_json({"run_id": submitted.run_id, "status": "pending"})
    else:
        click.echo(submitted.run_id)
    if lease_s is not None:
        tell(f"it stops itself in {span(lease_s)} unless somebody follows it until then (--lease)")
