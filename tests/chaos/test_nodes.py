"""Agents and nodes that are lost, taken away or added while ranks train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from training import Log, job, train

from kfpytorch_ray import NodeLostError, launch
from kfpytorch_ray.results import Ending, Outcome
from kfpytorch_ray.testing import (
    LaptopCluster,
    Node,
    RunningRank,
    drain_node,
    find_agent,
    kill_agent,
    kill_node,
    kill_raylet,
    meanwhile,
    reached,
    running_ranks,
    wait_until,
)

three_steps = partial(wait_until, lambda: reached(step=3, world_size=3), "three steps of three ranks")


def node_of(cluster: LaptopCluster, node_rank: int) -> Node:
    """The node that holds a node rank now."""
    agent = find_agent(node_rank)
    return next(node for node in cluster.nodes if node.raylet == agent.raylet)


def places(ranks: tuple[RunningRank, ...]) -> dict[int, tuple[int, int]]:
    """Raylet and agent of every node rank."""
    return {rank.node_rank: (rank.agent.raylet, rank.agent.pid) for rank in ranks}


@pytest.mark.row("an agent is lost")
def test_agent_is_killed(whole: LaptopCluster, log: Log, run: int) -> None:
    """A new agent in the same bundle takes its place; the others keep their agents and node ranks."""
    victim = run % 3
    before: dict[int, tuple[int, int]] = {}
    after: dict[int, tuple[int, int]] = {}

    def break_it() -> None:
        three_steps()
        before.update(places(running_ranks()))
        kill_agent(victim)
        wait_until(lambda: log.trained(rounds=2, world_size=3), "a second round of three ranks")
        after.update(places(running_ranks()))
        log.finish()

    with meanwhile(break_it):
        result = launch(train, log, elastic=job(3))
    lost, succeeded = result.rounds
    assert lost.ending is Ending.NODE_LOST
    assert lost.ranks[victim].outcome is Outcome.LOST
    assert succeeded.succeeded
    assert {rank for rank in before if before[rank] == after[rank]} == {0, 1, 2} - {victim}
    assert before[victim][0] == after[victim][0]
    assert [seen.restarts for seen in log.rounds()] == [0, 0]
    assert log.at_most_one_step_was_lost()


@pytest.mark.row("agents are lost until max_node_failures is spent")
def test_agents_are_killed_too_often(whole: LaptopCluster, log: Log) -> None:
    """The error names the node, and Flyte may try again."""

    def break_it() -> None:
        three_steps()
        kill_agent(1)
        wait_until(lambda: log.trained(rounds=2, world_size=3), "a second round of three ranks")
        wait_until(lambda: reached(step=1, world_size=3), "three ranks")
        kill_agent(2)

    with pytest.raises(NodeLostError) as caught, meanwhile(break_it):
        launch(train, log, elastic=job(3, max_restarts=5, max_node_failures=1))
    assert caught.value.retryable
    assert [record.ending for record in caught.value.rounds] == [Ending.NODE_LOST] * 2
    assert caught.value.rounds[1].ranks[2].node in str(caught.value)


@pytest.mark.row("a node is lost, enough are left")
@pytest.mark.parametrize("kill", [kill_node, kill_raylet])
def test_node_is_lost(whole: LaptopCluster, log: Log, run: int, kill: Callable[[Node], None]) -> None:
    """Training goes on at once with those that are left, from the checkpoint, also where it was rank 0's node."""
    victim = run % 3

    def break_it() -> None:
        three_steps()
        node = node_of(whole, victim)
        kill(node)
        wait_until(lambda: log.trained(rounds=2, world_size=2), "a second round of two ranks")
        whole.wait_for_loss(node)
        log.finish()

    with meanwhile(break_it):
        result = launch(train, log, elastic=job("2:3"))
    lost, succeeded = result.rounds
    assert lost.ending is Ending.NODE_LOST
    assert (lost.world_size, succeeded.world_size) == (3, 2)
    assert lost.ranks[victim].outcome is Outcome.LOST
    assert log.at_most_one_step_was_lost()


@pytest.mark.row("a node is lost, too few are left")
def test_too_few_nodes_are_left(whole: LaptopCluster, log: Log, run: int) -> None:
    """It is waited for a replacement, and training goes on with that one."""
    victim = run % 3
    survivors: dict[int, tuple[int, int]] = {}
    after: dict[int, tuple[int, int]] = {}

    def break_it() -> None:
        three_steps()
        survivors.update(places(running_ranks()))
        del survivors[victim]
        node = node_of(whole, victim)
        kill_node(node)
        whole.wait_for_loss(node)
        assert len(log.rounds()) == 1
        whole.add_node()
        wait_until(lambda: log.trained(rounds=2, world_size=3), "a second round of three ranks")
        after.update(places(running_ranks()))
        log.finish()

    with meanwhile(break_it):
        result = launch(train, log, elastic=job(3))
    assert [record.ending for record in result.rounds] == [Ending.NODE_LOST, Ending.SUCCEEDED]
    assert survivors.items() <= after.items()
    assert log.at_most_one_step_was_lost()


@pytest.mark.row("a node is lost, too few are left and none comes")
def test_no_replacement_comes(whole: LaptopCluster, log: Log) -> None:
    """The wait ends at the join timeout with an error that names the node, and Flyte may try again."""

    def break_it() -> None:
        three_steps()
        node = node_of(whole, 2)
        kill_node(node)
        whole.wait_for_loss(node)

    with pytest.raises(NodeLostError) as caught, meanwhile(break_it):
        launch(train, log, elastic=job(3, join_timeout_s=60))
    assert caught.value.retryable
    assert caught.value.rounds[0].ranks[2].outcome is Outcome.LOST


@pytest.mark.row("Ray says a node will be drained")
@pytest.mark.parametrize("asking", [None, frozenset({0})], ids=["all-ask", "rank-0-asks"])
def test_node_is_drained(
    whole: LaptopCluster, log: Log, run: int, asking: frozenset[int] | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ranks are told and leave together after a step; a round without that node follows; no budget is spent.

    What they print last comes home from the node that is left, too.
    """
    victim = run % 3

    def break_it() -> None:
        three_steps()
        drain_node(node_of(whole, victim), deadline_s=60)
        wait_until(lambda: log.trained(rounds=2, world_size=2), "a second round of two ranks")
        log.finish()

    with meanwhile(break_it):
        elastic = job("2:3", max_restarts=0, max_node_failures=0, logs="all")
        result = launch(train, log, asking=asking, elastic=elastic)
    drained, succeeded = result.rounds
    assert drained.ending is Ending.DRAINED
    assert [rank.outcome for rank in drained.ranks] == [Outcome.STOPPED] * 3
    assert succeeded.world_size == 2
    told, _ = log.rounds()
    assert told.left_when_asked == {0, 1, 2}
    assert [seen.restarts for seen in log.rounds()] == [0, 0]
    assert log.at_most_one_step_was_lost()
    assert capfd.readouterr().out.count(f"leaves after step {told.last_step}\n") == 3


@pytest.mark.row("more nodes arrive, below max")
def test_more_nodes_arrive(whole: LaptopCluster, log: Log) -> None:
    """A launch that began with two of three nodes ends its round when the third is there, and goes on with three."""
    whole.remove_node(whole.nodes[-1])

    def break_it() -> None:
        wait_until(lambda: reached(step=3, world_size=2), "three steps of two ranks")
        whole.add_node()
        wait_until(lambda: log.trained(rounds=2, world_size=3), "a second round of three ranks")
        log.finish()

    with meanwhile(break_it):
        result = launch(train, log, elastic=job("1:3", max_restarts=0, max_node_failures=0, grow_cooldown_s=1))
    grown, succeeded = result.rounds
    assert grown.ending is Ending.GROWN
    assert (grown.world_size, succeeded.world_size) == (2, 3)
    told, _ = log.rounds()
    assert told.left_when_asked == {0, 1}
    assert log.at_most_one_step_was_lost()
