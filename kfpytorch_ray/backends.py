"""Which backend runs a task, and how its adapter is found.

The ground floor knows adapters by the ``Adapter`` protocol and by name only: a table here, and the entry-point group
``kfpytorch_ray.adapters`` for backends of others. A class is imported when it is first needed.

Highest first: ``Elastic(backend=...)`` or ``PyTorch(backend=...)``; the variable ``KFPYTORCH_RAY_BACKEND`` (the task's
``environment`` before that of ``pyflyte register --env`` before the process's); section ``[kfpytorch_ray]``, key
``backend`` of flytekit's config file (in YAML ``kfpytorch_ray: {backend: ...}``), though not in the container of a
remote execution; ``kubeflow``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol

from flytekit.configuration.file import ConfigEntry, LegacyConfigEntry, YamlConfigEntry, get_config_file
from flytekit.core.context_manager import FlyteContextManager

from kfpytorch_ray.config import BackendOptions, Elastic, PyTorch
from kfpytorch_ray.errors import BackendUnavailableError, ConfigError, explain
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.results import ElasticResult

BACKEND_VARIABLE = "KFPYTORCH_RAY_BACKEND"
"""Names the backend; written into the container when a task is serialised for another backend than the default."""

DEFAULT_BACKEND = "kubeflow"

REMOTE_EXECUTION_VARIABLE = "FLYTE_INTERNAL_EXECUTION_ID"
"""Set by Flyte in the container of a remote execution."""

ENTRY_POINT_GROUP = "kfpytorch_ray.adapters"

_ADAPTERS: Mapping[str, str] = {
    "kubeflow": "kfpytorch_ray.adapters.kubeflow:KubeflowAdapter",
    "ray": "kfpytorch_ray.adapters.raycluster:RayAdapter",
    "kuberay": "kfpytorch_ray.adapters.kuberay:KubeRayAdapter",
}

JobConfig = Elastic | PyTorch


@dataclass(frozen=True, slots=True)
class Findings:
    """What a backend says of a job config.

    Attributes:
        problems: Fields that it cannot honour without changing results; the task is refused.
        warnings: Fields that it ignores, and why; each is said once.
    """

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Adapter(Protocol):
    """One way to run a job. Constructed with the options object, or None where only a name was given."""

    def __init__(self, options: Any) -> None: ...

    def check(self, config: JobConfig) -> Findings:
        """Say which fields of ``config`` this backend cannot honour."""
        ...

    def task_type(self, config: JobConfig) -> str:
        """The Flyte task type under which the task is registered."""
        ...

    def custom(self, config: JobConfig) -> dict[str, Any] | None:
        """The ``custom`` field of the Flyte task template; None without one."""
        ...

    def launches(self, config: JobConfig) -> bool:
        """Whether ``run`` starts the workers. If not, the platform started this process as one of them."""
        ...

    def build(self, plan: LaunchPlan) -> Any:
        """Turn the plan into what the backend wants. Pure: needs no cluster and starts nothing."""
        ...

    def run(self, plan: LaunchPlan) -> ElasticResult:
        """Run the plan to its end and leave nothing running.

        Raises:
            KfpytorchRayError: As kfpytorch_ray.errors says.
        """
        ...


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """The backend of one task.

    Attributes:
        name: The backend.
        options: The user's options object; None where only the name was given.
        travels: Whether the task or what it is registered with says so, and with them every container that serialises
            the task again. If not, only this process's variables or config file do, or nobody does.
    """

    name: str
    options: BackendOptions | None = None
    travels: bool = field(default=True, compare=False)

    @property
    def is_default(self) -> bool:
        """Whether this is what a task without any choice gets, so that nothing need be recorded."""
        return self.name == DEFAULT_BACKEND


def known_backends() -> tuple[str, ...]:
    """Names that ``backend=`` takes, our own first."""
    others = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)} - _ADAPTERS.keys()
    return (*_ADAPTERS, *sorted(others))


def choose_backend(
    explicit: str | BackendOptions | None, task_environment: Mapping[str, str] | None = None
) -> BackendChoice:
    """The backend of a task, by the order in this module's docstring.

    Args:
        explicit: The config's ``backend``.
        task_environment: The task's own environment variables.

    Raises:
        ConfigError: ``explicit`` is neither a name nor an options object.
        BackendUnavailableError: No such backend.
    """
    if explicit is not None and not isinstance(explicit, str):
        if not isinstance(explicit, BackendOptions):
            raise ConfigError(
                "backend",
                (
                    explain(
                        f"must be a name or an options object, not {explicit!r}.",
                        "By it an adapter is found.",
                        "Give backend='ray', or options such as RayBackend().",
                    ),
                ),
            )
        return _known(BackendChoice(explicit.name, explicit), "the task's config")
    if explicit:
        return _known(BackendChoice(explicit), "the task's config")
    given = _registered_with().get(BACKEND_VARIABLE)
    if REMOTE_EXECUTION_VARIABLE in os.environ:
        # The environment of a @dynamic, in whose container this is, is nearer than what all were registered with.
        given = os.environ.get(BACKEND_VARIABLE) or given
    if named := (task_environment or {}).get(BACKEND_VARIABLE) or given:
        return _known(BackendChoice(named), f"the variable {BACKEND_VARIABLE}")
    if named := os.environ.get(BACKEND_VARIABLE):
        return _known(BackendChoice(named, travels=False), f"the variable {BACKEND_VARIABLE}")
    if named := _configured():
        return _known(BackendChoice(named, travels=False), "flytekit's config file")
    return BackendChoice(DEFAULT_BACKEND, travels=False)


def load_adapter(choice: BackendChoice) -> Adapter:
    """Import the adapter of a backend and give it its options."""
    target = _ADAPTERS.get(choice.name)
    if target is None:
        (entry,) = entry_points(group=ENTRY_POINT_GROUP, name=choice.name)
        loaded: type[Adapter] = entry.load()
        return loaded(choice.options)
    module, _, attribute = target.partition(":")
    adapter: type[Adapter] = getattr(importlib.import_module(module), attribute)
    return adapter(choice.options)


def require_package(package: str, backend: str, install: str) -> None:
    """Raise BackendUnavailableError if ``package``, which ``backend`` needs, cannot be found; imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise BackendUnavailableError(
            explain(
                f"The backend {backend!r} is not available.",
                f"The package {package!r} is not installed in this environment.",
                f"Install it with: {install}",
            )
        )


def _registered_with() -> Mapping[str, str]:
    """Variables that all containers get which are registered now: known while ``pyflyte`` loads the modules."""
    settings = FlyteContextManager.current_context().serialization_settings
    return (settings.env if settings else None) or {}


def _configured() -> str | None:
    """What flytekit's config file names. A remote execution runs what was registered and does not look."""
    if REMOTE_EXECUTION_VARIABLE in os.environ:
        return None
    entry = ConfigEntry(LegacyConfigEntry("kfpytorch_ray", "backend"), YamlConfigEntry("kfpytorch_ray.backend"))
    named = entry.read(get_config_file(None))
    return str(named) if named else None


def _known(choice: BackendChoice, source: str) -> BackendChoice:
    # Looking through all packages for others takes longer than the rest of a warm launch.
    if choice.name in _ADAPTERS:
        return choice
    known = known_backends()
    if choice.name not in known:
        raise BackendUnavailableError(
            explain(
                f"There is no backend {choice.name!r}, which {source} names.",
                f"The known backends are {', '.join(known)}.",
                "Correct the name, or install the package that provides it.",
            )
        )
    return choice
