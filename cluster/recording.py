"""What happens in a launch, written down as it happens: the driver's part of a report.

The machinery tells, and is never asked or held up by it. Samples come from the thread that takes the pulse, everything
else from the driver's own.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from statistics import fmean

from kfpytorch_ray.cluster.causes import failures, root_cause
from kfpytorch_ray.cluster.limits import Budgets, Spent
from kfpytorch_ray.cluster.protocol import NodeReport
from kfpytorch_ray.cluster.sampling import RankSample, installed_versions
from kfpytorch_ray.metrics import MetricPoint
from kfpytorch_ray.report.data import (
    Activity,
    Budget,
    Failure,
    Metric,
    NodeFacts,
    Phase,
    RankDeck,
    RankSamples,
    ReportedNode,
    ReportedRank,
    ReportedRound,
    RunReport,
    Sample,
)
from kfpytorch_ray.results import RankRecord, RoundRecord

MOST_SAMPLES = 160
"""Of one rank in all rounds; at twice as many, two neighbours become one."""


class Recorder:
    """Writes down one launch.

    Args:
        name: Of the task or function.
        run_id: Of the launch.
        backend: That runs it.
        budgets: What it may spend.
    """

    def __init__(self, name: str, run_id: str, backend: str, budgets: Budgets) -> None:
        self._plain = RunReport(name, run_id, backend, time.time(), 0.0)
        self._budgets = budgets
        self._phases: list[Phase] = []
        self._phase: tuple[Activity, float] | None = (Activity.JOINING, self._plain.started_at)
        self._nodes: dict[int, ReportedNode] = {}
        self._rounds: list[ReportedRound] = []
        self._decks: tuple[RankDeck, ...] = ()
        self._curves: dict[int, _Curve] = defaultdict(_Curve)
        self._sampling = threading.Lock()
        self.spent = Spent()
        """What the launch has spent so far."""

    def enter(self, activity: Activity | None) -> None:
        """Something else begins now; None for a round, which tells of itself when it has ended."""
        now = time.time()
        if self._phase is not None:
            if self._phase[0] is activity:
                return
            self._phases.append(Phase(self._phase[0], self._phase[1], now))
        self._phase = None if activity is None else (activity, now)

    def agent_started(self, number: int, address: str, resources: Mapping[str, float]) -> None:
        """An agent was started where a node is reserved."""
        if self._phase is not None and self._phase[0] is Activity.PLACING:
            self.enter(Activity.AGENTS)
        reserved = tuple((name, float(amount)) for name, amount in sorted(resources.items()))
        self._nodes[number] = ReportedNode(number, address, time.time(), resources=reserved)

    def agent_ready(self, number: int, facts: NodeFacts | None) -> None:
        """It can take part, and has said what its node is."""
        self._nodes[number] = replace(self._nodes[number], ready_at=time.time(), facts=facts)

    def agent_gone(self, number: int, reason: str = "") -> None:
        """It takes part in nothing any more; ``reason`` if it was lost."""
        node = self._nodes[number]
        if node.ended_at is None or reason:
            self._nodes[number] = replace(node, ended_at=time.time(), lost_because=reason)

    def sampled(self, samples: Iterable[RankSample]) -> None:
        """What ranks used."""
        with self._sampling:
            for rank, sample in samples:
                self._curves[rank].add(sample)

    def round_ended(self, record: RoundRecord, agents: Sequence[int], reports: Iterable[NodeReport]) -> None:
        """A round is over.

        Args:
            record: What became of it.
            agents: Its agents, by node rank.
            reports: What they have said.
        """
        said = list(reports)
        self.sampled(sample for report in said for sample in report.samples)
        decks = [deck for report in said for deck in report.decks]
        self._decks = tuple(sorted(decks, key=lambda deck: deck.rank))
        self._rounds.append(reported_round(record, dict(enumerate(agents))))
        self.enter(Activity.WAITING)

    def decided(self, after: Spent, refused: str = "") -> None:
        """What follows from the last round was decided.

        Args:
            after: What the launch has spent by then.
            refused: Why there is no other round; empty where there is one, or the launch has succeeded.
        """
        restarts = after.restarts - self.spent.restarts
        lost = after.node_failures - self.spent.node_failures
        paid = []
        if restarts:
            paid.append(f"max_restarts: {after.restarts} of {self._budgets.max_restarts}")
        if lost:
            paid.append(f"max_node_failures: {after.node_failures} of {self._budgets.max_node_failures}")
        if refused:
            paid.append(f"not tried again: {refused}")
        self.spent = after
        self._rounds[-1] = replace(self._rounds[-1], paid="; ".join(paid))

    def logs_kept(self, rounds: Sequence[RoundRecord]) -> None:
        """What ranks printed was kept where these records of the same rounds say."""
        for index, (told, record) in enumerate(zip(self._rounds, rounds, strict=False)):
            ranks = tuple(replace(one, logs=rank.logs) for one, rank in zip(told.ranks, record.ranks, strict=True))
            self._rounds[index] = replace(told, ranks=ranks)

    def report(self, error: Exception | None = None) -> RunReport:
        """What has happened so far; ``error`` is why the launch failed."""
        self.enter(None)
        with self._sampling:
            samples = tuple(RankSamples(rank, curve.points()) for rank, curve in sorted(self._curves.items()))
        return replace(
            self._plain,
            ended_at=time.time(),
            nodes=tuple(node for _, node in sorted(self._nodes.items())),
            phases=tuple(self._phases),
            rounds=tuple(self._rounds),
            samples=samples,
            budgets=(
                Budget("max_restarts", self.spent.restarts, self._budgets.max_restarts),
                Budget("max_node_failures", self.spent.node_failures, self._budgets.max_node_failures),
            ),
            failure=None if error is None else failure_of(error),
            versions=installed_versions(),
            decks=self._decks,
        )


def failure_of(error: Exception) -> Failure:
    """An error as the report has it."""
    return Failure(type(error).__name__, str(error), bool(getattr(error, "retryable", False)))


def reported_round(record: RoundRecord, agents: Mapping[int, int]) -> ReportedRound:
    """A round as the report has it.

    Args:
        record: What became of it.
        agents: Numbers of its agents by node rank, in this order; without those of which nothing is known.
    """
    cause = root_cause(record).rank if failures(record) else None
    return ReportedRound(
        index=record.index,
        started_at=record.started_at,
        ended_at=record.ended_at,
        ending=record.ending.value,
        succeeded=record.succeeded,
        nodes=tuple(agents.values()),
        ranks=tuple(_reported_rank(rank, agents[rank.node_rank]) for rank in record.ranks),
        cause=cause,
        metrics=metrics_of(record.metrics),
        node_ranks=tuple(agents),
    )


def metrics_of(points: Iterable[MetricPoint]) -> tuple[Metric, ...]:
    """Rank 0's metrics in one round, in the order in which they were first told; a call need not tell all of them."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        for name, value in point.values.items():
            curves.setdefault(name, []).append((point.step, value))
    return tuple(Metric(name, 0, tuple(curve)) for name, curve in curves.items())


def report_of_rounds(
    name: str, run_id: str, backend: str, rounds: Sequence[RoundRecord], error: Exception | None
) -> RunReport | None:
    """A report of what is known where no driver saw the run: its rounds. None without any."""
    if not rounds:
        return None
    addresses = list(dict.fromkeys(node for record in rounds for node in record.nodes))
    began, ended = rounds[0].started_at, rounds[-1].ended_at
    return RunReport(
        name,
        run_id,
        backend,
        began,
        ended,
        nodes=tuple(ReportedNode(number, address, began, began) for number, address in enumerate(addresses)),
        rounds=tuple(
            # By the ranks' own word: a pod that has said nothing leaves a gap among the node ranks.
            reported_round(record, {rank.node_rank: addresses.index(rank.node) for rank in record.ranks})
            for record in rounds
        ),
        failure=None if error is None else failure_of(error),
    )


def _reported_rank(rank: RankRecord, agent: int) -> ReportedRank:
    return ReportedRank(
        rank=rank.rank,
        local_rank=rank.local_rank,
        node=agent,
        outcome=rank.outcome.value,
        ended_at=rank.timestamp if rank.ended_at is None else rank.ended_at,
        started_at=rank.started_at,
        called_at=rank.called_at,
        exit_code=rank.exit_code,
        message=rank.message,
        traceback=rank.traceback,
        log_tail=rank.log_tail,
        stacks=rank.stacks,
        step=rank.step,
        logs=rank.logs,
    )


class _Curve:
    """What a rank used: points of ``stride`` samples each, and of fewer where its round has ended."""

    def __init__(self) -> None:
        self._points: list[Sample] = []
        self._stride = 1
        self._folding: list[Sample] = []

    def add(self, sample: Sample) -> None:
        if self._folding and self._folding[0].round_index != sample.round_index:
            self._fold()
        self._folding.append(sample)
        if len(self._folding) >= self._stride:
            self._fold()

    def points(self) -> tuple[Sample, ...]:
        """In the order of time, the last samples among them."""
        unfinished = [_folded(self._folding)] if self._folding else []
        return tuple(sorted([*self._points, *unfinished], key=lambda point: point.at))

    def _fold(self) -> None:
        self._points.append(_folded(self._folding))
        self._folding.clear()
        if len(self._points) >= 2 * MOST_SAMPLES:
            self._points = _halved(self._points)
            # What comes from now on is folded as much as what is there, or the beginning would fade away.
            self._stride *= 2


def _halved(points: Sequence[Sample]) -> list[Sample]:
    """Every two neighbours of a round as one."""
    rounds = (list(points) for _, points in groupby(points, key=lambda point: point.round_index))
    return [_folded(one[first : first + 2]) for one in rounds for first in range(0, len(one), 2)]


def _folded(samples: Sequence[Sample]) -> Sample:
    """Samples of one round as one, at the time of the last: how busy on average, but the largest memory."""
    busy = [sample.gpu_percent for sample in samples if sample.gpu_percent is not None]
    used = [sample.gpu_memory_bytes for sample in samples if sample.gpu_memory_bytes is not None]
    return samples[-1]._replace(
        cpu_percent=round(fmean(sample.cpu_percent for sample in samples), 1),
        memory_bytes=max(sample.memory_bytes for sample in samples),
        gpu_percent=fmean(busy) if busy else None,
        gpu_memory_bytes=max(used, default=None),
    )
