"""One round: every agent runs its workers once, until all have returned or the first reason to stop them.

Failures that agents report wake the driver at once; what has to be looked up (nodes that come, go or hang) it looks up
every second. Whether another round follows is the controller's to decide.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from kfpytorch_ray.cluster.answers import Answers
from kfpytorch_ray.cluster.causes import root_cause
from kfpytorch_ray.cluster.limits import Limits
from kfpytorch_ray.cluster.membership import Member, Membership
from kfpytorch_ray.cluster.protocol import AgentSetup, NodeReport, RoundAssignment, SupervisorLostError
from kfpytorch_ray.errors import LaunchError, explain
from kfpytorch_ray.metrics import MetricPoint
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_WATCH_S = 0.1
"""Shortest time between two looks at all agents: there may be a thousand, and a word from each."""
_STOP_MARGIN_S = 30.0
"""How much longer than the grace an agent may take to stop its workers before it is given up."""
_STORE_WAIT_S = 60.0
"""Longest wait for an agent to open a port."""


class Round:
    """One attempt of the whole worker group.

    Args:
        index: 0 for the first.
        crew: Its agents by node rank.
        restart_count: Restarts so far that counted against ``max_restarts``.
        deadline: Monotonic seconds at which it is stopped; infinite without a deadline.
        membership: All agents of the launch.
        setup: What they were given.
        limits: What bounds the launch.
    """

    def __init__(
        self,
        index: int,
        crew: Sequence[Member],
        restart_count: int,
        deadline: float,
        membership: Membership,
        setup: AgentSetup,
        limits: Limits,
    ) -> None:
        self._index = index
        self._crew = crew
        self._restart_count = restart_count
        self._deadline = deadline
        self._membership = membership
        self._setup = setup
        self._limits = limits
        self._started_at = time.time()
        self._began = time.monotonic()
        self._answers = Answers()
        self._watched_at = -math.inf
        # Node ranks whose workers still run, by the reference to their report; and answers that are still to come.
        self._pending: dict[Any, int] = {}
        self._failing: set[Any] = set()
        self._asked: set[Any] | None = None
        self._returned_unasked: frozenset[int] = frozenset()
        self._listening = False
        self._reports: dict[int, NodeReport] = {}
        self.said: list[NodeReport] = []
        """What agents have said of their ranks so far, also of those whose node was lost later."""
        self.points: tuple[MetricPoint, ...] = ()
        """What rank 0 told last, once the round is over."""
        self._ending = Ending.SUCCEEDED
        self._stop_at = math.inf
        self._stopped_at: float | None = None
        self._newcomers_since = math.inf

    def run(self) -> tuple[RoundRecord, list[ray.ObjectRef[Any]] | None]:
        """Run it to its end.

        Returns:
            What became of every rank; and if all returned, a reference to each one's result, by rank.
        """
        if self._begin():
            while self._pending:
                self._wait()
                if time.monotonic() - self._watched_at >= _WATCH_S:
                    self._watch()
                    self._watched_at = time.monotonic()
                if self._stopped_at is None and time.monotonic() >= self._stop_at:
                    self._stop()
        refs = self._collect() if self._all_returned() else None
        return self._record(), refs

    def _end(self, ending: Ending, stop_at: float = 0.0) -> None:
        """Have the round ended; the first reason counts, the earliest time."""
        if self._ending is Ending.SUCCEEDED:
            self._ending = ending
        self._stop_at = min(self._stop_at, stop_at)

    def _begin(self) -> bool:
        """Give out the round; whether the node of rank 0 was there to open its store."""
        first = self._crew[0]
        opening = first.handle.open_store.remote()
        while not ray.wait([opening], timeout=_TICK_S)[0] and self._membership.has(first):
            self._membership.refresh()
            if time.monotonic() - self._began > _STORE_WAIT_S:
                self._membership.lose(first, f"it did not open its store within {_STORE_WAIT_S:g} s")
        port = self._answer(first, opening) if self._membership.has(first) else None
        if port is None:
            self._end(Ending.NODE_LOST)
            self._reports = {
                node_rank: self._lost(node_rank) if node_rank == 0 else self._not_started(node_rank)
                for node_rank in range(len(self._crew))
            }
            return False
        for node_rank, member in enumerate(self._crew):
            assignment = RoundAssignment(
                round_index=self._index,
                restart_count=self._restart_count,
                node_rank=node_rank,
                node_count=len(self._crew),
                master_address=first.address,
                master_port=port,
            )
            self._pending[self._expect(member.handle.run_round.remote(assignment))] = node_rank
            self._failing.add(self._expect(member.handle.wait_for_failure.remote(self._setup.launch_id, self._index)))
        return True

    def _wait(self) -> None:
        """Take in what agents say, at once, or nothing after a while."""
        now = time.monotonic()
        timeout_s = _TICK_S if self._stopped_at is not None else max(0.0, min(_TICK_S, self._stop_at - now))
        for ref in self._answers.take(timeout_s):
            if ref in self._pending:
                self._take_report(ref)
            elif ref in self._failing:
                self._failing.remove(ref)
                if _says_yes(ref):
                    self._fail()
            elif self._asked is not None and ref in self._asked:
                self._asked.remove(ref)
                self._listening |= _says_yes(ref)
                if not self._asked and not self._listening:
                    self._stop_at = 0.0

    def _expect(self, ref: Any) -> Any:
        self._answers.expect(ref)
        return ref

    def _take_report(self, finished: Any) -> None:
        node_rank = self._pending.pop(finished)
        member = self._crew[node_rank]
        report: NodeReport | None = self._answer(member, finished)
        if report is None:
            self._reports[node_rank] = self._lost(node_rank)
            self._end(Ending.NODE_LOST)
            return
        self._reports[node_rank] = report
        self.said.append(report)
        self.points = report.points or self.points
        if {rank.outcome for rank in report.ranks} - {Outcome.SUCCEEDED, Outcome.STOPPED}:
            self._fail()
        elif self._asked is None and any(rank.outcome is Outcome.STOPPED for rank in report.ranks):
            self._end(Ending.FAILED)

    def _fail(self) -> None:
        """A rank has failed: the others are stopped at once, or where they are leaving anyway after the grace."""
        if self._asked is None:
            self._end(Ending.FAILED)
        else:
            self._stop_at = min(self._stop_at, time.monotonic() + self._setup.stop_grace_s)

    def _answer(self, member: Member, ref: Any) -> Any:
        """What an agent has answered; None if it is gone, whatever Ray calls that.

        Raises:
            LaunchError: The agent itself has failed.
        """
        try:
            return ray.get(ref)
        except SupervisorLostError:
            self._membership.lose(member, "its supervisor process died")
        except RayTaskError as error:
            raise self._agent_failed(member, error) from error
        except RayError as error:
            self._membership.lose(member, error)
        return None

    def _watch(self) -> None:
        """Look at what does not wake this process: nodes that come and go, silence, hangs, the deadline."""
        self._membership.refresh()
        now = time.monotonic()
        for ref, node_rank in [*self._pending.items()]:
            member = self._crew[node_rank]
            if self._stopped_at is not None and now - self._stopped_at > self._setup.stop_grace_s + _STOP_MARGIN_S:
                self._membership.lose(member, "it did not stop its workers in time")
            if not self._membership.has(member):
                del self._pending[ref]
                self._reports[node_rank] = self._lost(node_rank)
                self._end(Ending.NODE_LOST)
        if self._stop_at < math.inf:
            return
        if now >= self._deadline:
            self._end(Ending.DEADLINE)
        elif self._hangs():
            self._end(Ending.HUNG)
        elif (leaving := self._drains()) is not None:
            self._ask_to_stop(Ending.DRAINED, min(self._limits.checkpoint_grace_s, leaving))
        elif self._grows():
            self._ask_to_stop(Ending.GROWN, self._limits.checkpoint_grace_s)

    def _hangs(self) -> bool:
        timeout_s = self._limits.hang_timeout_s
        if timeout_s is None or time.monotonic() - self._began < timeout_s:
            return False
        pulses = [self._membership.pulse_of(self._crew[node_rank]) for node_rank in self._pending.values()]
        return all(
            pulse is not None and pulse.round_index == self._index and pulse.idle_s >= timeout_s for pulse in pulses
        )

    def _drains(self) -> float | None:
        """Seconds that are left until a node of this round is taken away; None if none is about to be."""
        ends = [end for member in self._crew if (end := self._membership.drained_at(member)) is not None]
        return max(0.0, min(ends) - time.time() - self._setup.stop_grace_s) if ends else None

    def _grows(self) -> bool:
        now = time.monotonic()
        # A round in which ranks have returned is about to end by itself.
        if self._reports or len(self._crew) >= min(len(self._membership.ready()), self._limits.max_nodes):
            self._newcomers_since = math.inf
            return False
        self._newcomers_since = min(self._newcomers_since, now)
        others_come = self._membership.starting() and now - self._newcomers_since < self._limits.arrival_window_s
        return now - self._began >= self._limits.grow_cooldown_s and not others_come

    def _ask_to_stop(self, ending: Ending, grace_s: float) -> None:
        logger.info("%s: round %s ends because %s.", self._setup.name, self._index, ending.value)
        self._end(ending, time.monotonic() + grace_s)
        self._returned_unasked = frozenset(self._reports)
        self._asked = {
            self._expect(member.handle.request_stop.remote(self._setup.launch_id, self._index)) for member in self._crew
        }

    def _stop(self) -> None:
        self._stopped_at = time.monotonic()
        for member in self._crew:
            if self._membership.has(member):
                member.handle.stop_round.remote(self._setup.launch_id, self._index, self._ending is Ending.HUNG)

    def _all_returned(self) -> bool:
        return len(self._reports) == len(self._crew) and all(
            rank.outcome is Outcome.SUCCEEDED for report in self._reports.values() for rank in report.ranks
        )

    def _collect(self) -> list[ray.ObjectRef[Any]] | None:
        """References to the results, once they are stored; None if a node is lost before that."""
        nproc = self._setup.nproc_per_node
        stored: dict[Any, int] = {}
        refs: list[ray.ObjectRef[Any]] = []
        for node_rank, member in enumerate(self._crew):
            done, *results = member.handle.collect.options(num_returns=nproc + 1).remote()
            stored[self._expect(done)] = node_rank
            refs += results
        while stored:
            # Owned by this process from now on: they outlive the agents. Only the word that it is done is fetched.
            for ref in self._answers.take(_TICK_S):
                # Of the round itself some may come late.
                if ref in stored and self._answer(self._crew[node_rank := stored.pop(ref)], ref) is None:
                    self._reports[node_rank] = self._lost(node_rank)
            if time.monotonic() - self._watched_at < _WATCH_S:
                continue
            self._watched_at = time.monotonic()
            self._membership.refresh()
            for ref, node_rank in [*stored.items()]:
                if not self._membership.has(self._crew[node_rank]):
                    del stored[ref]
                    self._reports[node_rank] = self._lost(node_rank)
        if self._all_returned():
            return refs
        self._end(Ending.NODE_LOST)
        return None

    def _record(self) -> RoundRecord:
        ranks = self._ranks()
        if all(rank.outcome is Outcome.SUCCEEDED for rank in ranks):
            # Whatever was about to end it, it was over before.
            self._ending = Ending.SUCCEEDED
        record = RoundRecord(
            index=self._index,
            world_size=len(self._crew) * self._setup.nproc_per_node,
            nodes=tuple(member.address for member in self._crew),
            started_at=self._started_at,
            ended_at=time.time(),
            ranks=ranks,
            ending=self._ending,
        )
        # Ranks that miss a peer say so before Ray says that its node is gone.
        lost = any(rank.outcome is Outcome.LOST for rank in ranks)
        if record.ending is Ending.FAILED and lost and root_cause(record).outcome is Outcome.LOST:
            record = replace(record, ending=Ending.NODE_LOST)
        return record

    def _ranks(self) -> tuple[RankRecord, ...]:
        ranks = tuple(rank for _, report in sorted(self._reports.items()) for rank in report.ranks)
        if self._asked is None or all(rank.outcome is not Outcome.STOPPED for rank in ranks):
            return ranks
        # Ranks agree on leaving: one that never asked, or asked a moment too early, has left with those that were told.
        return tuple(
            replace(rank, outcome=Outcome.STOPPED, message="left with the ranks that were asked to stop")
            if rank.outcome is Outcome.SUCCEEDED and rank.node_rank not in self._returned_unasked
            else rank
            for rank in ranks
        )

    def _lost(self, node_rank: int) -> NodeReport:
        reason = self._crew[node_rank].lost_because
        return self._report_of_all(node_rank, Outcome.LOST, f"lost with its node: {reason}")

    def _not_started(self, node_rank: int) -> NodeReport:
        return self._report_of_all(node_rank, Outcome.STOPPED, "stopped before it started")

    def _report_of_all(self, node_rank: int, outcome: Outcome, message: str) -> NodeReport:
        nproc = self._setup.nproc_per_node
        now = time.time()
        return NodeReport(
            node_rank,
            tuple(
                RankRecord(
                    rank=node_rank * nproc + local_rank,
                    local_rank=local_rank,
                    node_rank=node_rank,
                    node=self._crew[node_rank].address,
                    outcome=outcome,
                    exit_code=None,
                    timestamp=now,
                    message=message,
                )
                for local_rank in range(nproc)
            ),
        )

    def _agent_failed(self, member: Member, error: Exception) -> LaunchError:
        message = explain(
            f"{self._setup.name}: the agent on {member.address} failed.",
            str(error),
            "This is most likely a bug of kfpytorch_ray: please report it with this message.",
        )
        return LaunchError(message, time.time())


def _says_yes(ref: Any) -> bool:
    """An agent's answer; of one that is gone, the answer that ends its round says so."""
    try:
        return bool(ray.get(ref))
    except RayError:
        return False
