"""From the options of ``run`` and a task's own config to an ``Elastic``: what is given on the command line wins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from flytekit import Resources
from flytekit.core.resources import ResourceSpec

from kfpytorch_ray.backends import BACKEND_VARIABLE, BackendChoice, choose_backend
from kfpytorch_ray.checks import is_elastic
from kfpytorch_ray.cli.options import headers, overlaid
from kfpytorch_ray.cli.targets import Target
from kfpytorch_ray.cli.travel import working_dir_for
from kfpytorch_ray.config import (
    DEFAULT_WORKING_DIR_EXCLUDES,
    Elastic,
    KubeflowBackend,
    KubeRayBackend,
    RayBackend,
)
from kfpytorch_ray.errors import ConfigError, explain

_OF_PODS = ("image", "namespace", "context")
_REQUESTS = {"CPU": "cpu", "GPU": "gpu", "memory": "mem"}
"""What Kubernetes is asked for, by Ray's names."""

DEFAULT_BACKEND = RayBackend.name
"""Of this command line, where nobody has chosen one. A task's default is kubeflow, upstream's."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was given on the command line; only what was.

    Attributes:
        elastic: Fields of ``Elastic``.
        backend: Name of the backend; None: as the task or the environment says.
        options: Fields of the backend's options object.
        env: Environment variables of the workers, beside those of the task's options.
        excludes: Patterns of what is not sent, beside those of the task's options or the default's.
        runtime_env: Ray's, laid over that of the task's options part by part.
    """

    elastic: Mapping[str, Any] = field(default_factory=dict)
    backend: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    excludes: tuple[str, ...] = ()
    runtime_env: Mapping[str, Any] = field(default_factory=dict)


def elastic_of(target: Target, wanted: Wanted) -> Elastic:
    """The config of the launch.

    Raises:
        ConfigError: The task is no elastic one, or the backend has no such options.
        BackendUnavailableError: There is no such backend.
    """
    base = _base(target)
    choice = _choice(target, base, wanted)
    options = dict(wanted.options)
    before: Any = choice.options
    makes_pods = _makes_pods(choice, options)
    if makes_pods:
        # They are the launch's: pod_resources.
        options.pop("resources_per_node", None)
    if choice.name == RayBackend.name and (found := headers()) is not None:
        options["headers"] = {**getattr(before, "headers", {}), **found}
    if wanted.env:
        options["env"] = {**getattr(before, "env", {}), **wanted.env}
    if wanted.excludes:
        options["excludes"] = (*getattr(before, "excludes", DEFAULT_WORKING_DIR_EXCLUDES), *wanted.excludes)
    if wanted.runtime_env:
        options["runtime_env"] = {**(getattr(before, "runtime_env", None) or {}), **wanted.runtime_env}
    unnamed = options.get("working_dir") is None and getattr(before, "working_dir", None) is None
    if unnamed and (folder := _working_dir(target, choice, options, makes_pods)) is not None:
        options["working_dir"] = folder
    return replace(base, **wanted.elastic, backend=overlaid(choice.name, before, options) or choice.name)


def pod_resources(target: Target, wanted: Wanted) -> ResourceSpec | None:
    """Of a node's pod, in the place of the task's; None where none were given, or no pods are made here.

    Raises:
        ConfigError: As ``elastic_of``; or an amount that no pod can have.
    """
    amounts = wanted.options.get("resources_per_node")
    if amounts is None or not _makes_pods(_choice(target, _base(target), wanted), wanted.options):
        return None
    return ResourceSpec(requests=_requests(amounts), limits=Resources())


def _working_dir(target: Target, choice: BackendChoice, options: Mapping[str, Any], makes_pods: bool) -> str | None:
    if choice.name == RayBackend.name:
        return working_dir_for(target, options.get("address") or getattr(choice.options, "address", None))
    # Pods are always elsewhere.
    return working_dir_for(target, choice.name) if makes_pods else None


def _makes_pods(choice: BackendChoice, options: Mapping[str, Any]) -> bool:
    """Whether this process has an operator make pods, as the kubeflow backend does only where it is told how."""
    if choice.name == KubeRayBackend.name:
        return True
    told = {name: options[name] for name in _OF_PODS if name in options}
    return choice.name == KubeflowBackend.name and getattr(
        overlaid(choice.name, choice.options, told), "creates_job", False
    )


def _requests(amounts: Mapping[str, float]) -> Resources:
    if not amounts.get("GPU", 0.0).is_integer():
        problem = explain(
            "--resources: a pod has whole GPUs only.", "So Kubernetes counts them.", "Give a whole number."
        )
        raise ConfigError("kfpytorch-ray", (problem,))
    if unknown := amounts.keys() - _REQUESTS.keys():
        problem = explain(
            f"--resources: a pod has no {', '.join(sorted(unknown))} that could be asked for here.",
            "Other resources than these need an options object.",
            f"Name {', '.join(_REQUESTS)} only, or a task with a KubeRayBackend or KubeflowBackend that says the rest.",
        )
        raise ConfigError("kfpytorch-ray", (problem,))
    return Resources(**{_REQUESTS[name]: _quantity(amount) for name, amount in amounts.items()})


def _quantity(amount: float) -> str:
    """As Kubernetes has it, which knows thousandths at the finest."""
    return str(int(amount)) if amount.is_integer() else f"{amount * 1000:.0f}m"


def _base(target: Target) -> Elastic:
    if target.task is None:
        return Elastic()
    config = target.task.task_config
    if config is None:
        return Elastic()
    if not is_elastic(config):
        kind = type(config).__name__
        problem = explain(
            f"its task_config is a {kind}.",
            "A launch starts ranks as torchrun does, which only an Elastic describes.",
            "Name a task with an Elastic, or a plain function.",
        )
        raise ConfigError(target.task.name, (problem,))
    # Upstream's class has the same fields, less the backend.
    return Elastic(**{one.name: getattr(config, one.name) for one in fields(Elastic) if hasattr(config, one.name)})


def _choice(target: Target, base: Elastic, wanted: Wanted) -> BackendChoice:
    named = wanted.backend
    own = base.backend
    if named is not None and named != getattr(own, "name", own):
        return choose_backend(named)
    if own is None and named is None and not _is_chosen_elsewhere(target):
        return BackendChoice(DEFAULT_BACKEND)
    return choose_backend(own or named, None if target.task is None else target.task.environment)


def _is_chosen_elsewhere(target: Target) -> bool:
    """Whether the task's variables, those of this process or flytekit's config file name a backend."""
    environment = {} if target.task is None else target.task.environment or {}
    chosen = choose_backend(None, environment)
    return not chosen.is_default or BACKEND_VARIABLE in {**environment, **os.environ}
