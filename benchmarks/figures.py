"""What is measured: which samples, of whom, and the goal for each figure."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.trainings import SHARD_BYTES, STATE_BYTES

OURS, WARM = "kfpytorch_ray", "kfpytorch_ray, warm"
SPAWN, SPAWN_QUICK, FORK = "upstream", "upstream, 0.1 s interval", "upstream, fork"
REAL, SIMULATED, SIMULATED_FEW = "16 warm agents", "1,000 simulated agents", "100 simulated agents"
TORCHRUN, TRAIN = "torchrun", "Ray Train v2"
COPIES = "three plain copies"

Medians = Mapping[str, float]
"""By contender; those that failed are not in it."""


@dataclass(frozen=True)
class Goal:
    """What a figure is to reach.

    Attributes:
        text: For people.
        of: Whose figure it is.
        limit: From all medians to the bound; raises KeyError where a peer has none.
        meets: Compares the figure with the bound.
    """

    text: str
    of: str
    limit: Callable[[Medians], float]
    meets: Callable[[float, float], bool] = operator.le

    def met(self, medians: Medians) -> bool | None:
        """Whether it is met; None where a peer has no figure to compare with."""
        try:
            return self.meets(medians[self.of], self.limit(medians))
        except KeyError:
            return None if self.of in medians else False


@dataclass(frozen=True)
class Figure:
    """A number that is taken from samples.

    Attributes:
        title: For people.
        unit: Of the number.
        pick: From a sample to the number.
        contenders: Whose samples it is taken from.
        goals: What is to be reached.
    """

    title: str
    unit: str
    pick: Callable[[Any], float]
    contenders: tuple[str, ...]
    goals: tuple[Goal, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """Samples that are taken in turn of all contenders.

    Attributes:
        name: To choose it by.
        contenders: Of each the driver, the scenario and its arguments.
        figures: What is taken from the samples.
        quick: Whether it is measured where there is little time.
    """

    name: str
    contenders: Mapping[str, tuple[str, str, Mapping[str, Any]]]
    figures: tuple[Figure, ...]
    quick: bool = True


def _key(name: str, sample: Mapping[str, float]) -> float:
    return sample[name]


def _fixed(bound: float) -> Callable[[Medians], float]:
    return lambda _: bound


def _share(of: str, share: float) -> Callable[[Medians], float]:
    return lambda medians: medians[of] * share


def _gb_per_s(size_bytes: int, seconds: float) -> float:
    return size_bytes / 1e9 / seconds


_STARTS = (OURS, WARM, SPAWN, SPAWN_QUICK, FORK, TRAIN)

EXPERIMENTS: tuple[Experiment, ...] = (
    # First, because it starts a Ray, which takes longer beside others.
    Experiment(
        "digits",
        {OURS: ("imports", "digits", {})},
        (Figure("python examples/digits.py, process start to first step", "s", float, (OURS,)),),
    ),
    Experiment(
        "start",
        {
            OURS: ("ours", "start", {"warm": False}),
            WARM: ("ours", "start", {"warm": True}),
            SPAWN: ("upstream", "start", {}),
            SPAWN_QUICK: ("upstream", "start", {"interval_s": 0.1}),
            FORK: ("upstream_fork", "start", {}),
            TRAIN: ("raytrain", "start", {}),
        },
        (
            Figure(
                "call to the first line on every rank",
                "s",
                partial(_key, "line"),
                _STARTS,
                (
                    Goal("cold: 1/3 of Ray Train v2", OURS, _share(TRAIN, 1 / 3)),
                    Goal("cold: upstream + 1.5 s", OURS, lambda medians: medians[SPAWN] + 1.5),
                    Goal("warm: 0.1 s", WARM, _fixed(0.1)),
                    Goal("warm: 1/30 of upstream", WARM, _share(SPAWN, 1 / 30)),
                ),
            ),
            Figure(
                "trivial task (4 ranks, one all_reduce), call to return",
                "s",
                partial(_key, "whole"),
                _STARTS,
                (
                    Goal("warm: 0.2 s", WARM, _fixed(0.2)),
                    Goal("warm: 1/30 of upstream", WARM, _share(SPAWN, 1 / 30)),
                ),
            ),
        ),
    ),
    Experiment(
        "restart",
        {
            WARM: ("ours", "restart", {}),
            SPAWN: ("upstream", "restart", {}),
            SPAWN_QUICK: ("upstream", "restart", {"interval_s": 0.1}),
            TORCHRUN: ("torchrun", "restart", {}),
            TRAIN: ("raytrain", "restart", {}),
        },
        (
            Figure(
                "SIGKILL of a rank to the first line of all in the next round",
                "s",
                float,
                (WARM, SPAWN, SPAWN_QUICK, TORCHRUN, TRAIN),
                (
                    Goal("0.2 s", WARM, _fixed(0.2)),
                    Goal("1/6 of torchrun", WARM, _share(TORCHRUN, 1 / 6)),
                    Goal("1/20 of upstream", WARM, _share(SPAWN, 1 / 20)),
                    Goal("1/20 of Ray Train v2", WARM, _share(TRAIN, 1 / 20)),
                ),
            ),
        ),
    ),
    Experiment(
        "last-death",
        {WARM: ("ours", "last_death", {})},
        (
            Figure(
                "first rank's death to the last's, 2 nodes, in a collective",
                "s",
                float,
                (WARM,),
                (Goal("0.3 s", WARM, _fixed(0.3)),),
            ),
        ),
    ),
    Experiment(
        "lost-node",
        {OURS: ("ours", "lost_node", {}), TRAIN: ("raytrain", "lost_node", {})},
        (
            Figure(
                "raylet killed, 1 of 3: Ray's report to the next round's first line",
                "s",
                partial(_key, "reported"),
                (OURS, TRAIN),
                (Goal("0.5 s", OURS, _fixed(0.5)),),
            ),
            Figure(
                "raylet killed, 1 of 3: whole recovery",
                "s",
                partial(_key, "whole"),
                (OURS, TRAIN),
                (Goal("1/4 of Ray Train v2", OURS, _share(TRAIN, 1 / 4)),),
            ),
        ),
        quick=False,
    ),
    Experiment(
        "state-dict",
        {
            WARM: ("ours", "state_dict", {}),
            SPAWN: ("upstream", "state_dict", {}),
            FORK: ("upstream_fork", "state_dict", {}),
            COPIES: ("copies", "state_dict", {}),
        },
        (
            Figure(
                "state dict of 1 GiB from rank 0",
                "GB/s",
                lambda sample: _gb_per_s(STATE_BYTES, sample["seconds"]),
                (WARM, SPAWN, FORK, COPIES),
                (Goal("1 GB/s", WARM, _fixed(1.0), operator.ge),),
            ),
            Figure(
                "extra memory meanwhile, in sizes of the state dict",
                "x",
                lambda sample: sample["extra"] / STATE_BYTES,
                (WARM, SPAWN, FORK),
                (Goal("2 x", WARM, _fixed(2.0)),),
            ),
        ),
    ),
    Experiment(
        "shards",
        {WARM: ("ours", "shards", {})},
        (
            Figure(
                "64 MiB from each of 8 ranks",
                "GB/s",
                lambda sample: _gb_per_s(8 * SHARD_BYTES, sample),
                (WARM,),
                (Goal("1 GB/s", WARM, _fixed(1.0), operator.ge),),
            ),
        ),
    ),
    Experiment(
        "steps",
        {OURS: ("ours", "steps", {}), TORCHRUN: ("torchrun", "steps", {})},
        (
            Figure(
                "DDP steps of the digits CNN, 2 ranks",
                "1/s",
                float,
                (OURS, TORCHRUN),
                (Goal("0.99 of torchrun", OURS, _share(TORCHRUN, 0.99), operator.ge),),
            ),
        ),
    ),
    Experiment(
        "controller",
        {
            REAL: ("controlling", "real", {}),
            SIMULATED: ("controlling", "simulated", {}),
            SIMULATED_FEW: ("controlling", "simulated_few", {}),
        },
        (
            Figure(
                "the driver's processor time for a round, by agent",
                "ms",
                lambda sample: sample * 1e3,
                (REAL, SIMULATED, SIMULATED_FEW),
                (
                    Goal("16 agents: 5 ms", REAL, _fixed(5.0)),
                    Goal("1,000 agents: 5 ms", SIMULATED, _fixed(5.0)),
                    Goal("linear: at most 2 x that of 100", SIMULATED, _share(SIMULATED_FEW, 2.0)),
                ),
            ),
        ),
    ),
    Experiment(
        "import",
        {OURS: ("imports", "ours", {}), SPAWN: ("imports", "upstream", {})},
        (
            Figure(
                "import of what a task takes, in a new process",
                "s",
                float,
                (OURS, SPAWN),
                (Goal("upstream", OURS, _share(SPAWN, 1.0)),),
            ),
        ),
    ),
)
