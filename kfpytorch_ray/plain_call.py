"""``launch()``: the way of an elastic task without a Flyte task, for notebooks, scripts and the command line.

The same preflight, plan and adapter as a task; our errors are raised as they are.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast, overload

from flytekit import PythonFunctionTask
from flytekit.core.base_task import Task
from flytekit.core.resources import ResourceSpec

from kfpytorch_ray.checks import is_elastic
from kfpytorch_ray.config import Elastic
from kfpytorch_ray.errors import ConfigError, explain
from kfpytorch_ray.planning import Call, current_context, execution_name, plan_elastic
from kfpytorch_ray.preflight import admit
from kfpytorch_ray.results import ElasticResult
from kfpytorch_ray.run import DetachedAdapter, Run
from kfpytorch_ray.task_arguments import TaskArguments

LOCAL_EXECUTION = "local"
"""What flytekit calls the execution of a process that Flyte did not start."""


@overload
def launch(
    fn: Callable[..., Any], /, *args: Any, elastic: Elastic | None = ..., wait: Literal[True] = ..., **kwargs: Any
) -> ElasticResult: ...


@overload
def launch(
    fn: Callable[..., Any], /, *args: Any, elastic: Elastic | None = ..., wait: Literal[False], **kwargs: Any
) -> Run: ...


def launch(
    fn: Callable[..., Any], /, *args: Any, elastic: Elastic | None = None, wait: bool = True, **kwargs: Any
) -> ElasticResult | Run:
    """Call ``fn(*args, **kwargs)`` in every worker of a torch elastic job and wait for its end.

    Workers have ``flytekit.current_context().checkpoint`` as those of a task do, so that a round after a failure goes
    on from what the round before wrote. Each launch has a place of its own: within a task ``launch-<number>`` below the
    task's, also in a retry of the task; elsewhere ``checkpoints/<run id>`` under flytekit's raw output prefix.

    Args:
        fn: A plain function; for a Flyte task give its ``task_function``.
        *args: Its positional arguments.
        elastic: Nodes, workers, restarts and backend. None: ``Elastic()``, one worker.
        wait: False returns as soon as the run is submitted, for a backend whose runs go on without this process
            (``RayBackend(address="http://...", storage=...)``).
        **kwargs: Its keyword arguments. One that is called ``elastic`` or ``wait`` must be given by position.

    Returns:
        The results by rank: ``result[0].return_value``, ``result.decks``, ``result.rounds``. With ``wait=False`` the
        run: ``run.status()``, ``run.logs(follow=True)``, ``run.cancel()``, ``run.result()``.

    Raises:
        ConfigError: The config cannot work; lists every problem.
        BackendUnavailableError: The backend is unknown or its package is missing.
        PayloadError: The function or an input cannot be pickled.
        ClusterError: A remote cluster cannot be used.
        StorageError: The storage between here and a remote cluster cannot be used.
        PlacementError: The nodes could not be had.
        LaunchError: The workers started and failed.
    """
    return launch_function(fn, args, kwargs, Elastic() if elastic is None else elastic, wait=wait)


def launch_function(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    config: Elastic,
    *,
    wait: bool = True,
    task: PythonFunctionTask[Any] | None = None,
    resources: ResourceSpec | None = None,
) -> ElasticResult | Run:
    """``launch()``, whose arguments no name of a keyword can meet.

    Args:
        fn: As in ``launch``.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        config: Nodes, workers, restarts and backend.
        wait: As in ``launch``.
        task: The Flyte task whose function ``fn`` is: the launch has its name, resources and environment.
        resources: Of a node, in the place of the task's.

    Raises:
        KfpytorchRayError: As ``launch``.
    """
    if not is_elastic(config):
        problem = explain(
            f"elastic=... is no Elastic(...) but of the class {type(config).__name__}.",
            "launch() starts ranks as torchrun does, which only an Elastic describes.",
            "Give elastic=Elastic(nnodes=..., nproc_per_node=...).",
        )
        raise ConfigError("launch", (problem,))
    arguments = _arguments_of(task)
    if resources is not None:
        arguments = replace(arguments, resources=resources)
    job = admit(config, arguments.environment, _function_problems(fn), None if task is None else arguments)
    if not wait and not isinstance(job.adapter, DetachedAdapter):
        problem = explain(
            f"wait=False: the backend {job.choice.name!r} cannot leave a run alone.",
            "Its runs end with this process.",
            "Leave wait=False out, or choose a backend that runs on a cluster.",
        )
        raise ConfigError("launch", (problem,))
    context = current_context()
    execution = execution_name(context)
    run_id = f"launch-{uuid.uuid4().hex[:8]}" if execution in (None, "", LOCAL_EXECUTION) else execution
    call = Call(
        name=task.name if task is not None else getattr(fn, "__qualname__", None) or type(fn).__qualname__,
        run_id=str(run_id),
        function=fn,
        args=args,
        kwargs=kwargs,
        context=context,
        arguments=arguments,
        keeps_checkpoints=True,
    )
    plan = plan_elastic(config, call)
    return job.adapter.run(plan) if wait else cast(DetachedAdapter, job.adapter).start(plan)


def _arguments_of(task: PythonFunctionTask[Any] | None) -> TaskArguments:
    """What stands beside a task's config: whole for our own tasks, what every task has for others."""
    if task is None:
        return TaskArguments()
    if isinstance(own := getattr(task, "arguments", None), TaskArguments):
        return own
    return TaskArguments(resources=task.resources, environment=dict(task.environment or {}))


def _function_problems(fn: Any) -> tuple[str, ...]:
    if isinstance(fn, Task):
        return (f"{fn.name} is a Flyte task, which would launch workers of its own: give its task_function",)
    if not callable(fn):
        return (f"{fn!r} cannot be called: expected a function",)
    return ()
