"""From a job config and the task around it to a LaunchPlan.

Called by the task classes and ``launch()`` after kfpytorch_ray.checks found nothing. Reads the Flyte context and the
task's resources; asks no cluster.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flytekit
from flytekit import Resources
from flytekit.core.context_manager import ExecutionParameters, FlyteContextManager
from flytekit.core.data_persistence import FileAccessProvider
from flytekit.core.resources import ResourceSpec

from kfpytorch_ray.checks import deadline_s, is_elastic, parse_nnodes, worker_count
from kfpytorch_ray.config import DEFAULT_ARRIVAL_WINDOW_S, DEFAULT_TIMEOUT_S, Elastic, PyTorch, RestartPolicy
from kfpytorch_ray.errors import ConfigError
from kfpytorch_ray.plan import Contract, FlyteContext, LaunchPlan, NodeResources
from kfpytorch_ray.task_arguments import TaskArguments

logger = logging.getLogger(__name__)

EXECUTION_VARIABLES: Mapping[str, str] = {
    "FLYTE_INTERNAL_EXECUTION_ID": "name",
    "FLYTE_INTERNAL_EXECUTION_PROJECT": "project",
    "FLYTE_INTERNAL_EXECUTION_DOMAIN": "domain",
}
"""By which flytekit learns, in a new process, what execution it belongs to; and the field of the identifier."""

_launches_of: Counter[str] = Counter()
"""How many launches of this process have kept checkpoints below a task's place for them."""

_RAY_NAMES: Mapping[str, str] = {"cpu": "CPU", "mem": "memory", "gpu": "GPU"}


@dataclass(frozen=True, slots=True)
class Call:
    """What is to be called, and what surrounds it.

    Attributes:
        name: Of the task or function.
        run_id: Of the Flyte execution, else any unique one.
        function: What every rank calls.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        arguments: What stands beside the config in ``@task(...)``; nothing outside a task.
        context: The Flyte context it is called under.
        keeps_checkpoints: Whether workers get a place for checkpoints of this call alone: a folder below the
            context's, or where that has none, below the raw output prefix and named after the run.
    """

    name: str
    run_id: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    context: ExecutionParameters
    arguments: TaskArguments = dataclasses.field(default_factory=TaskArguments)
    keeps_checkpoints: bool = False


def plan_elastic(config: Elastic, call: Call) -> LaunchPlan:
    """The plan of a torch elastic job.

    Raises:
        ConfigError: A resource of the task is not a Kubernetes quantity.
    """
    min_nodes, max_nodes = parse_nnodes(config.nnodes)
    rdzv_configs = config.rdzv_configs
    join_timeout_s = rdzv_configs.get("join_timeout", rdzv_configs.get("timeout", DEFAULT_TIMEOUT_S))
    node, _ = resources_of_nodes(config, call.arguments.resources)
    return LaunchPlan(
        name=call.name,
        run_id=call.run_id,
        function=call.function,
        args=call.args,
        kwargs=call.kwargs,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        nproc_per_node=config.nproc_per_node,
        resources=node,
        flyte=_flyte_context(call, inherited=config.start_method == "fork"),
        environment=dict(call.arguments.environment),
        start_method=config.start_method,
        monitor_interval_s=config.monitor_interval,
        max_restarts=config.max_restarts,
        rdzv_configs=rdzv_configs,
        join_timeout_s=float(join_timeout_s),
        arrival_window_s=float(rdzv_configs.get("last_call_timeout", DEFAULT_ARRIVAL_WINDOW_S)),
        deadline_s=deadline_s(config),
        config=config,
        arguments=call.arguments,
    )


def plan_pytorch(config: PyTorch, call: Call) -> LaunchPlan:
    """The plan of a ``PyTorch`` job: one process per node, node 0 the master.

    Raises:
        ConfigError: A resource of the task or of a replica is not a Kubernetes quantity.
    """
    replicas = worker_count(config)
    worker, master = resources_of_nodes(config, call.arguments.resources)
    return LaunchPlan(
        name=call.name,
        run_id=call.run_id,
        function=call.function,
        args=call.args,
        kwargs=call.kwargs,
        min_nodes=1 + replicas,
        max_nodes=1 + replicas,
        nproc_per_node=1,
        resources=worker,
        first_node_resources=master,
        flyte=_flyte_context(call),
        contract=Contract.OPERATOR,
        environment=dict(call.arguments.environment),
        max_restarts=_restarts_of(config),
        join_timeout_s=float(DEFAULT_TIMEOUT_S),
        deadline_s=deadline_s(config),
        config=config,
        arguments=call.arguments,
    )


def flyte_context_of(context: ExecutionParameters, *, inherited: bool = False) -> FlyteContext:
    """What workers get of a Flyte context.

    Args:
        context: The context of this process.
        inherited: Whether workers are to see this process's execution id, as forked ones do. If not, they learn it
            from this process's environment, as spawned ones do; a platform sets it, a local run does not.
    """
    file_access = FlyteContextManager.current_context().file_access
    checkpoint_dest, checkpoint_src = _checkpoint_of(context)
    identifier = context.execution_id
    if inherited and identifier is not None:
        execution_id = {name: str(getattr(identifier, field)) for name, field in EXECUTION_VARIABLES.items()}
    else:
        execution_id = {name: os.environ[name] for name in EXECUTION_VARIABLES if name in os.environ}
    return FlyteContext(
        raw_output_prefix=context.raw_output_prefix or file_access.raw_output_prefix,
        checkpoint_dest=checkpoint_dest,
        checkpoint_src=checkpoint_src,
        execution_id=execution_id,
    )


def resources_of_nodes(
    config: Elastic | PyTorch, spec: ResourceSpec | None
) -> tuple[NodeResources, NodeResources | None]:
    """Ray resources of a node of a job, and of node 0 where they differ (the master of a ``PyTorch`` job).

    Args:
        config: What the job is.
        spec: Of a node that has none of its own.

    Raises:
        ConfigError: An amount is not a Kubernetes quantity.
    """
    if is_elastic(config):
        return node_resources(spec, workers=config.nproc_per_node), None  # type: ignore[union-attr]
    worker, master = (
        node_resources(_own_resources(replica) or spec, workers=1)
        for replica in (config.worker, config.master)  # type: ignore[union-attr]
    )
    return worker, None if master == worker else master


def node_resources(spec: ResourceSpec | None, *, workers: int) -> NodeResources:
    """Ray resources of one node: for each kind what is requested, else its limit.

    Args:
        spec: Of the task. None outside a task.
        workers: Workers on the node; each gets one CPU where the task says no number.

    Raises:
        ConfigError: An amount is not a Kubernetes quantity.
    """
    amounts: dict[str, float] = {}
    problems = []
    asked = _merged(spec)
    for kind, ray_name in _RAY_NAMES.items():
        if kind not in asked:
            continue
        try:
            amount = amount_of(asked[kind])
            # Ray counts whole bytes.
            amounts[ray_name] = float(math.ceil(amount)) if kind == "mem" else amount
        except (ValueError, ArithmeticError):
            problems.append(f"{kind}={asked[kind]!r}: expected a Kubernetes quantity such as 2, '500m' or '4Gi'")
    if problems:
        raise ConfigError("Resources", tuple(problems))
    amounts.setdefault("CPU", float(workers))
    return NodeResources({name: amount for name, amount in amounts.items() if amount or name == "CPU"})


def warn_of_unreservable(spec: ResourceSpec | None) -> None:
    """Say which resources of a task have no effect on a backend that places nodes itself."""
    storage = _merged(spec).get("ephemeral_storage")
    if storage is not None:
        logger.warning("Ray cannot reserve disk space: ephemeral_storage=%r has no effect.", storage)


def execution_name(context: ExecutionParameters) -> str | None:
    """The name of the Flyte execution; None where there is none."""
    return context.execution_id.name if context.execution_id else None


def current_context() -> ExecutionParameters:
    """The Flyte context of this process, as users see it; flytekit makes a local one outside an execution."""
    return flytekit.current_context()


def _flyte_context(call: Call, *, inherited: bool = False) -> FlyteContext:
    flyte = flyte_context_of(call.context, inherited=inherited)
    prefix = flyte.raw_output_prefix.rstrip("/")
    # Elsewhere the raw outputs are a temporary folder of one machine.
    kept = bool(flyte.execution_id) or FileAccessProvider.is_remote(prefix)
    if not call.keeps_checkpoints:
        return dataclasses.replace(flyte, logs_prefix=f"{prefix}/logs" if kept else "")
    place = flyte.checkpoint_dest
    if not place:
        logs = f"{prefix}/logs/{call.run_id}" if kept else ""
        return dataclasses.replace(flyte, checkpoint_dest=f"{prefix}/checkpoints/{call.run_id}", logs_prefix=logs)
    # A task may launch several times; the next attempt makes the same launches in the same order.
    folder = f"launch-{_launches_of[place]}"
    _launches_of[place] += 1
    before = flyte.checkpoint_src
    return dataclasses.replace(
        flyte,
        checkpoint_dest=f"{place.rstrip('/')}/{folder}",
        checkpoint_src=f"{before.rstrip('/')}/{folder}" if before else None,
        logs_prefix=f"{prefix}/logs/{folder}" if kept else "",
    )


def _merged(spec: ResourceSpec | None) -> dict[str, Any]:
    if spec is None:
        return {}
    asked: dict[str, Any] = {}
    # A pair is (request, limit).
    for resources, position in ((spec.limits, 1), (spec.requests, 0)):
        for field in dataclasses.fields(resources):
            value = getattr(resources, field.name)
            if value is not None:
                asked[field.name] = value[position] if isinstance(value, list | tuple) else value
    return asked


def _own_resources(replica: Any) -> ResourceSpec | None:
    if replica.requests is None and replica.limits is None:
        return None
    return ResourceSpec(requests=replica.requests or Resources(), limits=replica.limits or Resources())


def amount_of(quantity: str | float) -> float:
    """A Kubernetes quantity as a number.

    Raises:
        ValueError: Not a quantity; an ArithmeticError where it is too large to be one.
    """
    if isinstance(quantity, int | float):
        return float(quantity)
    from kubernetes.utils import parse_quantity

    return float(parse_quantity(quantity))


def _restarts_of(config: PyTorch) -> int:
    # By value, because upstream's enums are other classes with the same values.
    policies = {
        replica.restart_policy.value for replica in (config.master, config.worker) if replica.restart_policy is not None
    }
    if policies <= {RestartPolicy.NEVER.value}:
        return 0
    limit = config.run_policy.backoff_limit if config.run_policy else None
    return limit or 0


def _checkpoint_of(context: ExecutionParameters) -> tuple[str | None, str | None]:
    try:
        checkpoint = context.checkpoint
    except NotImplementedError:
        return None, None
    # flytekit offers no public access, and upstream's plugin reads the same two.
    return getattr(checkpoint, "_checkpoint_dest", None), getattr(checkpoint, "_checkpoint_src", None)
