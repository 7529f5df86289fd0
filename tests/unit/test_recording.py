"""What the driver writes down of a launch, without Ray."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kfpytorch_ray.cluster.kube.pod_reports import merged
from kfpytorch_ray.cluster.limits import Budgets, Spent
from kfpytorch_ray.cluster.protocol import NodeReport
from kfpytorch_ray.cluster.recording import MOST_SAMPLES, Recorder, metrics_of, report_of_rounds
from kfpytorch_ray.errors import LaunchError, NodeLostError
from kfpytorch_ray.metrics import MetricPoint
from kfpytorch_ray.report.breakdown import segments
from kfpytorch_ray.report.data import Activity, Failure, Metric, NodeFacts, RankDeck, Sample
from kfpytorch_ray.report.page import page
from kfpytorch_ray.report.timeline import timeline_of
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord


def recorder(max_restarts: int = 2, max_node_failures: int = 1) -> Recorder:
    return Recorder("train", "run", "ray", Budgets(max_restarts, max_node_failures))


def round_of(*outcomes: Outcome, index: int = 0, ending: Ending = Ending.FAILED) -> RoundRecord:
    """One rank on each node."""
    ranks = tuple(
        RankRecord(rank, 0, rank, f"10.0.0.{rank}", outcome, None, 12.0, "oh", ended_at=12.5)
        for rank, outcome in enumerate(outcomes)
    )
    return RoundRecord(index, len(ranks), tuple(rank.node for rank in ranks), 10.0, 13.0, ranks, ending)


def sample(round_index: int, at: float, cpu: float = 50.0, memory: int = 100) -> Sample:
    return Sample(round_index, at, cpu, memory)


def test_phases_follow_each_other_without_gaps() -> None:
    """From the start to the end, with rounds between them; entering the same again changes nothing."""
    one = recorder()
    one.enter(Activity.PLACING)
    one.agent_started(0, "10.0.0.0", {"CPU": 2, "memory": 2**30})
    one.agent_started(1, "10.0.0.1", {"CPU": 2})
    one.enter(Activity.AGENTS)
    one.agent_ready(0, NodeFacts("host"))
    one.enter(None)
    one.round_ended(round_of(Outcome.SUCCEEDED, ending=Ending.SUCCEEDED), [0], [])
    one.enter(Activity.ENDING)
    report = one.report()
    activities = [phase.activity for phase in report.phases]
    assert activities == [
        Activity.JOINING, Activity.PLACING, Activity.AGENTS, Activity.WAITING, Activity.ENDING,
    ]  # fmt: skip
    assert report.phases[0].started_at == report.started_at
    for before, after in ((0, 1), (1, 2), (3, 4)):
        assert report.phases[before].ended_at == report.phases[after].started_at
    assert report.phases[-1].ended_at <= report.ended_at
    ready, starting = report.nodes
    assert ready.facts == NodeFacts("host")
    assert ready.resources == (("CPU", 2.0), ("memory", 2.0**30))
    assert ready.ready_at is not None
    assert (starting.ready_at, starting.lost_because) == (None, "")


def test_a_replaced_agent_keeps_why_it_was_lost() -> None:
    """Its successor has a number of its own; what was given back is not lost."""
    one = recorder()
    for number in range(3):
        one.agent_started(number, f"10.0.0.{number}", {})
    one.agent_gone(0)
    one.agent_gone(0, "its node died")
    one.agent_gone(1)
    first, second, third = one.report().nodes
    assert (first.lost_because, first.ended_at is not None) == ("its node died", True)
    assert (second.lost_because, second.ended_at is not None) == ("", True)
    assert third.ended_at is None


@pytest.mark.parametrize(
    ("after", "refused", "paid"),
    [
        (Spent(0, 0), "", ""),
        (Spent(1, 0), "", "max_restarts: 1 of 2"),
        (Spent(0, 1), "", "max_node_failures: 1 of 1"),
        (Spent(1, 1), "", "max_restarts: 1 of 2; max_node_failures: 1 of 1"),
        (Spent(0, 0), "max_restarts is spent", "not tried again: max_restarts is spent"),
        (
            Spent(0, 2),
            "max_node_failures is spent",
            "max_node_failures: 2 of 1; not tried again: max_node_failures is spent",
        ),
    ],
)
def test_a_round_says_what_it_cost(after: Spent, refused: str, paid: str) -> None:
    """And from which budget; the report has what was spent in all."""
    one = recorder()
    one.round_ended(round_of(Outcome.RAISED, Outcome.STOPPED), [0, 1], [])
    one.decided(after, refused)
    report = one.report()
    assert report.rounds[0].paid == paid
    assert [budget.spent for budget in report.budgets] == [after.restarts, after.node_failures]
    assert [budget.limit for budget in report.budgets] == [2, 1]


def test_ranks_lie_on_the_agents_of_their_round() -> None:
    """Node ranks are those of the round; the cause is the rank whose end explains the others'."""
    one = recorder()
    record = round_of(Outcome.STOPPED, Outcome.LOST, Outcome.RAISED)
    one.round_ended(record, [4, 2, 7], [])
    told = one.report().rounds[0]
    assert told.nodes == (4, 2, 7)
    assert [rank.node for rank in told.ranks] == [4, 2, 7]
    assert [rank.outcome for rank in told.ranks] == ["stopped", "lost", "raised"]
    assert (told.cause, told.succeeded, told.ending) == (2, False, "a rank failed")
    assert [rank.ended_at for rank in told.ranks] == [12.5, 12.5, 12.5]


def test_a_round_that_nodes_ended_has_no_cause() -> None:
    """Ranks that left because more nodes arrived failed in no way."""
    one = recorder()
    one.round_ended(round_of(Outcome.STOPPED, Outcome.STOPPED, ending=Ending.GROWN), [0, 1], [])
    assert one.report().rounds[0].cause is None


def test_samples_come_by_pulse_and_with_the_rounds_end() -> None:
    """By rank and in the order of time, in whatever order they come; decks are the last round's, by rank."""
    one = recorder()
    one.sampled([(1, sample(0, 2.0)), (0, sample(0, 2.0))])
    decks = (RankDeck(0, "curve", "<p>"), RankDeck(0, "another", "<p>"))
    one.round_ended(round_of(Outcome.RAISED), [0], [NodeReport(0, (), (RankDeck(0, "old", ""),))])
    report = NodeReport(0, (), decks, ((0, sample(1, 9.0)), (1, sample(1, 1.0))))
    other = NodeReport(1, (), (RankDeck(1, "curve", ""),))
    one.round_ended(round_of(Outcome.SUCCEEDED, index=1, ending=Ending.SUCCEEDED), [0], [other, report])
    told = one.report()
    assert [(of.rank, [taken.at for taken in of.samples]) for of in told.samples] == [(0, [2.0, 9.0]), (1, [1.0, 2.0])]
    assert told.decks == (*decks, RankDeck(1, "curve", ""))


def test_samples_of_a_long_run_are_thinned_out() -> None:
    """Never more than twice the most; each round keeps some, the mean of the CPU and the peak of the memory stay."""
    one = recorder()
    for round_index in range(2):
        for number in range(5000):
            at = 10_000.0 * round_index + number
            one.sampled([(0, sample(round_index, at, 40.0 + number % 2 * 20, 7777 if number == 1234 else 100))])
    (told,) = one.report().samples
    assert MOST_SAMPLES / 2 < len(told.samples) <= 2 * MOST_SAMPLES
    assert {taken.round_index for taken in told.samples} == {0, 1}
    assert [taken.at for taken in told.samples] == sorted(taken.at for taken in told.samples)
    assert sum(taken.cpu_percent for taken in told.samples) / len(told.samples) == pytest.approx(50, abs=2)
    assert max(taken.memory_bytes for taken in told.samples) == 7777


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8000), st.floats(0, 1), st.floats(0, 1))
@example(7200, 0.75, 0.001)
def test_a_long_run_is_kept_evenly(count: int, busy: float, spike: float) -> None:
    """Its beginning as densely as its end; averages and the peaks of memory are those of all samples."""
    one = recorder()
    peak_at = int(spike * (count - 1))
    for number in range(count):
        percent = 100.0 if number < busy * count else 0.0
        memory = 80 if number == peak_at else 10
        one.sampled([(0, Sample(0, 2.0 * number, percent, memory, percent, memory))])
    (told,) = one.report().samples
    assert min(count, MOST_SAMPLES) <= len(told.samples) <= 2 * MOST_SAMPLES
    # The last one may stand for fewer.
    assert len({after.at - before.at for before, after in pairwise(told.samples[:-1])}) <= 1
    assert told.samples[-1].at == 2.0 * (count - 1)
    true = 100 * sum(number < busy * count for number in range(count)) / count
    assert fmean(taken.cpu_percent for taken in told.samples) == pytest.approx(true, abs=1)
    assert fmean(taken.gpu_percent or 0.0 for taken in told.samples) == pytest.approx(true, abs=1)
    assert max(taken.memory_bytes for taken in told.samples) == 80
    assert max(taken.gpu_memory_bytes or 0 for taken in told.samples) == 80


def test_a_rank_without_a_gpu_has_none_when_samples_are_folded() -> None:
    """Nor where it did not say; what it said counts."""
    one = recorder()
    for number in range(4 * MOST_SAMPLES):
        one.sampled([(0, sample(0, number)), (1, Sample(0, number, 0.0, 1, *((None, None), (50.0, 7))[number % 2]))])
    without, with_gpu = one.report().samples
    assert {(taken.gpu_percent, taken.gpu_memory_bytes) for taken in without.samples} == {(None, None)}
    assert {(taken.gpu_percent, taken.gpu_memory_bytes) for taken in with_gpu.samples} == {(50.0, 7)}


def test_what_rank_0_told_becomes_curves() -> None:
    """A curve for each metric, over the step; a call need not tell all of them."""
    told = [(0, {"loss": 2.0}), (5, {"loss": 1.0, "accuracy": 0.5}), (10, {}), (15, {"loss": 0.5})]
    points = [MetricPoint(0, number, step, 0.0, values=values) for number, (step, values) in enumerate(told)]
    assert metrics_of(points) == (
        Metric("loss", 0, ((0, 2.0), (5, 1.0), (15, 0.5))),
        Metric("accuracy", 0, ((5, 0.5),)),
    )


def test_the_error_is_the_reports_failure() -> None:
    """Class, message, and whether another try may help."""
    failure = recorder().report(NodeLostError("What.\nWhy: x\nFix: y")).failure
    assert failure is not None
    assert (failure.error, failure.message, failure.retryable) == ("NodeLostError", "What.\nWhy: x\nFix: y", True)
    assert recorder().report().failure is None


def test_pods_without_a_driver_are_reported_by_their_rounds() -> None:
    """What ranks have left is drawn as far as it goes; without any round there is nothing to report."""
    record = round_of(Outcome.STOPPED, Outcome.RAISED)
    told = report_of_rounds("train", "run", "kubeflow", (record, replace(record, index=1)), LaunchError("oh"))
    assert told is not None
    assert [node.address for node in told.nodes] == ["10.0.0.0", "10.0.0.1"]
    assert [one.cause for one in told.rounds] == [1, 1]
    assert [(told.started_at, told.ended_at)] == [(10.0, 13.0)]
    assert segments(told)
    assert report_of_rounds("train", "run", "kubeflow", (), None) is None


@pytest.mark.parametrize("heard", [(0,), (1,), (0, 2), (1, 2)])
def test_pods_that_said_nothing_leave_a_gap(heard: tuple[int, ...]) -> None:
    """Ranks lie on their own pods, whichever pods have left a report."""
    whole = round_of(Outcome.RAISED, Outcome.RAISED, Outcome.RAISED)
    parts = [replace(whole, nodes=(whole.nodes[node],), ranks=(whole.ranks[node],)) for node in heard]
    told = report_of_rounds("train", "run", "kubeflow", (merged(parts),), None)
    assert told is not None
    (one,) = told.rounds
    assert [told.nodes[number].address for number in one.nodes] == [f"10.0.0.{node}" for node in heard]
    assert [(rank.rank, told.nodes[rank.node].address) for rank in one.ranks] == [
        (node, f"10.0.0.{node}") for node in heard
    ]
    where = f"node {heard[0]} (10.0.0.{heard[0]}), local rank 0"
    assert where in page(replace(told, failure=Failure("WorkerFailedError", "oh", retryable=False)))
    assert [lane.node.label for lane in timeline_of(told).nodes] == [f"node {node}" for node in heard]
