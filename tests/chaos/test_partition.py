"""A node that falls silent: its link is cut, on a network of the test's own."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from training import Log

from kfpytorch_ray.testing import (
    NetworkCluster,
    Node,
    find_agent,
    kill_node,
    reached,
    running_agents,
    unavailable,
    wait_until,
)

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "available")

SILENCE_TIMEOUT_S = 12

SCRIPT = """
import sys
import training
import cloudpickle
from kfpytorch_ray import launch

cloudpickle.register_pickle_by_value(training)
elastic = training.job("2:3", silence_timeout_s=float(sys.argv[2]))
result = launch(training.train, training.Log(sys.argv[1]), elastic=elastic)
for record in result.rounds:
    print(record.ending.name, record.world_size, *(rank.outcome.name for rank in record.ranks), flush=True)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[NetworkCluster]:
    """A head and three nodes, each with a network namespace."""
    with NetworkCluster(nodes=3) as started:
        yield started


@pytest.mark.row("a node falls silent")
def test_link_is_cut(cluster: NetworkCluster, log: Log, run: int) -> None:
    """The rest goes on before Ray notices; the node's own ranks have ended by then, so no step has two writers.

    Healed, it does no harm.
    """
    while len(cluster.nodes) < 3:
        cluster.add_node()
    victim = run % 3
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    output = Path(log.folder, "output")
    node: Node | None = None
    with (
        output.open("w") as file,
        cluster.start_driver(
            SCRIPT, log.folder, str(SILENCE_TIMEOUT_S), env=environment, stdout=file, stderr=file
        ) as driver,
    ):
        try:
            wait_until(lambda: reached(3, 3, cluster.address), "three steps of three ranks")
            agent = find_agent(victim, address=cluster.address)
            node = next(node for node in cluster.nodes if node.raylet == agent.raylet)
            cluster.cut(node)
            wait_until(lambda: log.trained(rounds=2, world_size=2), "a second round of two ranks")
            wait_until(lambda: agent not in running_agents(cluster.address), "the end of the silent agent")
            cluster.heal(node)
            healed_at = log.rounds()[1].last_step
            wait_until(lambda: log.rounds()[1].last_step > healed_at + 10, "ten steps more")
            log.finish()
            assert driver.wait(60) == 0, output.read_text()
        finally:
            print(output.read_text())
            driver.send_signal(signal.SIGKILL)
            if node is not None:
                cluster.heal(node)
                kill_node(node)
    assert len(log.rounds()) == 2
    assert "NODE_LOST 3" in output.read_text()
    assert log.at_most_one_step_was_lost()
    assert_one_writer_at_a_time(log)


def assert_one_writer_at_a_time(log: Log) -> None:
    """No rank 0 has written after its successor had begun to."""
    written: dict[int, list[float]] = {}
    for note in log.notes():
        if note["rank"] == 0:
            written.setdefault(note["pid"], []).append(note["time"])
    for before, after in itertools.pairwise(written.values()):
        assert max(before) < min(after), (os.getpid(), before[-1], after[0])
