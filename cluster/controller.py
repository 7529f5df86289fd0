"""The controller: runs rounds on the agents that are there until one succeeds or a budget is spent. In the driver.

It sees every node, so ranks, restarts and the root cause are decided once. What follows from a round it asks
kfpytorch_ray.cluster.policy, who is there kfpytorch_ray.cluster.membership.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from kfpytorch_ray.cluster.causes import failures, root_cause
from kfpytorch_ray.cluster.failures import last_lines, launch_error
from kfpytorch_ray.cluster.limits import Limits, Spent
from kfpytorch_ray.cluster.membership import Loss, Member, Membership
from kfpytorch_ray.cluster.output import shows
from kfpytorch_ray.cluster.policy import Finish, Present, Raise, Reason, Retry, Wait, decide, node_ranks
from kfpytorch_ray.cluster.protocol import AgentSetup
from kfpytorch_ray.cluster.recording import Recorder
from kfpytorch_ray.cluster.rounds import Round
from kfpytorch_ray.errors import LaunchError, NodeLostError, PlacementTimeoutError, explain
from kfpytorch_ray.live.view import Live
from kfpytorch_ray.report.data import Activity
from kfpytorch_ray.results import RoundRecord

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 10.0
"""How often a launch that waits says why."""
REASON_INTERVAL_S = 2.0
"""How often it is looked up why."""
_TICK_S = 1.0
_FIRST_TICK_S, _START_TICK_S = 0.002, 0.05
_START_S = 10.0
"""How long a wait for nodes looks again and again without a pause that is worth the name."""


class Controller:
    """One launch.

    Args:
        membership: Its agents.
        setup: What they were given.
        limits: What bounds it.
        live: Is told where it stands.
        recorder: Is told what happens.
    """

    def __init__(
        self, membership: Membership, setup: AgentSetup, limits: Limits, live: Live, recorder: Recorder
    ) -> None:
        self._live = live
        self._recorder = recorder
        self._membership = membership
        self._setup = setup
        self._limits = limits
        self._spent = Spent()
        self._losses: list[Loss] = []
        self._ranks: dict[int, int] = {}
        self._deadline = math.inf
        self.rounds: tuple[RoundRecord, ...] = ()

    def run(self) -> list[ray.ObjectRef[Any]]:
        """Run rounds until one succeeds.

        Returns:
            A reference to every rank's spooled result, by rank.

        Raises:
            PlacementTimeoutError: The nodes were not there within the join timeout.
            LaunchError: As a budget, the deadline or the kind of failure says.
        """
        try:
            return self._run()
        except RayError as error:
            message = explain(
                f"{self._setup.name}: Ray failed, and the launch with it.",
                " ".join(str(error).split()),
                "Look whether the cluster's head still runs; run the task again when it does.",
            )
            raise NodeLostError(message, time.time(), self.rounds) from error

    def _run(self) -> list[ray.ObjectRef[Any]]:
        self._gather(self._limits.arrival_window_s)
        self._membership.settled = True
        if self._limits.deadline_s is not None:
            self._deadline = time.monotonic() + self._limits.deadline_s
        agents = node_ranks(self._present())
        while True:
            refs = self._run_round(self._crew(agents))
            self._membership.part_with_drained()
            losses = self._take_losses()
            match decide(self.rounds, losses, self._spent, self._limits.budgets, self._present()):
                case Finish():
                    self._recorder.enter(Activity.ENDING)
                    assert refs is not None
                    return refs
                case Retry(agents, spent):
                    self._say_why(spent)
                    self._spend(spent)
                case Wait(spent):
                    self._say_why(spent)
                    self._spend(spent)
                    self._gather(0.0)
                    agents = node_ranks(self._present())
                case Raise(reason, spent):
                    self._spend(spent, reason.value)
                    self._recorder.enter(Activity.ENDING)
                    error = self._failure(reason, spent)
                    raise error from error.__cause__

    def _spend(self, spent: Spent, refused: str = "") -> None:
        """Pay for the round that has ended."""
        self._recorder.decided(spent, refused)
        self._spent = spent

    def _crew(self, agents: Sequence[int]) -> list[Member]:
        by_number = {member.number: member for member in self._membership.ready()}
        crew = [by_number[number] for number in agents]
        self._ranks = {number: node_rank for node_rank, number in enumerate(agents)}
        return crew

    def _present(self) -> Present:
        ready = tuple(member.number for member in self._membership.ready())
        return Present(ready, self._ranks, self._limits.min_nodes, self._limits.max_nodes)

    def _take_losses(self) -> int:
        losses = self._membership.take_losses()
        self._losses += losses
        for loss in losses:
            logger.warning("%s: the agent on %s is lost: %s", self._setup.name, loss.address, loss.reason)
        return sum(loss.charged for loss in losses)

    def _gather(self, window_s: float) -> None:
        """Wait until enough agents are ready, and a while longer for others that are on their way."""
        began = time.monotonic()
        reported = began
        looked, why = began, ""
        enough_since = math.inf
        limits = self._limits
        while True:
            self._membership.refresh(now=True)
            self._membership.part_with_drained()
            now = time.monotonic()
            self._charge(self._take_losses())
            ready = len(self._membership.ready())
            if now - looked >= REASON_INTERVAL_S:
                why, looked = self._membership.waiting(), now
            self._live.nodes(self._membership.placed(), limits.min_nodes, why)
            if ready >= limits.min_nodes:
                enough_since = min(enough_since, now)
                if ready >= limits.max_nodes or not self._membership.starting() or now - enough_since >= window_s:
                    return
            else:
                enough_since = math.inf
                if now >= self._deadline:
                    error = self._failure(Reason.DEADLINE, self._spent)
                    raise error from error.__cause__
                if now - began >= limits.join_timeout_s:
                    raise self._not_enough()
                if now - reported >= REPORT_INTERVAL_S:
                    reported = now
                    logger.warning("%s waits for nodes. %s", self._setup.name, self._membership.waiting())
            self._membership.wait(_pause_s(now - began))

    def _not_enough(self) -> LaunchError | PlacementTimeoutError:
        limits = self._limits
        timeout = f"{limits.join_timeout_s:g} s"
        if not self.rounds:
            return PlacementTimeoutError(
                explain(
                    f"{self._setup.name}: {limits.min_nodes} nodes were not ready within {timeout}.",
                    self._membership.waiting(),
                    "Wait for other work to end, add nodes, ask for less, or raise rdzv_configs['join_timeout'].",
                )
            )
        lost = "; ".join(f"{loss.address}: {loss.reason}" for loss in self._losses) or "a node was drained"
        message = explain(
            f"{self._setup.name}: too few nodes are left, and no replacement came within {timeout}.",
            f"{self._membership.waiting()} Lost: {lost}",
            "Run the task again when there are nodes, ask for a range (nnodes='MIN:MAX') so that it goes on with "
            "fewer, or raise rdzv_configs['join_timeout'].",
        )
        return NodeLostError(message, time.time(), self.rounds)

    def _charge(self, lost: int) -> None:
        self._recorder.spent = self._spent = Spent(self._spent.restarts, self._spent.node_failures + lost)
        if self._spent.node_failures > self._limits.budgets.max_node_failures:
            error = self._failure(Reason.NODE_FAILURES_SPENT, self._spent)
            raise error from error.__cause__

    def _run_round(self, crew: Sequence[Member]) -> list[ray.ObjectRef[Any]] | None:
        index = len(self.rounds)
        running = Round(index, crew, self._spent.restarts, self._deadline, self._membership, self._setup, self._limits)
        # Rounds that were not counted as restarts come on top.
        rounds = 1 + self._limits.budgets.max_restarts + index - self._spent.restarts
        self._live.round(index, rounds, len(crew), len(crew) * self._setup.nproc_per_node)
        self._recorder.enter(None)
        record, refs = running.run()
        self._live.told(running.points)
        record = replace(record, metrics=self._live.metrics.of_round(index))
        self.rounds = (*self.rounds, record)
        self._recorder.round_ended(record, [member.number for member in crew], running.said)
        if lines := last_lines(record, partial(shows, self._setup.logs)):
            self._live.show(lines, True)
        return refs

    def _say_why(self, spent: Spent) -> None:
        ended = self.rounds[-1]
        budgets = self._limits.budgets
        restarts = (spent.restarts, budgets.max_restarts)
        if spent.restarts > self._spent.restarts:
            if not failures(ended):
                logger.warning("%s: %s. Restart %s of %s.", self._setup.name, ended.ending.value, *restarts)
                return
            cause = root_cause(ended)
            logger.warning(
                "%s: rank %s on %s: %s. Restart %s of %s.",
                self._setup.name,
                cause.rank,
                cause.node,
                cause.message,
                *restarts,
            )
        elif spent.node_failures > self._spent.node_failures:
            logger.warning(
                "%s: lost nodes: %s of %s.", self._setup.name, spent.node_failures, budgets.max_node_failures
            )

    def _failure(self, reason: Reason, spent: Spent) -> LaunchError:
        losses = [f"{loss.address}: {loss.reason}" for loss in self._losses]
        return launch_error(self._setup.name, self.rounds, reason, spent, self._limits.budgets, losses)


def _pause_s(waited_s: float) -> float:
    """Until nodes are looked for again: what is free is placed in milliseconds, and seen as soon."""
    return _TICK_S if waited_s > _START_S else min(max(waited_s, _FIRST_TICK_S), _START_TICK_S)
