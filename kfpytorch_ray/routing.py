"""Unedited code on our backends: our task classes serve the config types of ``flytekitplugins.kfpytorch``.

flytekit finds a task class by the exact type of the config and takes only one for each, so the entries that upstream
made are replaced; where upstream is still being imported, its entries are replaced as it makes them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from typing import Any

from flytekit.core.task import TaskPlugins

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
    if _upstream_is_being_imported():
        _route_what_will_be_registered()
        return
    upstream = importlib.import_module(UPSTREAM_MODULE)
    entries = TaskPlugins._PYTHONFUNCTION_TASK_PLUGINS
    for name, own_type in _OWN_TYPES.items():
        entries[getattr(upstream, name)] = entries[own_type]


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
    """flytekit's table of task classes, with our class in the place of upstream's as it is registered."""

    def __setitem__(self, config_type: type, task_class: Any) -> None:
        own_type = _OWN_TYPES.get(config_type.__name__) if config_type.__module__ == UPSTREAM_MODULE else None
        super().__setitem__(config_type, task_class if own_type is None else self[own_type])


def _route_what_will_be_registered() -> None:
    entries = TaskPlugins._PYTHONFUNCTION_TASK_PLUGINS
    if not isinstance(entries, _RoutedEntries):
        TaskPlugins._PYTHONFUNCTION_TASK_PLUGINS = _RoutedEntries(entries)


def _upstream_is_installed() -> bool:
    try:
        return importlib.util.find_spec("flytekitplugins.kfpytorch") is not None
    except ModuleNotFoundError:
        return False


def _upstream_is_being_imported() -> bool:
    """``import flytekitplugins.kfpytorch`` imports flytekit, which imports us by the entry point before it goes on."""
    upstream = sys.modules.get(UPSTREAM_MODULE)
    if upstream is None:
        return False
    registered = TaskPlugins._PYTHONFUNCTION_TASK_PLUGINS
    return any(getattr(upstream, name, None) not in registered for name in _OWN_TYPES)
