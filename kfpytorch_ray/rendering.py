"""What becomes of a task: the Kubernetes resources, without a cluster and without Flyte, and what is lost on the way.

Behind ``kfpytorch-ray render`` and tests. The manifests are made by the backend's adapter, which is found by name.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from flytekit.configuration import SerializationSettings
from flytekit.tools.translator import get_serializable_task
from google.protobuf.json_format import MessageToDict

from kfpytorch_ray.checks import one_of
from kfpytorch_ray.config import BackendOptions
from kfpytorch_ray.errors import ConfigError, explain
from kfpytorch_ray.images import settings_for
from kfpytorch_ray.pods import RendersFlyte, RendersKubernetes
from kfpytorch_ray.task_classes import PytorchElasticFunctionTask, PyTorchFunctionTask

VIA_FLYTE = "flyte"
VIA_KUBERNETES = "kubernetes"
WAYS = (VIA_FLYTE, VIA_KUBERNETES)


@dataclass(frozen=True, slots=True)
class Rendered:
    """What becomes of a task.

    Attributes:
        manifests: The Kubernetes resources that are created, as dicts.
        lost: Every field that does not arrive on this way, or means something else, and why.
    """

    manifests: tuple[dict[str, Any], ...]
    lost: tuple[str, ...]


def render(
    task: Any,
    backend: str | BackendOptions | None = None,
    via: str = VIA_FLYTE,
    settings: SerializationSettings | None = None,
) -> Rendered:
    """Render a task as its backend would have it run. Changes nothing of the task.

    Args:
        task: A Flyte task with ``task_config=Elastic(...)`` or ``PyTorch(...)``.
        backend: The backend in place of the task's own.
        via: Who creates the resources. ``"flyte"``: what Flyte 1.16.8 makes of the registered task, by our own reading
            of it; names and places of an execution are examples. ``"kubernetes"``: what this package creates itself;
            names of a run and its storage are examples.
        settings: As ``pyflyte register`` would have them. None: no image is built, and flytekit's default is named.

    Raises:
        ConfigError: Not such a task, an unknown way, or a config that the backend refuses.
        BackendUnavailableError: No such backend.
    """
    if not isinstance(task, PytorchElasticFunctionTask | PyTorchFunctionTask):
        raise ConfigError(
            "render",
            (
                explain(
                    f"{getattr(task, 'name', task)} is no task with task_config=Elastic(...) or PyTorch(...).",
                    "Only of these a backend makes Kubernetes resources.",
                    "Give the task such a task_config, of kfpytorch_ray.",
                ),
            ),
        )
    if via not in WAYS:
        problem = explain(
            f"via={via!r} is no way.", "A task gets to a cluster by Flyte or by this process.", f"Give {one_of(WAYS)}."
        )
        raise ConfigError("render", (problem,))
    rendered = task if backend is None else task.on_backend(backend)
    job = rendered.job
    adapter, arguments = job.adapter, rendered.arguments
    if via == VIA_FLYTE and isinstance(adapter, RendersFlyte):
        template = task_template(rendered, settings)
        return Rendered(adapter.flyte_manifests(template), adapter.lost(job.config, arguments))
    if via == VIA_KUBERNETES and isinstance(adapter, RendersKubernetes):
        return Rendered(
            adapter.kubernetes_manifests(job.config, arguments), adapter.kubernetes_lost(job.config, arguments)
        )
    problem = explain(
        f"the backend {job.choice.name!r} creates nothing on the way {via!r}.",
        "It runs tasks on what is there already.",
        "Name another backend, or another way.",
    )
    raise ConfigError("render", (problem,))


def task_template(task: Any, settings: SerializationSettings | None = None) -> dict[str, Any]:
    """A task's template as it is registered with Flyte: the protobuf message as a dict.

    Args:
        task: Any Flyte task.
        settings: As for ``render``.
    """
    how = settings or settings_for(task)
    message = get_serializable_task(OrderedDict(), how, task).template.to_flyte_idl()
    template: dict[str, Any] = MessageToDict(message)
    return template
