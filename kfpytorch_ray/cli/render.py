"""``kfpytorch-ray render``: the Kubernetes resources that a Flyte task becomes, and what is lost on the way.

Needs neither a cluster nor Ray. Standard output holds the manifests alone, for ``kubectl apply -f -``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import rich_click as click

from kfpytorch_ray.backends import known_backends
from kfpytorch_ray.cli.manifest_text import as_json, as_yaml
from kfpytorch_ray.cli.options import overlaid, verbose_option
from kfpytorch_ray.cli.reporting import output_on_stderr
from kfpytorch_ray.cli.targets import Target, find_target
from kfpytorch_ray.config import BackendOptions
from kfpytorch_ray.errors import ConfigError, explain
from kfpytorch_ray.images import settings_for
from kfpytorch_ray.preflight import logger as preflight_logger
from kfpytorch_ray.rendering import VIA_FLYTE, VIA_KUBERNETES, WAYS, Rendered
from kfpytorch_ray.rendering import render as render_task
from kfpytorch_ray.routing import ROUTE_VARIABLE
from kfpytorch_ray.task_classes import PytorchElasticFunctionTask, PyTorchFunctionTask

FORMATS = {"yaml": as_yaml, "json": as_json}

NOTES = {
    VIA_FLYTE: "what Flyte 1.16.8 creates for the registered task, by our reading of its source; names, namespace and "
    "s3:// places are those of an example execution",
    VIA_KUBERNETES: "what this package creates when the task runs without Flyte; the run's name, its place in the "
    "storage and hashes are examples",
}
"""What has to be known of a way to read its manifests."""


def _known_backend(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and value not in (known := known_backends()):
        msg = f"there is no backend {value!r}; the known ones are {', '.join(known)}"
        raise click.BadParameter(msg)
    return value


@click.command()
@click.argument("target", metavar="FILE:TASK")
@click.option(
    "--backend", callback=_known_backend, metavar="NAME", help="kubeflow, kuberay, ... The default is the task's own."
)
@click.option(
    "--via",
    type=click.Choice(WAYS),
    default=VIA_FLYTE,
    show_default=True,
    help="Who creates the resources: Flyte, for the registered task, or this package on Kubernetes itself.",
)
@click.option("--image", metavar="IMAGE:TAG", help="For tasks that name no image. The default is flytekit's.")
@click.option(
    "-o", "--output", "form", type=click.Choice(list(FORMATS)), default="yaml", show_default=True, help="The form."
)
@verbose_option
def render(target: str, backend: str | None, via: str, image: str | None, form: str) -> None:
    """Print the Kubernetes resources that a Flyte task becomes.

    Standard error has a line `lost: ...` for every field of the task that does not arrive on this backend, or means
    something else there, and why. FILE is a path or a dotted module. No cluster is asked, and no image is built.

    Example: kfpytorch-ray render train.py:train --backend kuberay | kubectl apply --dry-run=server -f -
    """
    with output_on_stderr(True), _without_preflights_log():
        rendered = _rendered(target, find_target(target), backend, via, image)
    # Bytes, for kubectl expects UTF-8 whatever this terminal is set to.
    click.echo(FORMATS[form](rendered.manifests).encode(), nl=False)
    if via in NOTES:
        click.echo(f"note: {NOTES[via]}", err=True)
    for field in rendered.lost:
        click.echo(f"lost: {' '.join(field.split())}", err=True)


def _rendered(text: str, target: Target, backend: str | None, via: str, image: str | None) -> Rendered:
    task = target.task
    if not isinstance(task, PytorchElasticFunctionTask | PyTorchFunctionTask):
        raise ConfigError(text, (_no_task_of_ours(text, target),))
    own = getattr(task.task_config, "backend", None)
    chosen: str | BackendOptions | None
    # The task's own options are more than the name of the same backend.
    chosen = None if backend == getattr(own, "name", None) else backend
    if via == VIA_KUBERNETES and image is not None:
        name = chosen or task.job.choice.name
        chosen = overlaid(name, task.job.choice.options if chosen is None else None, {"image": image})
    try:
        return render_task(task, chosen, via=via, settings=settings_for(task, image))
    except AssertionError as error:
        # flytekit's way of saying that nobody has configured an image.
        problem = f"{error}; images beside the default one come from flytekit's config file"
        raise ConfigError(text, (problem,)) from error


def _no_task_of_ours(text: str, target: Target) -> str:
    name = text.rpartition(":")[2]
    needed = "Kubernetes resources are rendered for a Flyte task with task_config=Elastic(...) or PyTorch(...)."
    if target.task is None:
        fix = f"Put @task(task_config=Elastic(...)) above it, or launch it as it is: kfpytorch-ray run {text}"
        return explain(f"{name} is a plain function.", needed, fix)
    config = target.task.task_config
    if config is None:
        return explain(f"{name} is a task without task_config.", needed, "Add task_config=Elastic(nnodes=2) to @task.")
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    if type(config).__module__.startswith("flytekitplugins.kfpytorch"):
        fix = f"Import Elastic from kfpytorch_ray, or have upstream's tasks run by it: {ROUTE_VARIABLE}=1"
        return explain(f"{name} is a task of upstream's plugin, for its task_config is a {kind}.", needed, fix)
    return explain(f"{name} has a {kind} for its task_config.", needed, "Import Elastic from kfpytorch_ray.")


@contextlib.contextmanager
def _without_preflights_log() -> Iterator[None]:
    """What a backend ignores is said as lost, once, and not also as the log has it, nor of other tasks of the file."""
    before = preflight_logger.disabled
    preflight_logger.disabled = True
    try:
        yield
    finally:
        preflight_logger.disabled = before
