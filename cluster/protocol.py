"""What controller, agents and workers tell each other: plain data, sent by Ray or by the fork server's pipe.

No behaviour lives here, and nothing here imports ray or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kfpytorch_ray.config import DEFAULT_MAX_LOG_BYTES
from kfpytorch_ray.metrics import MetricPoint
from kfpytorch_ray.plan import Contract, FlyteContext
from kfpytorch_ray.rank_decks import RANK_0
from kfpytorch_ray.report.data import RankDeck, Sample
from kfpytorch_ray.results import RankRecord, Stage


@dataclass(frozen=True, slots=True)
class AgentSetup:
    """What an agent needs once for a launch, before its first round.

    Attributes:
        name: Of the launch, for people.
        run_id: TORCHELASTIC_RUN_ID.
        nproc_per_node: Workers of this agent.
        contract: The environment the workers find.
        environment: Variables laid over those of the node.
        sys_path: The driver's module search path; entries that exist on the node are appended to the worker's.
            Relative ones are within the working directory that was sent, where the agent starts, and come first.
        working_directory: Where workers start; empty for where Ray starts the agent.
        preload: Modules that the fork server imports.
        flyte: The Flyte context of the workers.
        payload_sha256: Of the pickled call, checked before it is unpickled.
        driver_address: The address that Ray knows for the driver's node. Files that rank 0 returns on another one are
            uploaded there.
        max_restarts: TORCHELASTIC_MAX_RESTARTS.
        monitor_interval_s: Longest time between two looks at the workers.
        stop_grace_s: Seconds between SIGTERM and SIGKILL.
        silence_timeout_s: Seconds without a pulse of the controller after which the agent and its workers end.
        launch_id: Another one for every launch, so that an order which comes late stops no round of the next launch.
        logs: Whose lines the driver prints: ``"rank0"``, ``"all"`` or ``"none"``.
        max_log_bytes: Largest file of one rank's lines in one round.
        log_archive: URI of the folder where these files are kept; empty: nowhere.
        decks: Whose decks come home: one of ``kfpytorch_ray.rank_decks.CHOICES``.
        known_as: By which people know the run; empty: by ``run_id``.
    """

    name: str
    run_id: str
    nproc_per_node: int
    contract: Contract
    environment: Mapping[str, str]
    sys_path: tuple[str, ...]
    working_directory: str
    preload: tuple[str, ...]
    flyte: FlyteContext
    payload_sha256: str
    driver_address: str
    max_restarts: int
    monitor_interval_s: float
    stop_grace_s: float
    silence_timeout_s: float
    launch_id: str = ""
    logs: str = "rank0"
    max_log_bytes: int = DEFAULT_MAX_LOG_BYTES
    log_archive: str = ""
    decks: str = RANK_0
    known_as: str = ""

    def same_agent(self, other: AgentSetup) -> bool:
        """Whether the agents of one launch can serve the other.

        What modules may have read while they were imported, and what agents were built for, has to be the same.
        """
        ours, theirs = (
            (
                *(one.nproc_per_node, one.environment, one.silence_timeout_s, one.preload),
                one.sys_path if one.preload else (),
            )
            for one in (self, other)
        )
        return ours == theirs


@dataclass(frozen=True, slots=True)
class RoundAssignment:
    """An agent's part in one round.

    Attributes:
        round_index: 0 for the first round.
        restart_count: Restarts so far that counted against ``max_restarts``.
        node_rank: Of this agent.
        node_count: Agents in this round.
        master_address: Address of the node that holds rank 0.
        master_port: Port of that node's store, open before any worker starts.
    """

    round_index: int
    restart_count: int
    node_rank: int
    node_count: int
    master_address: str
    master_port: int


@dataclass(frozen=True, slots=True)
class NodePulse:
    """An agent's answer to the controller's pulse.

    Attributes:
        round_index: Of the round that runs; None between rounds.
        idle_s: Seconds since a worker of this agent last made progress, or since the round started here.
        listening: Whether a worker has asked ``stop_requested()`` in this round.
        alive: Workers of this agent whose process runs.
        samples: What ranks used since the pulse before.
        points: What rank 0 has told by ``progress()`` since the last answer that is known to have arrived, if it is
            here; some may come twice.
    """

    round_index: int | None
    idle_s: float
    listening: bool
    alive: int = 0
    samples: tuple[tuple[int, Sample], ...] = ()
    points: tuple[MetricPoint, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeReport:
    """How the workers of one agent ended in one round.

    Attributes:
        node_rank: Of the agent.
        ranks: By local rank, how they ended.
        decks: That they have left.
        samples: What they used, as far as no pulse has said it.
        points: As in ``NodePulse``: the last ones of the round.
    """

    node_rank: int
    ranks: tuple[RankRecord, ...]
    decks: tuple[RankDeck, ...] = ()
    samples: tuple[tuple[int, Sample], ...] = ()
    points: tuple[MetricPoint, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What one worker process is given.

    Attributes:
        environment: Its whole environment.
        sys_path: Entries for the module search path, as in ``AgentSetup``.
        working_directory: Where it starts; empty for where its agent is.
        payload: File with the pickled call.
        payload_sha256: Of that file, checked before it is unpickled.
        stdout: File for its standard output.
        stderr: File for its standard error.
        failure: File that it writes when it fails.
        result: File name stem of its result.
        result_directories: Where the result may go, best first.
        flyte: Its Flyte context.
        upload_files: Whether it uploads files that it returns.
        stacks: File for the stacks of its threads, when it is asked for them.
        decks: File for its decks; empty where nobody wants them.
        all_decks: Whether they are wanted however it ends.
    """

    environment: Mapping[str, str]
    sys_path: tuple[str, ...]
    working_directory: str
    payload: str
    payload_sha256: str
    stdout: str
    stderr: str
    failure: str
    result: str
    result_directories: tuple[str, ...]
    flyte: FlyteContext
    upload_files: bool
    stacks: str
    decks: str = ""
    all_decks: bool = False


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """What a worker writes of its own failure.

    Attributes:
        stage: Where it failed.
        message: Exception class and text; of a long text, here and in the traceback, its beginning and its end.
        traceback: As Python prints it.
        timestamp: Seconds since the epoch.
        recoverable: Whether it is a ``FlyteRecoverableException``.
        stderr_size_bytes: Size of its standard error before Python prints the traceback there.
        exception: The pickled exception; None where it cannot be pickled, or is larger than 1 MiB.
    """

    stage: Stage
    message: str
    traceback: str
    timestamp: float
    recoverable: bool
    stderr_size_bytes: int
    exception: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class SupervisorSetup:
    """What an agent gives its supervisor process.

    Attributes:
        nproc_per_node: Workers of this agent.
        address: The address that Ray knows for this node.
        folder: For logs and error files.
        payload: File with the pickled call.
        result_folders: Where results may go, best first.
        preload: Modules that the fork server should have imported.
    """

    nproc_per_node: int
    address: str
    folder: str
    payload: str
    result_folders: tuple[str, ...]
    preload: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """First word of a supervisor: the fork server is warm.

    Attributes:
        missing: But for these modules, which could not be imported, and why.
        refused: Modules that no fork can have, and why; then it is of no use.
    """

    missing: Mapping[str, str]
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BeginLaunch:
    """Comes before the rounds of a launch; answered with None. No order of the launch before counts any more.

    Attributes:
        setup: What holds for all rounds.
        folder: For the launch's files: what its ranks print, error files.
    """

    setup: AgentSetup
    folder: str


@dataclass(frozen=True, slots=True)
class EndLaunch:
    """Asks for the last log lines to be passed on; answered when they are."""


@dataclass(frozen=True, slots=True)
class OpenStore:
    """Asks for the store of the next round; answered with its port."""


@dataclass(frozen=True, slots=True)
class StopRound:
    """Ends this round, and any before it. Not answered: the round's own answer comes sooner.

    Attributes:
        round_index: The round.
        hung: Whether its ranks have hung: then their stacks are taken first.
    """

    round_index: int
    hung: bool = False


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Asks the supervisor to pass on the last log lines and end; answered when it has passed them on."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Answer to a ``RoundAssignment``: what became of the workers, and the files with their results by local rank."""

    report: NodeReport
    results: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Failing:
    """Comes before ``Finished`` when a rank of this node has failed: the others here are being stopped now."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Answer to a request that raised in the supervisor."""

    traceback: str


class PreloadRefusedError(Exception):
    """A module that the user wants in the fork server cannot be in one.

    Args:
        refused: Modules, and what each does.
    """

    def __init__(self, refused: Mapping[str, str]) -> None:
        super().__init__(refused)
        self.refused = refused


class SupervisorLostError(Exception):
    """The supervisor process died; its agent is of no use any more."""
