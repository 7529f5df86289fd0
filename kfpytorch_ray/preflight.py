"""Before anything runs: is the config sound, which backend is chosen, and can that backend honour the config?

Shared by the task classes, which ask when the task is defined, and by ``launch()``. Every problem is reported at once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from kfpytorch_ray.backends import Adapter, BackendChoice, JobConfig, choose_backend, load_adapter
from kfpytorch_ray.checks import problems_of
from kfpytorch_ray.errors import BackendUnavailableError, ConfigError
from kfpytorch_ray.pod_template import shared_memory_problems
from kfpytorch_ray.pods import ChecksArguments, ShapesPods
from kfpytorch_ray.task_arguments import TaskArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A config that was found sound, and the backend that runs it.

    Attributes:
        config: The user's.
        choice: The backend.
        adapter: Its adapter.
        adds_shared_memory: Whether the task's pod template has to mount a volume at /dev/shm.
    """

    config: JobConfig
    choice: BackendChoice
    adapter: Adapter
    adds_shared_memory: bool = False


def admit(
    config: JobConfig,
    environment: Mapping[str, str] | None = None,
    problems: tuple[str, ...] = (),
    arguments: TaskArguments | None = None,
) -> Job:
    """Check a config and choose its backend. What the backend ignores is logged, once per job.

    Args:
        config: ``Elastic`` or ``PyTorch``, ours or upstream's.
        environment: The task's environment variables.
        problems: What the caller found already.
        arguments: What stands beside the config in ``@task(...)``; None outside a task.

    Raises:
        ConfigError: Lists every problem.
        BackendUnavailableError: The backend is unknown or its package is missing.
    """
    found = [*problems_of(config), *problems]
    try:
        choice = choose_backend(getattr(config, "backend", None), environment)
    except ConfigError as error:
        found.extend(f"{error.subject} {problem}" for problem in error.problems)
        raise ConfigError(type(config).__name__, tuple(found)) from error
    except BackendUnavailableError as error:
        if not found:
            raise
        raise ConfigError(type(config).__name__, (*found, f"backend: {error}")) from error
    adapter = load_adapter(choice)
    findings = adapter.check(config)
    # A field that is wrong for everyone need not be said to be wrong for this backend too.
    found.extend(problem for problem in findings.problems if problem not in found)
    warnings = [*findings.warnings]
    adds_shared_memory = False
    if arguments is not None and isinstance(adapter, ChecksArguments):
        beside = adapter.check_arguments(config, arguments)
        found.extend(beside.problems)
        warnings.extend(beside.warnings)
    if arguments is not None and not isinstance(adapter, ShapesPods):
        adds_shared_memory = config.increase_shared_mem and arguments.shared_memory in (None, False)
        found.extend(shared_memory_problems(arguments.pod_template) if adds_shared_memory else ())
    if found:
        raise ConfigError(type(config).__name__, tuple(found))
    for warning in dict.fromkeys(warnings):
        logger.warning("%s", warning)
    return Job(config, choice, adapter, adds_shared_memory)
