"""A Ray cluster of several nodes on this machine, and faults to inject: how does *your* training take a lost node?

    from kfpytorch_ray import Elastic, launch
    from kfpytorch_ray.testing import LaptopCluster, kill_rank, meanwhile, nothing_left, reached, wait_until

    def break_it():
        wait_until(lambda: reached(step=3, world_size=2), "three steps")  # train() calls kfpytorch_ray.progress(step)
        kill_rank(1)

    with LaptopCluster(nodes=2) as cluster, nothing_left(cluster.temp_dir), meanwhile(break_it):
        result = launch(train, elastic=Elastic(nnodes=2, max_restarts=1, backend="ray"))
    assert len(result.rounds) == 2

Nothing in kfpytorch_ray imports this package. Linux only: it reads /proc.
"""

from kfpytorch_ray.testing.far import Laptop
from kfpytorch_ray.testing.faults import (
    drain_node,
    find_agent,
    find_rank,
    kill_agent,
    kill_node,
    kill_rank,
    kill_raylet,
    slow_rank,
    stop_rank,
)
from kfpytorch_ray.testing.head import HeadCluster
from kfpytorch_ray.testing.laptop import LaptopCluster
from kfpytorch_ray.testing.leftovers import Leftovers, left_after, nothing_left
from kfpytorch_ray.testing.namespaces import unavailable
from kfpytorch_ray.testing.network import NetworkCluster
from kfpytorch_ray.testing.node import Node
from kfpytorch_ray.testing.relay import Relay
from kfpytorch_ray.testing.running import RunningAgent, RunningRank, reached, running_agents, running_ranks
from kfpytorch_ray.testing.waiting import FaultError, meanwhile, wait_until

__all__ = [
    "FaultError",
    "HeadCluster",
    "Laptop",
    "LaptopCluster",
    "Leftovers",
    "NetworkCluster",
    "Node",
    "Relay",
    "RunningAgent",
    "RunningRank",
    "drain_node",
    "find_agent",
    "find_rank",
    "kill_agent",
    "kill_node",
    "kill_rank",
    "kill_raylet",
    "left_after",
    "meanwhile",
    "nothing_left",
    "reached",
    "running_agents",
    "running_ranks",
    "slow_rank",
    "stop_rank",
    "unavailable",
    "wait_until",
]
