"""The pulse of agents, without Ray: whose silence it is, after the driver itself has stood still."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from kfpytorch_ray.cluster import pulse
from kfpytorch_ray.cluster.protocol import NodePulse
from kfpytorch_ray.cluster.pulse import Pulse
from kfpytorch_ray.testing import wait_until

TIMEOUT_S = 1000.0
ANSWER = NodePulse(round_index=0, idle_s=0.0, listening=False, alive=1, samples=(), points=())

until = partial(wait_until, what="what the test asks for", timeout_s=60)


@dataclass
class Agents:
    """Stands for Ray and for agents that answer, unless they are told not to.

    Attributes:
        now: The clock.
        silent: Agents that do not answer.
        asked: How often each was asked.
        held: Cleared, it holds up the thread that listens, as when the process is stopped.
        listens: Whether that has happened.
    """

    now: float = 0.0
    silent: set[str] = field(default_factory=set)
    asked: dict[str, int] = field(default_factory=dict)
    held: threading.Event = field(default_factory=threading.Event)
    listens: threading.Event = field(default_factory=threading.Event)

    def wait(self, refs: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        while not self.held.wait(0.01):
            self.listens.set()
        return [ref for ref in refs if ref not in self.silent], []

    def get(self, ref: str) -> NodePulse:
        return ANSWER

    def handle(self, name: str) -> Any:
        agents = self

        class Handle:
            class pulse:  # noqa: N801 - the name of the actor's method
                @staticmethod
                def remote() -> str:
                    agents.asked[name] = agents.asked.get(name, 0) + 1
                    return name

        return Handle


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Agents:
    agents = Agents()
    agents.held.set()
    monkeypatch.setattr(pulse, "ray", agents)
    monkeypatch.setattr(pulse, "_now", lambda: agents.now)
    # A turn is at once over, whatever the clock says.
    monkeypatch.setattr(pulse, "_PULSES_PER_TIMEOUT", 1e6)
    return agents


@pytest.fixture
def taken(agents: Agents) -> Iterator[Pulse]:
    taken = Pulse(TIMEOUT_S, lambda _agent, _answer: None)
    for number, name in enumerate(("one", "other")):
        taken.watch(number, agents.handle(name))
    yield taken
    agents.held.set()
    taken.close()


def test_an_agent_that_does_not_answer_is_silent(agents: Agents, taken: Pulse) -> None:
    """And only it."""
    agents.silent.add("other")
    for _ in range(4):
        until(lambda: taken.latest(0) is not None)
        agents.now += TIMEOUT_S / 3
        before = agents.asked["one"]
        until(lambda before=before: agents.asked["one"] > before + 2)
    assert taken.silent() == {1}
    assert not taken.stood_still


@pytest.mark.parametrize("first", ["silent", "stood_still"])
def test_after_a_standstill_the_others_get_their_time_anew(first: str, agents: Agents, taken: Pulse) -> None:
    """Whichever thread goes on first: here the pulse's own comes last."""
    until(lambda: taken.latest(0) is not None and taken.latest(1) is not None)
    agents.held.clear()
    agents.listens.clear()
    assert agents.listens.wait(60)
    agents.now += 3 * TIMEOUT_S
    if first == "silent":
        assert taken.silent() == set()
    assert taken.stood_still
    agents.held.set()
    assert taken.silent() == set()
    # And later a silence is one again.
    agents.silent.add("other")
    for _ in range(4):
        agents.now += TIMEOUT_S / 3
        before = agents.asked["one"]
        until(lambda before=before: agents.asked["one"] > before + 2)
    assert taken.silent() == {1}
    assert not taken.stood_still
