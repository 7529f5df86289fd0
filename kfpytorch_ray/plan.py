"""The plan: what one launch is to do, as plain data that every backend reads.

Made by the task classes and ``launch()`` (kfpytorch_ray.planning), never changed afterwards. It holds no answer that
only a cluster can give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kfpytorch_ray.config import Elastic, PyTorch
from kfpytorch_ray.task_arguments import TaskArguments


class Contract(Enum):
    """Which environment the workers find."""

    TORCHRUN = "torchrun"
    """RANK, LOCAL_RANK, TORCHELASTIC_* and the rest of what torchrun sets."""
    OPERATOR = "operator"
    """RANK, WORLD_SIZE, MASTER_* and PET_* as Kubeflow's training operator sets them for a ``PyTorch`` job."""


@dataclass(frozen=True, slots=True)
class NodeResources:
    """Ray resources that one node gives to its agent.

    Attributes:
        amounts: Amount by Ray resource name; ``memory`` in bytes.
    """

    amounts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class FlyteContext:
    """The part of the driver's Flyte context that workers get.

    Attributes:
        raw_output_prefix: Where workers write files, folders and dataframes.
        checkpoint_dest: Where this attempt writes checkpoints; None where the platform has none.
        checkpoint_src: Where an earlier attempt left them; None without one.
        execution_id: Variables that name project, domain and execution to flytekit.
        staged_prefix: Where files among the inputs were staged, to be removed with this call; empty if none are.
        logs_prefix: Where what ranks print is kept; empty: nowhere, unless the backend's options say so.
    """

    raw_output_prefix: str
    checkpoint_dest: str | None = None
    checkpoint_src: str | None = None
    execution_id: Mapping[str, str] = field(default_factory=dict)
    staged_prefix: str = ""
    logs_prefix: str = ""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """One launch.

    Attributes:
        name: Of the task or function, for people.
        run_id: TORCHELASTIC_RUN_ID; the Flyte execution's name where there is one.
        function: What every rank calls.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        min_nodes: Fewest nodes to train with.
        max_nodes: Most nodes to train with.
        nproc_per_node: Workers on each node.
        resources: Of one node.
        first_node_resources: Of node 0 where they differ (the master of a ``PyTorch`` job).
        contract: The environment the workers find.
        environment: Variables of the workers.
        start_method: As the user wrote it.
        monitor_interval_s: Longest time between two looks at the workers.
        max_restarts: Restarts of the whole group for failures of ranks.
        rdzv_configs: As the user wrote them.
        join_timeout_s: Longest wait for the nodes.
        arrival_window_s: Longest wait for more nodes of a range that are on their way.
        deadline_s: Longest time for the whole launch; None without one.
        config: What the user wrote, from which all this follows.
        arguments: What the user wrote beside it.
        flyte: The Flyte context of the workers.
    """

    name: str
    run_id: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    min_nodes: int
    max_nodes: int
    nproc_per_node: int
    resources: NodeResources
    flyte: FlyteContext
    config: Elastic | PyTorch = field(default_factory=Elastic)
    arguments: TaskArguments = field(default_factory=TaskArguments)
    first_node_resources: NodeResources | None = None
    contract: Contract = Contract.TORCHRUN
    environment: Mapping[str, str] = field(default_factory=dict)
    start_method: str = "spawn"
    monitor_interval_s: float = 5.0
    max_restarts: int = 0
    rdzv_configs: Mapping[str, Any] = field(default_factory=dict)
    join_timeout_s: float = 900.0
    arrival_window_s: float = 10.0
    deadline_s: float | None = None
