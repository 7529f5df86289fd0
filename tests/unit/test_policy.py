from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfpytorch_ray.cluster.limits import Budgets, Spent
from kfpytorch_ray.cluster.policy import (
    EARLY_S,
    Decision,
    Finish,
    Present,
    Raise,
    Reason,
    Retry,
    Wait,
    decide,
    node_ranks,
)
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord, Stage

PEER_LOST = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]"
WAYS_TO_FAIL = [
    (Outcome.RAISED, "ValueError: bad batch"),
    (Outcome.EXITED, "left with exit code 3 and left no record of an exception"),
    (Outcome.KILLED, "killed by SIGKILL"),
    (Outcome.KILLED, "killed by SIGABRT"),
    (Outcome.HUNG, "made no progress for 60 s"),
    (Outcome.RAISED, PEER_LOST),
]


def record(
    rank: int = 0, outcome: Outcome = Outcome.RAISED, message: str = "", at: float = 1.0, **f: Any
) -> RankRecord:
    code = {Outcome.SUCCEEDED: 0, Outcome.KILLED: -9, Outcome.LOST: None}.get(outcome, 1)
    return RankRecord(
        rank=rank,
        local_rank=0,
        node_rank=rank,
        node=f"10.0.0.{rank}",
        outcome=outcome,
        exit_code=code,
        timestamp=at,
        message=message,
        **f,
    )


def round_of(*ranks: RankRecord, ending: Ending = Ending.FAILED, index: int = 0) -> RoundRecord:
    nodes = tuple(rank.node for rank in ranks)
    return RoundRecord(index, len(ranks), nodes, started_at=0.0, ended_at=9.0, ranks=ranks, ending=ending)


def present(ready: tuple[int, ...] = (0, 1), low: int = 2, high: int = 2, **ranks: int) -> Present:
    before = {int(name[1:]): rank for name, rank in ranks.items()} or {number: number for number in ready}
    return Present(ready, before, low, high)


def decided(
    *rounds: RoundRecord,
    lost: int = 0,
    spent: Spent | None = None,
    restarts: int = 3,
    nodes: int = 3,
    membership: Present | None = None,
) -> Decision:
    return decide(rounds, lost, spent or Spent(), Budgets(restarts, nodes), membership or present())


FAILED = round_of(record(0, Outcome.STOPPED), record(1, Outcome.RAISED, "ValueError: bad batch"))
LOST = round_of(
    record(0, Outcome.RAISED, PEER_LOST), record(1, Outcome.LOST, "lost with its node"), ending=Ending.NODE_LOST
)


@pytest.mark.parametrize("ending", Ending)
def test_a_round_in_which_all_ranks_returned_is_the_last(ending: Ending) -> None:
    """Success ends the launch, whatever was about to end the round, and whatever budget is left."""
    ended = round_of(record(0, Outcome.SUCCEEDED), record(1, Outcome.SUCCEEDED), ending=ending)
    assert decided(ended, lost=9, restarts=0, nodes=0) == Finish()


@pytest.mark.parametrize("end", WAYS_TO_FAIL)
@pytest.mark.parametrize(("used", "allowed"), [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)])
def test_failures_of_ranks_are_tried_again_within_their_budget(
    end: tuple[Outcome, str], used: int, allowed: int
) -> None:
    """``max_restarts`` restarts, not one more and not one less, for every way to fail; lost nodes do not matter."""
    ended = round_of(record(0, Outcome.STOPPED), record(1, *end))
    decision = decided(ended, spent=Spent(used, 7), restarts=allowed, nodes=7)
    if used < allowed:
        assert decision == Retry((0, 1), Spent(used + 1, 7))
    else:
        assert decision == Raise(Reason.RESTARTS_SPENT, Spent(used, 7))


@pytest.mark.parametrize(("used", "allowed"), [(0, 0), (0, 1), (1, 1), (2, 3)])
def test_lost_nodes_have_a_budget_of_their_own(used: int, allowed: int) -> None:
    """They spend no restart, and none has to be left; a rank that only reports its peer's end spends none either."""
    decision = decided(LOST, lost=1, spent=Spent(0, used), restarts=0, nodes=allowed)
    spent = Spent(0, used + 1)
    assert decision == (Retry((0, 1), spent) if used < allowed else Raise(Reason.NODE_FAILURES_SPENT, spent))


def test_a_rank_that_failed_beside_a_lost_node_spends_from_both() -> None:
    """A user's exception is a failure of its own."""
    both = round_of(
        record(0, Outcome.RAISED, "ValueError: bad batch"), record(1, Outcome.LOST), ending=Ending.NODE_LOST
    )
    assert decided(both, lost=1) == Retry((0, 1), Spent(1, 1))
    assert decided(both, lost=1, restarts=0) == Raise(Reason.RESTARTS_SPENT, Spent(0, 1))
    assert decided(both, lost=1, nodes=0) == Raise(Reason.NODE_FAILURES_SPENT, Spent(1, 1))


@pytest.mark.parametrize("ending", [Ending.DRAINED, Ending.GROWN])
def test_changes_of_the_nodes_cost_nothing(ending: Ending) -> None:
    """Also when a rank meets the end of one that left a step before it, or the drained node dies meanwhile."""
    left = round_of(record(0, Outcome.STOPPED), record(1, Outcome.RAISED, PEER_LOST), ending=ending)
    assert decided(left, restarts=0, nodes=0) == Retry((0, 1), Spent())
    died = round_of(record(0, Outcome.STOPPED), record(1, Outcome.LOST), ending=ending)
    assert decided(died, restarts=0, nodes=0) == Retry((0, 1), Spent())


@pytest.mark.parametrize("ending", [Ending.DRAINED, Ending.GROWN])
def test_a_failure_of_ones_own_counts_also_when_nodes_change(ending: Ending) -> None:
    """A checkpoint that cannot be written is not excused."""
    failed = round_of(record(0, Outcome.RAISED, "OSError: No space left on device"), ending=ending)
    assert decided(failed, restarts=1) == Retry((0, 1), Spent(1))
    assert decided(failed, restarts=0) == Raise(Reason.RESTARTS_SPENT, Spent())


@pytest.mark.parametrize("stage", [Stage.LOAD, Stage.RESULT])
def test_what_fails_the_same_way_every_time_is_not_tried_again(stage: Stage) -> None:
    """A function that cannot be loaded and a result that cannot be pickled spend no restart."""
    ended = round_of(record(0, Outcome.RAISED, "TypeError: cannot pickle", stage=stage), record(1, Outcome.STOPPED))
    assert decided(ended) == Raise(Reason.HOPELESS, Spent())


def crash(rank: int = 1, traceback: str = "at line 7", at: float = 1.0, *, progressed: bool = False) -> RoundRecord:
    raised = record(rank, Outcome.RAISED, "ValueError", at, traceback=traceback, progressed=progressed)
    return round_of(record(0, Outcome.STOPPED), raised)


def test_the_same_crash_before_any_progress_is_not_tried_a_third_time() -> None:
    """Same rank, same traceback, twice in a row."""
    assert decided(crash()) == Retry((0, 1), Spent(1))
    assert decided(crash(), crash(), spent=Spent(1)) == Raise(Reason.SAME_AGAIN, Spent(1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (crash(rank=1), crash(rank=2)),
        (crash(), crash(traceback="at line 8")),
        (crash(progressed=True), crash()),
        (crash(), crash(progressed=True)),
        (crash(at=EARLY_S + 1), crash()),
        (crash(), crash(at=EARLY_S + 1)),
    ],
)
def test_crashes_that_differ_or_come_late_are_tried_again(one: RoundRecord, other: RoundRecord) -> None:
    """Another rank, another place, progress in between, or minutes of work: a restart may help."""
    assert decided(one, other, spent=Spent(1)) == Retry((0, 1), Spent(2))


def test_what_asks_to_be_tried_again_is_tried_as_often_as_there_are_restarts() -> None:
    """A ``FlyteRecoverableException`` comes from the same place each time that a service is away."""
    away = round_of(record(0, Outcome.RAISED, "FlyteRecoverableException", traceback="at line 7", recoverable=True))
    assert decided(away, away, spent=Spent(1)) == Retry((0, 1), Spent(2))


def test_a_crash_is_not_the_same_as_one_before_another_failure() -> None:
    """In a row means in a row."""
    between = round_of(record(0, Outcome.KILLED, "killed by SIGKILL"), record(1, Outcome.STOPPED))
    assert decided(crash(), between, crash(), spent=Spent(2)) == Retry((0, 1), Spent(3))


def test_too_few_nodes_are_waited_for() -> None:
    """With the minimum left it goes on at once, below it waits; what was spent is spent."""
    assert decided(LOST, lost=1, membership=present((0,), 1, 2)) == Retry((0,), Spent(0, 1))
    assert decided(LOST, lost=1, membership=present((0,), 2, 2)) == Wait(Spent(0, 1))
    assert decided(FAILED, membership=present((), 1, 2)) == Wait(Spent(1))


def test_the_deadline_ends_the_launch() -> None:
    """Ranks that were stopped for it have not failed; one that failed before, with no restart left, is the reason."""
    stopped = round_of(record(0, Outcome.STOPPED), record(1, Outcome.STOPPED), ending=Ending.DEADLINE)
    assert decided(stopped) == Raise(Reason.DEADLINE, Spent())
    failed = round_of(record(0, Outcome.STOPPED), record(1), ending=Ending.DEADLINE)
    assert decided(failed, restarts=0) == Raise(Reason.RESTARTS_SPENT, Spent())


@pytest.mark.parametrize("ending", [Ending.FAILED, Ending.HUNG])
def test_no_round_fails_for_nothing(ending: Ending) -> None:
    """A round that was ended for a failure costs a restart, also if no rank admits it: rounds are never endless."""
    stopped = round_of(record(0, Outcome.SUCCEEDED), record(1, Outcome.STOPPED), ending=ending)
    assert decided(stopped, restarts=1) == Retry((0, 1), Spent(1))
    assert decided(stopped, restarts=0) == Raise(Reason.RESTARTS_SPENT, Spent())


outcomes = st.sampled_from(Outcome)


@given(
    st.lists(outcomes, min_size=1, max_size=4),
    st.sampled_from(Ending),
    st.integers(0, 3),
    st.builds(Spent, st.integers(0, 3), st.integers(0, 3)),
    st.builds(Budgets, st.integers(0, 3), st.integers(0, 3)),
)
def test_no_budget_is_exceeded_and_no_failure_is_a_success(
    ends: list[Outcome], ending: Ending, lost: int, spent: Spent, budgets: Budgets
) -> None:
    """Whatever happens: another round only within both budgets, and success only if every rank returned."""
    ended = round_of(*(record(rank, outcome) for rank, outcome in enumerate(ends)), ending=ending)
    decision = decide((ended,), lost, spent, budgets, present())
    assert (decision == Finish()) == (set(ends) == {Outcome.SUCCEEDED})
    if isinstance(decision, Retry | Wait):
        assert decision.spent.restarts <= max(budgets.max_restarts, spent.restarts)
        assert decision.spent.node_failures <= budgets.max_node_failures


@pytest.mark.parametrize(
    ("ready", "before", "expected"),
    [
        ((5, 6, 7), {}, (5, 6, 7)),
        ((0, 1, 2), {0: 2, 1: 0, 2: 1}, (1, 2, 0)),
        ((0, 2), {0: 0, 1: 1, 2: 2}, (0, 2)),
        ((0, 2, 3), {0: 0, 1: 1, 2: 2, 3: 3}, (0, 3, 2)),
        ((1, 2), {0: 0, 1: 1, 2: 2}, (2, 1)),
        ((0, 2, 9), {0: 0, 1: 1, 2: 2}, (0, 9, 2)),
        ((8, 1, 2, 9), {0: 0, 1: 1, 2: 2}, (8, 1, 2, 9)),
    ],
    ids=["first round", "all stay", "tail moves up", "last fills the gap", "rank 0 lost", "newcomer fills", "two come"],
)
def test_survivors_keep_their_node_ranks(
    ready: tuple[int, ...], before: dict[int, int], expected: tuple[int, ...]
) -> None:
    """Newcomers take the ranks that are free; without them the highest ranks fill the gaps."""
    assert node_ranks(Present(ready, before, 1, 8)) == expected


@given(st.permutations(range(6)), st.integers(0, 6), st.integers(1, 6), st.integers(1, 6))
def test_ranks_are_without_gaps_and_nobody_moves_without_need(
    numbers: list[int], left: int, newcomers: int, most: int
) -> None:
    """Every rank is given once, at most ``max_nodes`` of them, and who can keep a rank keeps it."""
    before = {number: rank for rank, number in enumerate(numbers)}
    ready = (*sorted(numbers[:left]), *range(10, 10 + newcomers))
    ranked = node_ranks(Present(ready, before, 1, most))
    assert len(ranked) == min(len(ready), most) == len(set(ranked))
    for number in numbers[:left]:
        if before[number] < len(ranked):
            assert ranked[before[number]] == number
