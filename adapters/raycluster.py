"""The ray backend: a plan becomes agents on a Ray that this process can join, and a controller beside them.

Lives in the driver, which is the task's own process. Under Flyte that is an ordinary pod, so the task is serialised as
a plain Python task; which Ray it joins is kfpytorch_ray.cluster.connect's question.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kfpytorch_ray.adapters import ray_findings
from kfpytorch_ray.adapters.job_message import job_message
from kfpytorch_ray.backends import Findings, JobConfig, require_package
from kfpytorch_ray.config import RayBackend
from kfpytorch_ray.payload import dump_payload, import_root
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.results import ElasticResult

if TYPE_CHECKING:
    from kfpytorch_ray.cluster.placement import Place
    from kfpytorch_ray.cluster.protocol import AgentSetup

INSTALL = "pip install 'ray[default]'"


@dataclass(frozen=True, slots=True)
class RayRequest:
    """What a launch asks of Ray.

    Attributes:
        setup: What every agent is given.
        first: Resources of node 0.
        other: Resources of every other node.
        payload: The pickled call.
    """

    setup: AgentSetup
    first: Mapping[str, float]
    other: Mapping[str, float]
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

    def launches(self, config: JobConfig) -> bool:
        """Always: this process is the driver, never a worker."""
        return True

    def build(self, plan: LaunchPlan) -> RayRequest:
        """Everything that a launch needs but a Ray.

        Raises:
            PayloadError: The function or an input cannot be pickled.
        """
        from kfpytorch_ray.cluster.environment import launch_environment
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
                upload_files=False,
                max_restarts=plan.max_restarts,
                monitor_interval_s=plan.monitor_interval_s,
                stop_grace_s=options.stop_grace_s,
            ),
            first=first,
            other=resources,
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
        from kfpytorch_ray.cluster.controller import Controller, agents_on
        from kfpytorch_ray.cluster.fetching import Fetcher
        from kfpytorch_ray.cluster.placement import Demand, reserved

        request = self.build(plan)
        timeout_s = plan.join_timeout_s
        demand = Demand(request.first, request.other, plan.min_nodes, plan.max_nodes)
        with (
            connected(self._options, demand.total(plan.max_nodes)) as private,
            reserved(
                demand, private=private, autoscaling=self._options.autoscaling, timeout_s=timeout_s, name=plan.name
            ) as places,
            agents_on(places, setup := _placed(request.setup, places, private), request.payload, timeout_s) as agents,
        ):
            controller = Controller(agents, places, setup, plan.deadline_s)
            refs = controller.run()
        return ElasticResult(tuple(range(len(refs))), Fetcher(refs), controller.rounds)


def _search_path(function: Callable[..., Any]) -> tuple[str, ...]:
    root = import_root(function)
    return tuple(dict.fromkeys(os.path.abspath(path) for path in (*sys.path, *([root] if root else []))))


def _placed(setup: AgentSetup, places: Sequence[Place], private: bool) -> AgentSetup:
    """What follows from where the nodes are."""
    from kfpytorch_ray.cluster.environment import one_thread_each
    from kfpytorch_ray.cluster.placement import driver_address

    # On a Ray of our own all nodes share this machine's cores.
    workers = setup.nproc_per_node * (len(places) if private else 1)
    return replace(
        setup,
        environment=one_thread_each(setup.environment, workers),
        # Elsewhere it is the folder that Ray unpacked, or the node's own.
        working_directory=os.getcwd() if private else "",
        upload_files=places[0].address != driver_address(),
    )
