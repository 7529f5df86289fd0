"""What the controller does after a round, and with which nodes: pure decisions, no processes, no Ray.

Failures of ranks and lost nodes are paid from two budgets. Changes of the nodes themselves (more arrive, one is
drained) cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from kfpytorch_ray.cluster.causes import failures, may_miss_a_peer, root_cause
from kfpytorch_ray.cluster.limits import Budgets, Spent
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord, Stage

EARLY_S = 300.0
"""A rank that has run for longer counts as having made progress, even if it never called ``progress()``."""


@dataclass(frozen=True, slots=True)
class Present:
    """Who can take part in the next round.

    Attributes:
        ready: Agents that are up, in the order in which newcomers are to be ranked.
        ranks: Node ranks of those that took part before.
        min_nodes: Fewest nodes to train with.
        max_nodes: Most nodes to train with.
    """

    ready: tuple[int, ...]
    ranks: Mapping[int, int]
    min_nodes: int
    max_nodes: int


class Reason(Enum):
    """Why a launch ends as a failure."""

    RESTARTS_SPENT = "max_restarts is spent"
    NODE_FAILURES_SPENT = "max_node_failures is spent"
    SAME_AGAIN = "the same rank failed at the same place twice, before it had made any progress"
    HOPELESS = "it would fail the same way again"
    DEADLINE = "the deadline has passed"


@dataclass(frozen=True, slots=True)
class Finish:
    """Every rank returned."""


@dataclass(frozen=True, slots=True)
class Retry:
    """A new round at once: its agents by node rank, and what has been spent by then."""

    agents: tuple[int, ...]
    spent: Spent


@dataclass(frozen=True, slots=True)
class Wait:
    """Too few nodes are left: wait for more."""

    spent: Spent


@dataclass(frozen=True, slots=True)
class Raise:
    """The launch has failed."""

    reason: Reason
    spent: Spent


Decision = Finish | Retry | Wait | Raise


def decide(rounds: Sequence[RoundRecord], lost: int, spent: Spent, budgets: Budgets, present: Present) -> Decision:
    """What to do after the last of ``rounds``.

    Args:
        rounds: All of the launch.
        lost: Agents and nodes that were lost since the round before, less those that were about to be taken away.
        spent: Before this round.
        budgets: What may be spent.
        present: Who is left.
    """
    ended = rounds[-1]
    if ended.succeeded:
        return Finish()
    cause = _rank_to_blame(ended)
    spent = Spent(spent.restarts, spent.node_failures + lost)
    if cause is not None:
        if cause.outcome is Outcome.RAISED and cause.stage is not Stage.CALL:
            return Raise(Reason.HOPELESS, spent)
        if spent.restarts < budgets.max_restarts and _same_again(cause, rounds):
            return Raise(Reason.SAME_AGAIN, spent)
    if cause is not None or (ended.ending in (Ending.FAILED, Ending.HUNG) and not _lost_a_node(ended)):
        if spent.restarts >= budgets.max_restarts:
            return Raise(Reason.RESTARTS_SPENT, spent)
        spent = Spent(spent.restarts + 1, spent.node_failures)
    if spent.node_failures > budgets.max_node_failures:
        return Raise(Reason.NODE_FAILURES_SPENT, spent)
    if ended.ending is Ending.DEADLINE:
        return Raise(Reason.DEADLINE, spent)
    if len(present.ready) < present.min_nodes:
        return Wait(spent)
    return Retry(node_ranks(present), spent)


def node_ranks(present: Present) -> tuple[int, ...]:
    """The agents of the next round by node rank.

    Who took part before keeps its rank; newcomers fill the gaps. A gap that nobody fills takes the agent with the
    highest rank, so that as few as possible change theirs.
    """
    before = sorted((agent for agent in present.ready if agent in present.ranks), key=present.ranks.__getitem__)
    newcomers = [agent for agent in present.ready if agent not in present.ranks]
    count = min(len(present.ready), present.max_nodes)
    ranked: dict[int, int] = {}
    movers = []
    for agent in before:
        rank = present.ranks[agent]
        if rank < count and rank not in ranked:
            ranked[rank] = agent
        else:
            movers.append(agent)
    gaps = [rank for rank in range(count) if rank not in ranked]
    # Those that trained before those that did not, should there be more agents than ranks.
    fillers = movers[::-1] + newcomers
    ranked |= dict(zip(gaps, fillers, strict=False))
    return tuple(ranked[rank] for rank in range(count))


def _rank_to_blame(ended: RoundRecord) -> RankRecord | None:
    """The rank whose failure costs a restart; None where nodes came or went and the ranks only felt it."""
    failed = failures(ended)
    if not failed:
        return None
    cause = root_cause(ended)
    if cause.outcome is Outcome.LOST:
        return None
    # Ranks that leave a round when they are told may do so a step apart.
    if ended.ending in (Ending.DRAINED, Ending.GROWN, Ending.NODE_LOST) and may_miss_a_peer(cause):
        return None
    return cause


def _lost_a_node(ended: RoundRecord) -> bool:
    return any(rank.outcome is Outcome.LOST for rank in ended.ranks)


def _same_again(cause: RankRecord, rounds: Sequence[RoundRecord]) -> bool:
    """Whether the rank that is the cause failed like this in the round before, be it as the first or with others.

    An exception that asks to be tried again is, whatever it was before.
    """
    is_crash = cause.outcome is Outcome.RAISED and not cause.recoverable
    if len(rounds) < 2 or not is_crash or not _without_progress(cause, rounds[-1]):
        return False
    return any(
        (rank.outcome, rank.rank, rank.traceback) == (cause.outcome, cause.rank, cause.traceback)
        and _without_progress(rank, rounds[-2])
        for rank in rounds[-2].ranks
    )


def _without_progress(rank: RankRecord, of: RoundRecord) -> bool:
    return not rank.progressed and rank.timestamp - of.started_at < EARLY_S
