"""The ray backend: a plan becomes agents on a Ray that this process can join, and a controller beside them.

Lives in the driver, which is the task's own process. Under Flyte that is an ordinary pod, so the task is serialised as
a plain Python task; which Ray it joins is kfpytorch_ray.cluster.connect's question.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.adapters import ray_findings
from kfpytorch_ray.adapters.job_message import job_message
from kfpytorch_ray.backends import Findings, JobConfig, require_package
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.payload import dump_payload, import_root
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.pods import TaskArguments
from kfpytorch_ray.results import ElasticResult

if TYPE_CHECKING:
    from kfpytorch_ray.cluster.demand import Demand
    from kfpytorch_ray.cluster.limits import Limits
    from kfpytorch_ray.cluster.protocol import AgentSetup

INSTALL = "pip install 'ray[default]'"


@dataclass(frozen=True, slots=True)
class RayRequest:
    """What a launch asks of Ray.

    Attributes:
        setup: What every agent is given.
        demand: The nodes.
        limits: What bounds it.
        payload: The pickled call.
    """

    setup: AgentSetup
    demand: Demand
    limits: Limits
    payload: bytes


class RayAdapter:
    """Runs plans on Ray. See ``RayBackend`` for the options."""

    def __init__(self, options: RayBackend | None) -> None:
        self._options = options or RayBackend()

    def check(self, config: JobConfig) -> Findings:
        """Name the fields that Ray cannot honour."""
        return ray_findings.find(config, self._options)

    def task_type(self, config: JobConfig) -> str:
        """A plain pod: it is the driver."""
        return "python-task"

    def custom(self, config: JobConfig) -> dict[str, Any] | None:
        """The job as upstream describes it, for the record: Flyte runs a plain pod and does not read it."""
        return job_message(config)

    def lost(self, config: JobConfig, arguments: TaskArguments) -> tuple[str, ...]:
        """Every field that does not arrive, and why."""
        return ray_findings.lost(config, self._options, arguments)

    def flyte_manifests(self, template: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
        """The Pod that Flyte makes of a task template: the driver's."""
        from kfpytorch_ray.cluster.kube.flyte_execution import FlyteExecution
        from kfpytorch_ray.cluster.kube.flyte_pod import pod_manifest

        return (pod_manifest(template, FlyteExecution()),)

    def launches(self, config: JobConfig) -> bool:
        """Always: this process is the driver, never a worker."""
        return True

    def build(self, plan: LaunchPlan) -> RayRequest:
        """Everything that a launch needs but a Ray.

        Raises:
            PayloadError: The function or an input cannot be pickled.
        """
        from kfpytorch_ray.cluster.demand import Demand
        from kfpytorch_ray.cluster.environment import launch_environment
        from kfpytorch_ray.cluster.limits import Budgets, Limits
        from kfpytorch_ray.cluster.protocol import AgentSetup

        options = self._options
        resources = plan.resources.amounts
        first = resources if plan.first_node_resources is None else plan.first_node_resources.amounts
        if options.resources_per_node is not None:
            first = resources = options.resources_per_node
        payload = dump_payload(plan.function, plan.args, plan.kwargs)
        return RayRequest(
            setup=AgentSetup(
                name=plan.name,
                run_id=plan.run_id,
                nproc_per_node=plan.nproc_per_node,
                contract=plan.contract,
                environment=launch_environment(os.environ, plan, options),
                sys_path=_search_path(plan.function),
                working_directory="",
                preload=tuple(options.preload),
                flyte=plan.flyte,
                payload_sha256=hashlib.sha256(payload).hexdigest(),
                driver_address="",
                max_restarts=plan.max_restarts,
                monitor_interval_s=plan.monitor_interval_s,
                stop_grace_s=options.stop_grace_s,
                silence_timeout_s=options.silence_timeout_s,
            ),
            demand=Demand(first, resources, plan.min_nodes, plan.max_nodes),
            limits=Limits(
                min_nodes=plan.min_nodes,
                max_nodes=plan.max_nodes,
                budgets=Budgets(plan.max_restarts, options.max_node_failures),
                join_timeout_s=plan.join_timeout_s,
                arrival_window_s=plan.arrival_window_s,
                deadline_s=plan.deadline_s,
                checkpoint_grace_s=options.checkpoint_grace_s,
                grow_cooldown_s=options.grow_cooldown_s,
                hang_timeout_s=options.hang_timeout_s,
            ),
            payload=payload,
        )

    def run(self, plan: LaunchPlan) -> ElasticResult:
        """Run the plan on Ray.

        Raises:
            BackendUnavailableError: Ray is not installed.
            PayloadError: The function or an input cannot be pickled.
            PlacementError: The nodes cannot be had.
            LaunchError: A rank or a node failed.
        """
        require_package("ray", "ray", INSTALL)
        from kfpytorch_ray.cluster.connect import connected
        from kfpytorch_ray.cluster.controller import Controller
        from kfpytorch_ray.cluster.fetching import Fetcher
        from kfpytorch_ray.cluster.membership import agents_on
        from kfpytorch_ray.cluster.placement import reserved

        request = self.build(plan)
        demand = request.demand
        with (
            connected(self._options, demand.total(plan.max_nodes)) as private,
            reserved(demand, private=private, autoscaling=self._options.autoscaling) as reservation,
            agents_on(reservation, setup := _joined(request, private), request.payload, plan.min_nodes) as membership,
        ):
            controller = Controller(membership, setup, request.limits)
            refs = controller.run()
        return ElasticResult(tuple(range(len(refs))), Fetcher(refs), controller.rounds)


def _search_path(function: Callable[..., Any]) -> tuple[str, ...]:
    root = import_root(function)
    return tuple(dict.fromkeys(os.path.abspath(path) for path in (*sys.path, *([root] if root else []))))


def _joined(request: RayRequest, private: bool) -> AgentSetup:
    """What follows from which Ray it is."""
    from kfpytorch_ray.cluster.environment import one_thread_each
    from kfpytorch_ray.cluster.placement import driver_address

    setup = request.setup
    # On a Ray of our own all nodes share this machine's cores.
    workers = setup.nproc_per_node * (request.demand.max_nodes if private else 1)
    return replace(
        setup,
        environment=one_thread_each(setup.environment, workers),
        # Elsewhere it is the folder that Ray unpacked, or the node's own.
        working_directory=os.getcwd() if private else "",
        driver_address=driver_address(),
    )
