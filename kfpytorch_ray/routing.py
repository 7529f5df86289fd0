"""Unedited code on our backends: our task classes serve the config types of ``flytekitplugins.kfpytorch``.

flytekit finds a task class by the exact type of the config in a table, and takes only one for each. So the table is
replaced by one that answers with ours where upstream's is asked for, whether upstream has been imported yet or not.
Itself without flytekit at import: kfpytorch_ray.task needs it while whichever module of ours imports flytekit.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from typing import Any

from kfpytorch_ray.config import Elastic, PyTorch
from kfpytorch_ray.errors import BackendUnavailableError, explain

logger = logging.getLogger(__name__)

ROUTE_VARIABLE = "KFPYTORCH_RAY_ROUTE_UPSTREAM"
"""Set to ``1``: route when flytekit is imported. Written into the container of a routed task that needs it."""

UPSTREAM_MODULE = "flytekitplugins.kfpytorch.task"

_OWN_TYPES: dict[str, type] = {"Elastic": Elastic, "PyTorch": PyTorch}
"""Our config type for each of upstream's, by name; the task class that is registered for ours serves both."""


def route_upstream() -> None:
    """Let our task classes serve ``Elastic`` and ``PyTorch`` of ``flytekitplugins.kfpytorch``.

    Call it before the tasks are defined; tasks that exist already keep their class. Calling it again changes nothing.
    The backend is then chosen by ``KFPYTORCH_RAY_BACKEND`` or flytekit's config file.

    Raises:
        BackendUnavailableError: The upstream package is not installed.
    """
    if not _upstream_is_installed():
        raise BackendUnavailableError(
            explain(
                "Upstream's config types cannot be routed.",
                "The package 'flytekitplugins-kfpytorch' is not installed in this environment.",
                "Install it with: pip install flytekitplugins-kfpytorch",
            )
        )
    from flytekit.core.task import TaskPlugins

    entries = TaskPlugins._PYTHONFUNCTION_TASK_PLUGINS
    if not isinstance(entries, _RoutedEntries):
        TaskPlugins._PYTHONFUNCTION_TASK_PLUGINS = _RoutedEntries(entries)


def route_if_switched_on() -> None:
    """Route if the variable ``KFPYTORCH_RAY_ROUTE_UPSTREAM`` says so; without upstream there is nothing to route."""
    if os.environ.get(ROUTE_VARIABLE, "").lower() not in ("1", "true", "yes", "on"):
        return
    try:
        route_upstream()
    except BackendUnavailableError as error:
        # Raised here it would break `import flytekit` for everybody.
        logger.warning("%s is set. %s", ROUTE_VARIABLE, error)


class _RoutedEntries(dict[type, Any]):
    """flytekit's table of task classes, with our class in the place of upstream's."""

    def __getitem__(self, config_type: type) -> Any:
        own_type = _OWN_TYPES.get(config_type.__name__) if config_type.__module__ == UPSTREAM_MODULE else None
        if own_type is None:
            return super().__getitem__(config_type)
        # Registers our classes, if that has not been done; by name, for it imports this module.
        importlib.import_module("kfpytorch_ray.task_classes")
        return super().__getitem__(own_type)


def _upstream_is_installed() -> bool:
    try:
        return importlib.util.find_spec("flytekitplugins.kfpytorch") is not None
    except ModuleNotFoundError:
        return False
