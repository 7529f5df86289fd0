"""One Ray node of a cluster for tests, as processes of this machine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass

from kfpytorch_ray.testing.processes import command, descendants, in_network, is_running, kill_all
from kfpytorch_ray.testing.running import agents_of, processes_of
from kfpytorch_ray.testing.waiting import wait_until


@dataclass(frozen=True, slots=True)
class Node:
    """A Ray node that can hold an agent.

    Attributes:
        node_id: Ray's id of it.
        address: The address that Ray knows for it.
        raylet: Process id of its raylet.
        network: Name of the network namespace that is its alone; empty without one.
    """

    node_id: str
    address: str
    raylet: int
    network: str = ""

    @classmethod
    def of_raylet(cls, raylet: int, network: str = "") -> Node:
        """The node whose raylet is a process that runs."""
        return cls(raylet_option(raylet, "node_id"), raylet_option(raylet, "node_ip_address"), raylet, network)

    @property
    def alive(self) -> bool:
        """Whether its raylet runs."""
        return is_running(self.raylet)

    def processes(self) -> set[int]:
        """Everything that runs on it, the raylet included while it runs."""
        found = descendants(self.raylet) | (in_network(self.network) if self.network else set())
        for agent in agents_of(self.raylet):
            found |= processes_of(agent)
        return found | ({self.raylet} if self.alive else set())

    def power_off(self) -> None:
        """SIGKILL to everything on it, and remove the files of its agents.

        They would be gone with a machine, and the process that removes them otherwise is killed as well. A machine
        does not tell of its own end: those that could are killed first.
        """
        agents = agents_of(self.raylet)
        doomed = self.processes()
        first = [self.raylet, *(agent.pid for agent in agents)]
        kill_all([*first, *doomed.difference(first)])

        def gone() -> bool:
            # What was started while the others were killed.
            late = self.processes().union(*(processes_of(agent) for agent in agents))
            kill_all(late)
            return not any(is_running(process) for process in doomed | late)

        wait_until(gone, "the end of everything on a node that is switched off", timeout_s=30)
        for agent in agents:
            for folder in agent.folders:
                shutil.rmtree(folder, ignore_errors=True)


def raylet_among(processes: Iterable[int]) -> int:
    """The one raylet that is among some processes. Those that it starts have its name in their arguments."""
    (found,) = (process for process in processes if command(process).partition(" ")[0].endswith("/raylet"))
    return found


def raylet_option(raylet: int, name: str) -> str:
    """The value of an option that a raylet was started with."""
    found = re.search(rf"--{name}=(\S+)", command(raylet))
    assert found, f"process {raylet} is no raylet that has --{name}"
    return found[1]
