"""The Flyte task classes, registered with flytekit for ``@task(task_config=Elastic(...))`` and ``PyTorch(...)``.

A task checks its config and chooses its backend when it is defined, and only here are our errors turned into Flyte's.
kfpytorch_ray.task says when this module is imported.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import logging
import os
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from flytekit import PythonFunctionTask, Resources
from flytekit.configuration import SerializationSettings
from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.pod_template import PodTemplate
from flytekit.core.resources import ResourceSpec, convert_resources_to_resource_model
from flytekit.exceptions.base import FlyteException
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException
from flytekit.extend import IgnoreOutputs, TaskPlugins

from kfpytorch_ray.backends import BACKEND_VARIABLE
from kfpytorch_ray.checks import parse_nnodes
from kfpytorch_ray.config import BackendOptions, Elastic, PyTorch
from kfpytorch_ray.error_file import told_earlier
from kfpytorch_ray.errors import (
    TORCH_IMPORT_ERROR_MESSAGE,
    KfpytorchRayError,
    LaunchError,
    PayloadError,
    PlacementError,
)
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.planning import (
    Call,
    current_context,
    execution_name,
    plan_elastic,
    plan_pytorch,
    warn_of_unreservable,
)
from kfpytorch_ray.pod_template import copy_template, with_shared_memory
from kfpytorch_ray.pods import ShapesPods
from kfpytorch_ray.preflight import Job, admit
from kfpytorch_ray.routing import ROUTE_VARIABLE, route_if_switched_on
from kfpytorch_ray.run_deck import add_decks, publish_failure
from kfpytorch_ray.serialised_again import warn_of_lost_choice
from kfpytorch_ray.task_arguments import TaskArguments, nothing_asked

logger = logging.getLogger(__name__)

CONFIG_KEY = "kfpytorch_ray.backend"
"""Key in a task template's ``config`` that names the backend where it is not the default."""

RESOURCES_VARIABLE = "KFPYTORCH_RAY_RESOURCES"
"""Resources of the project or of ``pyflyte run``, which the container of a ``ShapesPods`` backend would not know of."""

C = TypeVar("C", Elastic, PyTorch)


class _TorchTask(PythonFunctionTask[C]):  # type: ignore[misc] # flytekit ships no py.typed
    """What both task classes share: preflight, serialisation, a run and its outcome.

    Args:
        task_config: ``Elastic`` or ``PyTorch``, ours or upstream's.
        task_function: The user's function.
        environment: Environment variables of the task.
        **kwargs: As for flytekit's ``PythonFunctionTask``.

    Raises:
        ConfigError: The config cannot work; lists every problem. A ValueError.
        BackendUnavailableError: The chosen backend is unknown or its package is missing.
    """

    def __init__(
        self,
        task_config: C,
        task_function: Callable[..., Any],
        environment: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._own_environment = dict(environment or {})
        self._arguments = TaskArguments.of(kwargs, self._own_environment)
        self._job = admit(task_config, self._own_environment, arguments=self._arguments)
        super().__init__(
            task_config=task_config,
            task_function=task_function,
            task_type=self._job.adapter.task_type(task_config),
            # Says which reading of `custom` Flyte's plugin is to use.
            task_type_version=1,
            environment=self._recorded_environment(),
            **kwargs,
        )
        self.pod_template = self._own_pod_template()

    @property
    def job(self) -> Job:
        """The config and its backend; asked for again after ``with_overrides(task_config=...)``."""
        if self.task_config is not self._job.config:
            before = self._job.adds_shared_memory
            self._job = admit(self.task_config, self._own_environment, arguments=self._arguments)
            self._task_type = self._job.adapter.task_type(self.task_config)
            self._environment = self._recorded_environment()
            if self._job.adds_shared_memory != before:
                self.pod_template = self._own_pod_template()
        return self._job

    @property
    def arguments(self) -> TaskArguments:
        """What stands beside the config; resources as they are now, for flytekit lays a project's defaults under."""
        return dataclasses.replace(self._arguments, resources=self.resources)

    @property
    def task_type(self) -> str:
        """The Flyte task type."""
        return self.job.adapter.task_type(self.task_config)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the task, and those that record the choice of a backend."""
        _ = self.job
        recorded: dict[str, str] = self._environment
        return recorded

    @property
    def pod_template(self) -> PodTemplate | None:
        """The user's, with a volume at /dev/shm where the backend does not mount one."""
        _ = self.job
        return self._pod_template

    @pod_template.setter
    def pod_template(self, template: PodTemplate | None) -> None:
        self._pod_template = template

    def get_custom(self, settings: SerializationSettings) -> dict[str, Any] | None:
        """The ``custom`` field of the task template, as the backend wants it."""
        adapter = self.job.adapter
        if isinstance(adapter, ShapesPods):
            return adapter.custom_for(self.task_config, self.arguments)
        custom = adapter.custom(self.task_config)
        if custom is not None:
            return custom
        inherited: dict[str, Any] | None = super().get_custom(settings)
        return inherited

    def get_config(self, settings: SerializationSettings) -> dict[str, str]:
        """The ``config`` field of the task template; names the backend where it is not the default."""
        config = dict(super().get_config(settings) or {})
        choice = self.job.choice
        warn_of_lost_choice(self.name, self.job, settings)
        return config if choice.is_default else {**config, CONFIG_KEY: choice.name}

    def on_backend(self, backend: str | BackendOptions) -> _TorchTask[C]:
        """A copy of this task on another backend; this one stays as it is.

        Args:
            backend: As in the config. For upstream's config classes only a name.
        """
        other = copy.copy(self)
        if hasattr(self.task_config, "backend"):
            other._task_config = dataclasses.replace(self.task_config, backend=backend)
        else:
            name = backend if isinstance(backend, str) else backend.name
            other._own_environment = {**self._own_environment, BACKEND_VARIABLE: name}
            other._task_config = copy.copy(self.task_config)
        return other

    @abstractmethod
    def plan(self, call: Call) -> LaunchPlan:
        """The plan of one execution."""

    def execute(self, **kwargs: Any) -> Any:
        """Run the function on all workers and return rank 0's value.

        Raises:
            FlyteRecoverableException: Flyte may run the task again.
            FlyteUserRuntimeException: It may not; the cause is the user's own exception where it can be had.
            IgnoreOutputs: Rank 0 ran in another pod, whose outputs count, or another pod failed first.
        """
        context = current_context()
        if not self.job.choice.is_default and not isinstance(self.job.adapter, ShapesPods):
            warn_of_unreservable(self.resources)
        plan = self.plan(
            Call(
                name=self.name,
                run_id=execution_name(context) or self.name,
                function=self._task_function,
                args=(),
                kwargs=kwargs,
                context=context,
                arguments=dataclasses.replace(
                    self._arguments, resources=self._registered_resources(), environment=self.environment
                ),
            )
        )
        try:
            result = self.job.adapter.run(plan)
            if 0 not in result:
                raise IgnoreOutputs
            first = result[0]
        except KfpytorchRayError as error:
            # What is wrong with a config or a cluster, and stays wrong, is raised as it is.
            if not (error.retryable or isinstance(error, LaunchError | PayloadError | PlacementError)):
                raise
            if told_earlier(context, getattr(error, "timestamp", 0.0) or time.time()):
                logger.warning("Another pod failed before this one and has told Flyte. This one: %s", error)
                raise IgnoreOutputs from error
            publish_failure(error.report)
            raise _flyte_error(error) from (error.__cause__ or error)
        add_decks(result.report, first)
        tracker = FlyteContextManager.current_context().output_metadata_tracker
        if first.om and tracker:
            tracker.add(first.return_value, first.om)
        return first.return_value

    def _get_container(self, settings: SerializationSettings) -> Any:
        """The task's container, which flytekit also lays over ``pod_template``."""
        container = super()._get_container(settings)
        choice, adapter = self.job.choice, self.job.adapter
        if (container.env or {}).get(BACKEND_VARIABLE, choice.name) != choice.name:
            # The settings name another one, and the container must run what is registered.
            container._env = {**container.env, BACKEND_VARIABLE: choice.name}
        if isinstance(adapter, ShapesPods):
            own = adapter.container_resources(self.task_config, self.arguments)
            container._resources = convert_resources_to_resource_model(own.requests, own.limits)
            if self.resources != self._arguments.resources:
                container._env = {**(container.env or {}), RESOURCES_VARIABLE: self.resources.to_json()}
        return container

    def _registered_resources(self) -> ResourceSpec:
        """The task's own resources, else those that it was registered with by default."""
        recorded = os.environ.get(RESOURCES_VARIABLE)
        if recorded and isinstance(self.job.adapter, ShapesPods) and self.resources == nothing_asked():
            return ResourceSpec.from_json(recorded)
        return self.resources

    def _own_pod_template(self) -> PodTemplate | None:
        template = self._arguments.pod_template
        return with_shared_memory(template) if self._job.adds_shared_memory else copy_template(template)

    def _recorded_environment(self) -> dict[str, str]:
        """The user's variables, and the choice: the container does not share the registering shell's environment."""
        choice = self._job.choice
        recorded = dict(self._own_environment)
        if choice.is_default:
            # Only where the variable is there already: what upstream registers has none.
            return {**recorded, BACKEND_VARIABLE: choice.name} if BACKEND_VARIABLE in recorded else recorded
        recorded[BACKEND_VARIABLE] = choice.name
        if not isinstance(self._job.config, Elastic | PyTorch):
            recorded[ROUTE_VARIABLE] = "1"
        return recorded


class PytorchElasticFunctionTask(_TorchTask[Elastic]):
    """A torch elastic job as a Flyte task.

    Args:
        task_config: ``Elastic``, ours or upstream's.
        task_function: The user's function, which every worker calls.
        **kwargs: As for flytekit's ``PythonFunctionTask``.

    Raises:
        ConfigError: The config cannot work; lists every problem. A ValueError.
        BackendUnavailableError: The chosen backend is unknown or its package is missing.
        ImportError: torch is not installed.
    """

    rdzv_backend = "c10d"

    def __init__(self, task_config: Elastic, task_function: Callable[..., Any], **kwargs: Any) -> None:
        if not _is_installed("torch"):
            raise ImportError(TORCH_IMPORT_ERROR_MESSAGE)
        super().__init__(task_config, task_function, **kwargs)

    @property
    def min_nodes(self) -> int:
        """Fewest nodes to train with."""
        return parse_nnodes(self.task_config.nnodes)[0]

    @property
    def max_nodes(self) -> int:
        """Most nodes to train with."""
        return parse_nnodes(self.task_config.nnodes)[1]

    def plan(self, call: Call) -> LaunchPlan:
        """The plan of one execution."""
        return plan_elastic(self.task_config, call)


class PyTorchFunctionTask(_TorchTask[PyTorch]):
    """A job with one process per replica as a Flyte task. Constructed like ``PytorchElasticFunctionTask``."""

    def plan(self, call: Call) -> LaunchPlan:
        """The plan of one execution."""
        return plan_pytorch(self.task_config, call)

    def execute(self, **kwargs: Any) -> Any:
        """Call the function where the platform started this process as one of the replicas, else launch them all."""
        if self.job.adapter.launches(self.task_config):
            return super().execute(**kwargs)
        return PythonFunctionTask.execute(self, **kwargs)


def _flyte_error(error: KfpytorchRayError) -> FlyteException:
    timestamp = getattr(error, "timestamp", None) or None
    if error.retryable:
        return FlyteRecoverableException(str(error), timestamp=timestamp)
    return FlyteUserRuntimeException(error, timestamp=timestamp)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        # In sys.modules without a spec: somebody put it there.
        return True


# So that typing.get_type_hints(Worker), as the command line asks, finds what the module names for type checkers only.
vars(importlib.import_module(Elastic.__module__)).update(PodTemplate=PodTemplate, Resources=Resources)

TaskPlugins.register_pythontask_plugin(PyTorch, PyTorchFunctionTask)
TaskPlugins.register_pythontask_plugin(Elastic, PytorchElasticFunctionTask)
route_if_switched_on()
