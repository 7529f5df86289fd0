"""Where a launch stands, as plain data, and the words for it. Pure: no terminal, no thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from kfpytorch_ray.metrics import MetricPoint

_SPEED_WINDOW_S = 30.0
"""Steps per second are those of the last half minute."""
_MOST_SHOWN = 6
"""Metrics in a line."""


class Phase(Enum):
    """What a launch is doing."""

    CONNECTING = "connecting to Ray"
    PLACING = "placing nodes"
    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True)
class Steps:
    """How far a round is.

    Attributes:
        latest: Rank 0's last call of ``progress()``.
        window: When which step was told, lately, and since steps were last counted anew.
    """

    latest: MetricPoint | None = None
    window: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, points: Iterable[MetricPoint]) -> None:
        """Take points in their order."""
        for point in points:
            if self.latest is not None and (point.step < self.latest.step or point.at < self.latest.at):
                # Steps are counted anew in each epoch, and a clock may be set back: no speed spans that.
                self.window.clear()
            self.latest = point
            self.window.append((point.at, point.step))
            while len(self.window) > 2 and point.at - self.window[0][0] > _SPEED_WINDOW_S:
                self.window.popleft()

    @property
    def per_second(self) -> float | None:
        """Steps per second lately; None where that is not known."""
        if len(self.window) < 2:
            return None
        (began, first), (ended, last) = self.window[0], self.window[-1]
        return (last - first) / (ended - began) if ended > began and last > first else None

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step at this speed; None where that is not known."""
        speed, latest = self.per_second, self.latest
        if speed is None or latest is None or latest.total is None:
            return None
        return max(0, latest.total - latest.step) / speed


@dataclass(slots=True)
class Status:
    """Where a launch stands.

    Attributes:
        name: Of the launch.
        run_id: Of the launch.
        phase: What it is doing.
        placed: Nodes that it has.
        wanted: Nodes that it needs.
        why: Why there are not more; empty where nobody has said.
        round_index: Of the round that runs, or ran last; None before the first.
        rounds: Rounds that its restarts allow, and those that were not counted.
        world: Ranks of the round.
        alive: Ranks whose process runs, as far as is known.
        began: Monotonic seconds at which the phase began.
        steps: How far the round is.
    """

    name: str
    run_id: str
    phase: Phase = Phase.CONNECTING
    placed: int = 0
    wanted: int = 0
    why: str = ""
    round_index: int | None = None
    rounds: int = 1
    world: int = 0
    alive: int | None = None
    began: float = field(default_factory=time.monotonic)
    steps: Steps = field(default_factory=Steps)

    def enter(self, phase: Phase) -> None:
        """Another phase begins, if it is another."""
        if phase is not self.phase:
            self.phase = phase
            self.began = time.monotonic()

    def headline(self) -> str:
        """What it is doing, in a few words."""
        match self.phase:
            case Phase.PLACING:
                return f"placing {self.placed}/{self.wanted} nodes"
            case Phase.STARTING:
                return f"starting on {self.placed} {'node' if self.placed == 1 else 'nodes'}"
            case Phase.RUNNING:
                assert self.round_index is not None
                return f"round {self.round_index + 1}/{max(self.rounds, self.round_index + 1)}"
            case Phase.CONNECTING | Phase.ENDED:
                return str(self.phase.value)

    def ranks(self) -> str:
        """How many ranks there are, and run."""
        alive = self.world if self.alive is None else self.alive
        return f"{alive}/{self.world} ranks"


def clock(seconds: float) -> str:
    """``00:41``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def shown_steps(steps: Steps) -> list[str]:
    """Step, speed, remaining time and metrics of a round, for people."""
    latest = steps.latest
    if latest is None:
        return []
    parts = [f"step {latest.step}" + (f"/{latest.total}" if latest.total is not None else "")]
    speed = steps.per_second
    if speed is not None:
        parts.append(f"{speed:.3g} steps/s" if speed >= 0.1 else f"{1 / speed:.3g} s/step")
    if (left := steps.left_s) is not None:
        parts.append(f"ETA {clock(left)}")
    return parts + [f"{name} {value:.4g}" for name, value in [*latest.values.items()][:_MOST_SHOWN]]
