"""The controller: runs rounds on all agents until one succeeds or the budget is spent. Lives in the driver.

It sees every node, so ranks, restarts and the root cause are decided once. It obeys kfpytorch_ray.cluster.policy and
knows agents as Ray actor handles only; no interval and no polling is in it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kfpytorch_ray.cluster.agent import ElasticAgent
from kfpytorch_ray.cluster.failures import launch_error
from kfpytorch_ray.cluster.placement import Place
from kfpytorch_ray.cluster.policy import Decision, decide, root_cause
from kfpytorch_ray.cluster.protocol import AgentSetup, NodeReport, RoundAssignment, SupervisorLostError
from kfpytorch_ray.errors import DeadlineExceededError, LaunchError, NodeLostError, explain
from kfpytorch_ray.results import Outcome, RankRecord, RoundRecord

logger = logging.getLogger(__name__)

_AGENT_THREADS = 8
"""Calls that an agent answers at once: the round, the wait for its failure, and beside them stop and shutdown."""
_END_WAIT_S = 30.0
"""Longest wait for an agent to stop its workers and remove its files, beyond the grace."""


@contextlib.contextmanager
def agents_on(places: Sequence[Place], setup: AgentSetup, payload: bytes, timeout_s: float) -> Iterator[list[Any]]:
    """Start one agent on each place, warm and with the payload; they and their workers end with the context.

    Raises:
        LaunchError: An agent did not start.
    """
    handles: list[Any] = []
    try:
        handles += [_start_agent(place, setup) for place in places]
        shared = ray.put(payload)
        try:
            ray.get([handle.load.remote(shared) for handle in handles], timeout=timeout_s)
        except (RayError, GetTimeoutError) as error:
            raise _start_failed(error, setup.name) from error
        yield handles
    finally:
        _end(handles, setup.stop_grace_s)


class Controller:
    """One launch on a fixed set of agents.

    Args:
        agents: Handles by node rank.
        places: Where they are.
        setup: What they were given.
        deadline_s: Longest time for all rounds; None without one.
    """

    def __init__(
        self, agents: Sequence[Any], places: Sequence[Place], setup: AgentSetup, deadline_s: float | None
    ) -> None:
        self._agents = agents
        self._places = places
        self._setup = setup
        self._deadline_s = deadline_s
        self._deadline = None if deadline_s is None else time.monotonic() + deadline_s
        self.rounds: tuple[RoundRecord, ...] = ()

    def run(self) -> list[ray.ObjectRef[Any]]:
        """Run rounds until one succeeds.

        Returns:
            A reference to every rank's spooled result, by rank.

        Raises:
            LaunchError: As the budget, the deadline or the kind of failure says.
        """
        restarts = 0
        while True:
            ended = self._run_round(len(self.rounds), restarts)
            self.rounds = (*self.rounds, ended)
            if self._seconds_left() == 0 and not ended.succeeded:
                raise self._deadline_passed()
            match decide(ended, restarts, self._setup.max_restarts):
                case Decision.FINISH:
                    return self._collect()
                case Decision.RESTART:
                    restarts += 1
                    cause = root_cause(ended)
                    logger.warning(
                        "%s: rank %s on %s: %s. Restart %s of %s.",
                        self._setup.name,
                        cause.rank,
                        cause.node,
                        cause.message,
                        restarts,
                        self._setup.max_restarts,
                    )
                case Decision.RAISE:
                    error = launch_error(self._setup.name, self.rounds, self._setup.max_restarts)
                    raise error from error.__cause__

    def _run_round(self, index: int, restarts: int) -> RoundRecord:
        started_at = time.time()
        try:
            port = ray.get(self._agents[0].open_store.remote())
        except (RayActorError, SupervisorLostError) as error:
            raise self._lost_between_rounds(0) from error
        except RayTaskError as error:
            raise self._agent_failed(0, error) from error
        pending = {
            agent.run_round.remote(
                RoundAssignment(
                    round_index=index,
                    restart_count=restarts,
                    node_rank=node_rank,
                    node_count=len(self._agents),
                    master_address=self._places[0].address,
                    master_port=port,
                )
            ): node_rank
            for node_rank, agent in enumerate(self._agents)
        }
        failing = {agent.wait_for_failure.remote(index) for agent in self._agents}
        reports: dict[int, NodeReport] = {}
        stopped = False
        while pending:
            timeout_s = None if stopped else self._seconds_left()
            (*ready,), _ = ray.wait([*pending, *failing], num_returns=1, timeout=timeout_s)
            failed = not ready
            for ref in ready:
                if ref in failing:
                    failing.remove(ref)
                    failed = self._saw_failure(ref)
                else:
                    node_rank = pending.pop(ref)
                    reports[node_rank] = self._report(ref, node_rank)
                    failed = any(rank.outcome is not Outcome.SUCCEEDED for rank in reports[node_rank].ranks)
            if failed and not stopped:
                stopped = True
                for agent in self._agents:
                    agent.stop_round.remote(index)
        return RoundRecord(
            index=index,
            world_size=len(self._agents) * self._setup.nproc_per_node,
            nodes=tuple(place.address for place in self._places),
            started_at=started_at,
            ended_at=time.time(),
            ranks=tuple(rank for node_rank in sorted(reports) for rank in reports[node_rank].ranks),
        )

    def _report(self, finished: Any, node_rank: int) -> NodeReport:
        try:
            report: NodeReport = ray.get(finished)
        except RayActorError as error:
            return self._lost(node_rank, str(error))
        except SupervisorLostError:
            return self._lost(node_rank, "its supervisor process died")
        except RayTaskError as error:
            raise self._agent_failed(node_rank, error) from error
        return report

    def _saw_failure(self, answered: Any) -> bool:
        try:
            return bool(ray.get(answered))
        except RayError:
            # The agent's report says so, too.
            return True

    def _agent_failed(self, node_rank: int, error: Exception) -> LaunchError:
        message = explain(
            f"{self._setup.name}: the agent on node {node_rank} ({self._places[node_rank].address}) failed.",
            str(error),
            "This is most likely a bug of kfpytorch_ray: please report it with this message.",
        )
        return LaunchError(message, time.time(), self.rounds)

    def _lost(self, node_rank: int, reason: str) -> NodeReport:
        now = time.time()
        nproc = self._setup.nproc_per_node
        return NodeReport(
            node_rank,
            tuple(
                RankRecord(
                    rank=node_rank * nproc + local_rank,
                    local_rank=local_rank,
                    node_rank=node_rank,
                    node=self._places[node_rank].address,
                    outcome=Outcome.LOST,
                    exit_code=None,
                    timestamp=now,
                    message=f"lost with its node: {reason}",
                )
                for local_rank in range(nproc)
            ),
        )

    def _lost_between_rounds(self, node_rank: int) -> NodeLostError:
        message = explain(
            f"{self._setup.name}: the agent on node {node_rank} ({self._places[node_rank].address}) died.",
            "It was lost between two rounds.",
            "Run the task again; give it retries, because lost nodes are not replaced within a launch.",
        )
        return NodeLostError(message, time.time(), self.rounds)

    def _collect(self) -> list[ray.ObjectRef[Any]]:
        nproc = self._setup.nproc_per_node
        refs: list[ray.ObjectRef[Any]] = []
        for agent in self._agents:
            returned = agent.collect.options(num_returns=nproc).remote()
            refs += returned if isinstance(returned, list) else [returned]
        # Owned by this process from now on: they outlive the agents. Waits until they are stored, fetches nothing.
        ray.wait(refs, num_returns=len(refs), fetch_local=False)
        return refs

    def _seconds_left(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _deadline_passed(self) -> DeadlineExceededError:
        message = explain(
            f"{self._setup.name} did not end within {self._deadline_s:g} s; all its workers were stopped.",
            "RunPolicy(active_deadline_seconds=...) bounds the launch from its first round on.",
            "Raise the deadline, or make the work shorter.",
        )
        return DeadlineExceededError(message, time.time(), self.rounds)


def _start_agent(place: Place, setup: AgentSetup) -> Any:
    amounts = dict(place.resources)
    actor = ray.remote(ElasticAgent).options(
        num_cpus=amounts.pop("CPU", 0),
        num_gpus=amounts.pop("GPU", 0),
        memory=amounts.pop("memory", None),
        resources=amounts,
        max_concurrency=_AGENT_THREADS,
        scheduling_strategy=PlacementGroupSchedulingStrategy(place.group, place.index),
    )
    return actor.remote(setup, place.address)


def _start_failed(error: Exception, name: str) -> LaunchError:
    message = explain(
        f"{name}: an agent did not start.",
        str(error),
        "Check that every node has the same versions of Python, ray, torch, flytekit and kfpytorch_ray as the driver.",
    )
    if isinstance(error, RayActorError | GetTimeoutError):
        return NodeLostError(message, time.time())
    return LaunchError(message, time.time())


def _end(agents: Sequence[Any], stop_grace_s: float) -> None:
    """Stop all workers and end the agents; a second interrupt still kills them."""
    try:
        if endings := [agent.shutdown.remote() for agent in agents]:
            ray.wait(endings, num_returns=len(endings), timeout=stop_grace_s + _END_WAIT_S)
    finally:
        for agent in agents:
            # Its fork server notices the end of the agent, kills what is left and removes the files.
            with contextlib.suppress(RayError):
                ray.kill(agent)
