"""What comes back from a launch: values, and what became of every rank.

Free of Ray, torch and flytekit: the records are plain data that can be pickled, shown and kept, and how a value that
still lies on another machine is fetched is a callable that the backend hands in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from kfpytorch_ray.metrics import MetricPoint
from kfpytorch_ray.report.carrier import Reported
from kfpytorch_ray.report.data import RunReport

if TYPE_CHECKING:
    from flytekit import Deck
    from flytekit.core.context_manager import OutputMetadata


class ElasticWorkerResult(NamedTuple):
    """What one worker process brings home.

    Attributes:
        return_value: What the function returned.
        decks: The flytekit decks made in the worker.
        om: Output metadata that the function attached to its return value.
    """

    return_value: Any
    decks: list[Deck]
    om: OutputMetadata | None = None


class Outcome(Enum):
    """How a rank ended."""

    SUCCEEDED = "succeeded"
    RAISED = "raised"
    EXITED = "exited"
    """With a code other than 0 and without an exception: ``sys.exit(3)``, ``os._exit(3)``."""
    KILLED = "killed"
    """By a signal that this launch did not send."""
    HUNG = "hung"
    """Still running when no rank had made progress for ``hang_timeout_s``."""
    LOST = "lost"
    """With its agent or node."""
    STOPPED = "stopped"
    """By this launch, because another rank failed, the nodes changed or the user cancelled. Never a cause."""


class Stage(Enum):
    """What a rank was doing when it raised."""

    LOAD = "loading the function and its inputs"
    CALL = "running the function"
    RESULT = "pickling the return value"


class Ending(Enum):
    """Why a round ended."""

    SUCCEEDED = "every rank returned"
    FAILED = "a rank failed"
    HUNG = "no rank made progress"
    NODE_LOST = "an agent or a node was lost"
    DRAINED = "a node is being drained"
    GROWN = "more nodes arrived"
    DEADLINE = "the deadline passed"


@dataclass(frozen=True, slots=True)
class RankRecord:
    """How one rank ended in one round.

    Attributes:
        rank: Global rank.
        local_rank: Rank on its node.
        node_rank: Rank of its node.
        node: Address of its node.
        outcome: How it ended.
        exit_code: Exit code, negative for a signal; None where it is not known.
        timestamp: Seconds since the epoch at which it ended.
        message: Exception class and text, or what is known instead. Of more than 64 Ki characters, here and in the
            traceback, the middle is left out.
        traceback: The remote traceback, empty without one.
        stage: What it was doing when it raised.
        recoverable: Whether it raised ``FlyteRecoverableException``.
        exception: The pickled exception, None where it cannot be pickled or is larger than 1 MiB.
        log_tail: Last lines of its output, at most 20.
        out_of_memory: Whether the kernel's out-of-memory killer was at work in its cgroup during the round.
        progressed: Whether it called ``progress()`` or wrote a checkpoint in this round.
        step: The last one that it told ``progress()``; None if it told none.
        stacks: Of all its threads, where it hung; empty otherwise.
        logs: URIs of the files with what it printed in this round, where they are kept: one, or where its node was
            lost meanwhile up to three, to be read in their order.
        started_at: Seconds since the epoch at which its process was started; None where it never was.
        called_at: Seconds since the epoch at which it began to run the function; None where it never did.
        ended_at: Seconds since the epoch at which its process had ended; None where that is not known. A rank that
            raised did so at ``timestamp``.
    """

    rank: int
    local_rank: int
    node_rank: int
    node: str
    outcome: Outcome
    exit_code: int | None
    timestamp: float
    message: str = ""
    traceback: str = ""
    stage: Stage = Stage.CALL
    recoverable: bool = False
    exception: bytes | None = None
    log_tail: tuple[str, ...] = ()
    out_of_memory: bool = False
    progressed: bool = False
    step: int | None = None
    stacks: str = ""
    logs: tuple[str, ...] = ()
    started_at: float | None = None
    called_at: float | None = None
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One attempt of the whole worker group.

    Attributes:
        index: 0 for the first round.
        world_size: Workers on all nodes.
        nodes: Addresses of the nodes, by node rank.
        started_at: Seconds since the epoch.
        ended_at: Seconds since the epoch.
        ranks: How every rank ended, by rank.
        ending: Why the round ended.
        metrics: What rank 0 told by ``progress()``, in its order; at most 1000 points, evenly.
    """

    index: int
    world_size: int
    nodes: tuple[str, ...]
    started_at: float
    ended_at: float
    ranks: tuple[RankRecord, ...]
    ending: Ending = Ending.SUCCEEDED
    metrics: tuple[MetricPoint, ...] = ()

    @property
    def succeeded(self) -> bool:
        """Whether every rank returned."""
        return all(rank.outcome is Outcome.SUCCEEDED for rank in self.ranks)


def logs_of(rounds: Iterable[RoundRecord]) -> dict[int, tuple[str, ...]]:
    """URIs of the files with what each rank printed, by rank, in the order of rounds; none where they are not kept."""
    logs: dict[int, tuple[str, ...]] = {}
    for record in rounds:
        for rank in record.ranks:
            if rank.logs:
                logs[rank.rank] = (*logs.get(rank.rank, ()), *rank.logs)
    return dict(sorted(logs.items()))


class ElasticResult(Reported, Mapping[int, ElasticWorkerResult]):
    """The results of a launch by global rank; a rank's value is fetched when it is first asked for.

    ``save_html(path)`` and ``deck`` show what happened, ``report`` has it as data (kfpytorch_ray.report.data).

    Args:
        ranks: The ranks whose results can be had here: all of them, but those of this node only on the kubeflow
            backend inside a PyTorchJob.
        fetch: Brings one rank's result. Called once per rank.
        rounds: What became of every rank, one record for each round; the last one succeeded.
        run_id: Of a run on a cluster that is elsewhere; empty for others.
        report: What happened; None where the backend does not say.
    """

    def __init__(
        self,
        ranks: tuple[int, ...],
        fetch: Callable[[int], ElasticWorkerResult],
        rounds: tuple[RoundRecord, ...] = (),
        run_id: str = "",
        report: RunReport | None = None,
    ) -> None:
        self._ranks = ranks
        self._fetch = fetch
        self._fetched: dict[int, ElasticWorkerResult] = {}
        self.rounds = rounds
        self.run_id = run_id
        self.report = report

    def __getitem__(self, rank: int) -> ElasticWorkerResult:
        if rank not in self._ranks:
            raise KeyError(rank)
        if rank not in self._fetched:
            self._fetched[rank] = self._fetch(rank)
        return self._fetched[rank]

    def __contains__(self, rank: object) -> bool:
        return rank in self._ranks

    def __iter__(self) -> Iterator[int]:
        return iter(self._ranks)

    def __len__(self) -> int:
        return len(self._ranks)

    def __repr__(self) -> str:
        return f"ElasticResult(ranks={self._ranks}, fetched={tuple(self._fetched)}, rounds={len(self.rounds)})"

    @property
    def decks(self) -> list[Deck]:
        """Rank 0's decks; those of rank 1 are ``result[1].decks``."""
        return self[0].decks

    @property
    def logs(self) -> dict[int, tuple[str, ...]]:
        """URIs of the files with what each rank printed, by rank, one for each round; none where they are not kept."""
        return logs_of(self.rounds)
