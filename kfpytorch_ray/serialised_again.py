"""Tasks that are serialised a second time, in the container of a ``@dynamic`` or ``@eager`` that calls them.

That container is a plain task's: it has neither the variables nor the config file of the process that registered it, so
a backend which only these named is not known there. It is said where somebody can do something about it: when the
tasks are registered. (In the container, the default may well be meant.) Called by the task classes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping

from flytekit.configuration import SerializationSettings
from flytekit.core.context_manager import FlyteEntities
from flytekit.core.python_function_task import PythonFunctionTask

from kfpytorch_ray.backends import BACKEND_VARIABLE, DEFAULT_BACKEND, REMOTE_EXECUTION_VARIABLE
from kfpytorch_ray.config import Elastic, PyTorch
from kfpytorch_ray.errors import explain
from kfpytorch_ray.preflight import Job
from kfpytorch_ray.routing import ROUTE_VARIABLE

logger = logging.getLogger(__name__)


def warn_of_lost_choice(name: str, job: Job, settings: SerializationSettings) -> None:
    """Say where a task that is serialised now has another backend than it has, or had, elsewhere.

    Args:
        name: Of the task.
        job: Its config and backend.
        settings: By which it is serialised.
    """
    if REMOTE_EXECUTION_VARIABLE in os.environ:
        return
    choice = job.choice
    given = settings.env or {}
    if not choice.travels and given.get(BACKEND_VARIABLE, choice.name) != choice.name:
        logger.warning(
            "%s",
            explain(
                f"{name} is registered for the backend {choice.name!r}, not for {given[BACKEND_VARIABLE]!r}.",
                f"It chose when it was defined; {BACKEND_VARIABLE} in the settings' env came later.",
                f"Set {BACKEND_VARIABLE} for this process, too, or give the backend in the task's config.",
            ),
        )
    elif lost := {key: value for key, value in _chosen_by(job).items() if key not in given}:
        callers = ", ".join(sorted(_serialising_again(lost)))
        if callers:
            logger.warning(
                "%s",
                explain(
                    f"{name} is registered for the backend {choice.name!r}, but where one of {callers} calls it, "
                    f"it may run on {DEFAULT_BACKEND!r}.",
                    "A @dynamic or @eager serialises tasks again in its own container, which does not get "
                    f"{' and '.join(lost)} of this process, nor its config file.",
                    _ways_out(choice.name, lost),
                ),
            )


def _chosen_by(job: Job) -> Mapping[str, str]:
    """The variables that say in another container what this process's variables or config file say here."""
    if job.choice.is_default:
        return {}
    needed = {} if job.choice.travels else {BACKEND_VARIABLE: job.choice.name}
    # A call of route_upstream() is code, which is there, too.
    if not isinstance(job.config, Elastic | PyTorch) and ROUTE_VARIABLE in os.environ:
        needed[ROUTE_VARIABLE] = "1"
    return needed


def _serialising_again(lost: Mapping[str, str]) -> Iterator[str]:
    """The names of those tasks of this process that serialise others and do not bring these variables themselves."""
    for entity in FlyteEntities.entities:
        if (
            isinstance(entity, PythonFunctionTask)
            and entity.execution_mode is not PythonFunctionTask.ExecutionBehavior.DEFAULT
            and not lost.items() <= (entity.environment or {}).items()
        ):
            yield entity.name


def _ways_out(backend: str, variables: Mapping[str, str]) -> str:
    register = "pyflyte register " + " ".join(f"--env {name}={value}" for name, value in variables.items())
    if ROUTE_VARIABLE in variables:
        return f"Register with {register}"
    return f"Give it in the task's config, Elastic(backend={backend!r}), or register with {register}"
