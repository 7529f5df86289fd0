"""What happened in a run, as plain data: strings, numbers and tuples, which can be pickled, kept and compared.

Times are seconds since the epoch by the driver's clock; those that a node told are its own. What is not known is None
or empty, and not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Activity(Enum):
    """What a launch does with its time."""

    SUBMITTING = "submitted, waiting for the driver"
    JOINING = "joining Ray"
    PLACING = "placing nodes"
    AGENTS = "starting agents"
    WORKERS = "starting workers, loading the function"
    RUNNING = "running"
    REPEATED = "running, in rounds that ended early"
    STOPPING = "stopping workers"
    WAITING = "between rounds"
    RESULTS = "storing results"
    ENDING = "ending agents"


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time in which no round ran.

    Attributes:
        activity: What the launch did meanwhile.
        started_at: Seconds since the epoch.
        ended_at: Seconds since the epoch.
    """

    activity: Activity
    started_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node says of itself.

    Attributes:
        hostname: Of the node, or of the pod.
        processor: The model of its processors.
        cpus: Logical ones that the agent may use.
        memory_bytes: Of the machine.
        devices: Names of the GPUs that the agent may use.
        versions: Package and version, of what a training depends on.
    """

    hostname: str = ""
    processor: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    devices: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ReportedNode:
    """One agent, and the node under it; a replacement has a number of its own.

    Attributes:
        number: Of the agent in this launch.
        address: Of the node.
        started_at: When the agent was started.
        ready_at: When it could take part; None if it never could.
        ended_at: When it was lost or given back before the end; None if it stayed.
        lost_because: Why it was lost; empty if it was not.
        resources: What the launch reserved on it: name and amount, ``memory`` in bytes.
        facts: What the node says of itself; None if nothing.
    """

    number: int
    address: str
    started_at: float
    ready_at: float | None = None
    ended_at: float | None = None
    lost_because: str = ""
    resources: tuple[tuple[str, float], ...] = ()
    facts: NodeFacts | None = None


@dataclass(frozen=True, slots=True)
class ReportedRank:
    """A rank in one round.

    Attributes:
        rank: Global rank.
        local_rank: On its node.
        node: Number of its ``ReportedNode``.
        outcome: A value of ``kfpytorch_ray.results.Outcome``; empty where it is not known.
        ended_at: When it ended.
        started_at: When its process was started; None where it is not known.
        called_at: When the function was called; None if it never was.
        exit_code: Negative for a signal.
        message: Exception class and text, or what is known instead.
        traceback: As Python prints it.
        log_tail: Last lines of its output.
        stacks: Of its threads, where it hung.
        step: The last one that it told.
        logs: URIs of the files with all of its output, where they are kept.
    """

    rank: int
    local_rank: int
    node: int
    outcome: str
    ended_at: float
    started_at: float | None = None
    called_at: float | None = None
    exit_code: int | None = None
    message: str = ""
    traceback: str = ""
    log_tail: tuple[str, ...] = ()
    stacks: str = ""
    step: int | None = None
    logs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric that a rank told in one round.

    Attributes:
        name: Such as ``"loss"``.
        rank: Of the rank.
        points: Step and value, by step.
    """

    name: str
    rank: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class ReportedRound:
    """One attempt of the whole worker group.

    Attributes:
        index: 0 for the first.
        started_at: Seconds since the epoch.
        ended_at: Seconds since the epoch.
        ending: Why it ended.
        succeeded: Whether every rank returned.
        nodes: Numbers of its agents, in the order of node ranks.
        ranks: By rank.
        cause: The rank whose end explains the others'; None without one.
        paid: What the round cost, and from which budget.
        metrics: What its ranks told by ``progress()``.
        node_ranks: Of ``nodes``, with gaps where nothing is known of a node; empty for 0, 1, 2 and so on.
    """

    index: int
    started_at: float
    ended_at: float
    ending: str
    succeeded: bool
    nodes: tuple[int, ...]
    ranks: tuple[ReportedRank, ...]
    cause: int | None = None
    paid: str = ""
    metrics: tuple[Metric, ...] = ()
    node_ranks: tuple[int, ...] = ()

    def node_rank(self, number: int) -> int:
        """The node rank of the agent with this number."""
        index = self.nodes.index(number)
        return self.node_ranks[index] if self.node_ranks else index


class Sample(NamedTuple):
    """What a rank's processes used at one time: the worker, and what it started.

    Attributes:
        round_index: Of the round.
        at: Seconds since the epoch.
        cpu_percent: Since the sample before; 100 is one core.
        memory_bytes: Resident.
        gpu_percent: How busy the rank's GPU was; None without one.
        gpu_memory_bytes: What of its memory was in use; None without one.
    """

    round_index: int
    at: float
    cpu_percent: float
    memory_bytes: int
    gpu_percent: float | None = None
    gpu_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class RankSamples:
    """What a rank used over time, in all rounds.

    Where there would be too many samples, each stands for equally many: how busy on average, and the largest memory.
    """

    rank: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent before the launch fails."""

    name: str
    spent: int
    limit: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the launch failed.

    Attributes:
        error: Name of the error's class.
        message: Its text: what happened, why, and how to fix it.
        retryable: Whether the same launch may succeed without a change.
    """

    error: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class RankDeck:
    """A flytekit deck that a rank made."""

    rank: int
    name: str
    html: str


@dataclass(frozen=True, slots=True)
class RunReport:
    """What happened in a run.

    Attributes:
        name: Of the task or function.
        run_id: Of the launch.
        backend: That ran it.
        started_at: Seconds since the epoch.
        ended_at: Seconds since the epoch.
        nodes: All agents that there were, by number.
        phases: When no round ran.
        rounds: By index.
        samples: What each rank used.
        budgets: What could be spent, and was.
        failure: Why it failed; None if it did not.
        versions: Package and version, where the driver ran.
        decks: Of ranks, where ``decks="all"``; of rank 0, where the launch failed.
    """

    name: str
    run_id: str
    backend: str
    started_at: float
    ended_at: float
    nodes: tuple[ReportedNode, ...] = ()
    phases: tuple[Phase, ...] = ()
    rounds: tuple[ReportedRound, ...] = ()
    samples: tuple[RankSamples, ...] = ()
    budgets: tuple[Budget, ...] = ()
    failure: Failure | None = None
    versions: tuple[tuple[str, str], ...] = ()
    decks: tuple[RankDeck, ...] = ()
