"""The errors a user of kfpytorch_ray can meet.

    KfpytorchRayError
    ├── ConfigError (ValueError)            wrong arguments; every problem is listed at once
    │   └── WorkingDirError                 the working directory cannot be sent to the cluster
    ├── BackendUnavailableError             the backend's name is unknown or its package is missing
    ├── PayloadError                        the function or an input cannot be pickled
    ├── PlacementError                      the nodes could not be had
    │   ├── InfeasibleError                 no node of the cluster can ever hold one
    │   └── PlacementTimeoutError           not within the join timeout              (retryable)
    ├── ClusterError                        a cluster that an address names cannot be used
    │   ├── ClusterUnreachableError         nobody answers there                     (retryable)
    │   ├── AuthenticationError             it refuses who asks (401, 403)
    │   └── VersionMismatchError            what runs here and there do not fit together
    ├── StorageError (OSError)              the folder between here and a cluster cannot be used
    │   └── IntegrityError                  a file there is not what was written
    ├── RunError                            a remote run cannot give what is asked of it
    │   ├── UnknownRunError                 there is none with this id
    │   ├── ResultCollectedError            its result has been taken
    │   ├── RunPendingError (TimeoutError)  it has not ended yet
    │   └── RunStoppedError                 it was cancelled, or its lease ran out
    └── LaunchError                         the launch started and failed
        ├── WorkerFailedError               a rank raised, exited or was killed
        │   ├── RecoverableWorkerError      a rank raised FlyteRecoverableException  (retryable)
        │   └── WorkerHungError             no rank made progress for hang_timeout_s
        ├── ResultError                     a rank's return value cannot be pickled
        ├── NodeLostError                   an agent or its node died                (retryable)
        ├── RunLostError                    a remote driver ended without a word     (retryable)
        ├── LaunchInterruptedError          SIGTERM or SIGINT reached the agent      (retryable)
        └── DeadlineExceededError           RunPolicy.active_deadline_seconds passed

``retryable`` says whether Flyte may run the task again; only the task classes translate it into Flyte's own
exceptions. Constructor parameters equal ``args``, so that pickle and Ray rebuild an error with its fields; the report,
which is set later, comes with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kfpytorch_ray.report.carrier import Reported

if TYPE_CHECKING:
    from kfpytorch_ray.results import RoundRecord


TORCH_IMPORT_ERROR_MESSAGE = "PyTorch is not installed, and elastic tasks need it. Install it with: pip install torch"


def explain(what: str, why: str, fix: str) -> str:
    """The shape of every message: what happened, why, and how to fix it."""
    return f"{what}\nWhy: {why}\nFix: {fix}"


def text_of(error: BaseException) -> str:
    """Class and text of an exception that may be a user's, whose ``__str__`` may raise anything."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - what it says of itself is lost; its class and traceback are not
        # As Python's own tracebacks have it.
        text = "<exception str() failed>"
    return f"{type(error).__name__}: {text}"


class KfpytorchRayError(Reported, Exception):
    """Root of the tree. What a launch raises once it has begun carries its report: ``error.save_html(path)``.

    Attributes:
        retryable: Whether running the same task again may succeed without a change.
    """

    retryable: ClassVar[bool] = False


class ConfigError(KfpytorchRayError, ValueError):
    """Arguments that cannot work.

    Args:
        subject: What was being configured, for example ``"Elastic"``.
        problems: One sentence for each wrong field; further lines of it are shown below it.
    """

    def __init__(self, subject: str, problems: tuple[str, ...]) -> None:
        super().__init__(subject, problems)
        self.subject = subject
        self.problems = problems

    def __str__(self) -> str:
        listed = "\n".join("  - " + problem.replace("\n", "\n    ") for problem in self.problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return f"{self.subject}: {count}\n{listed}"


class WorkingDirError(ConfigError):
    """The working directory cannot be sent to the cluster as it is; ``subject`` names it.

    Each of ``problems`` says what, why and how to fix it.
    """


class BackendUnavailableError(KfpytorchRayError, ImportError):
    """The backend's name is unknown, or a package that it needs is not installed."""


class PayloadError(KfpytorchRayError, TypeError):
    """The function or one of its inputs cannot be pickled for the workers."""


class PlacementError(KfpytorchRayError, RuntimeError):
    """The nodes of a launch could not be had."""


class InfeasibleError(PlacementError):
    """The cluster has no node, and no autoscaler to make one, that could hold what is asked."""


class PlacementTimeoutError(PlacementError, TimeoutError):
    """The nodes were not free within the join timeout."""

    retryable: ClassVar[bool] = True


class ClusterError(KfpytorchRayError, RuntimeError):
    """A cluster that an address names cannot be used."""


class ClusterUnreachableError(ClusterError, ConnectionError):
    """Nobody answers at the address, or not as what is looked for there."""

    retryable: ClassVar[bool] = True


class AuthenticationError(ClusterError, PermissionError):
    """The cluster refuses the request: no token, a wrong one, or one that may not do this."""


class VersionMismatchError(ClusterError):
    """Python, a package or the protocol differs between here and the cluster so that values would not arrive."""


class StorageError(KfpytorchRayError, OSError):
    """The storage that a launch and its cluster share cannot be read or written."""


class IntegrityError(StorageError):
    """A file in the storage does not have the SHA-256 that was announced: it is torn, or somebody changed it."""


class RunError(KfpytorchRayError, RuntimeError):
    """A remote run cannot give what is asked of it."""


class UnknownRunError(RunError, LookupError):
    """The storage knows no run with this id."""


class ResultCollectedError(RunError):
    """The result has been taken, and was removed from the storage with that."""


class RunPendingError(RunError, TimeoutError):
    """The run has not ended within the time that was given."""


class RunStoppedError(RunError):
    """The run was cancelled, or stopped itself because its lease had run out."""


class LaunchError(KfpytorchRayError, RuntimeError):
    """A launch that started and failed.

    Args:
        message: What happened, why, and how to fix it.
        timestamp: Seconds since the epoch of the failure that is reported.
        rounds: What became of every rank, one record for each round.
    """

    def __init__(self, message: str, timestamp: float = 0.0, rounds: tuple[RoundRecord, ...] = ()) -> None:
        super().__init__(message, timestamp, rounds)
        self.message = message
        self.timestamp = timestamp
        self.rounds = rounds

    def __str__(self) -> str:
        return self.message

    @property
    def logs(self) -> dict[int, tuple[str, ...]]:
        """URIs of the files with what each rank printed, by rank, one for each round; none where they are not kept."""
        from kfpytorch_ray.results import logs_of

        return logs_of(self.rounds)

    def add(self, message: str, rounds: tuple[RoundRecord, ...]) -> None:
        """Say more, once more is known.

        Args:
            message: Further lines.
            rounds: The records with what is known now.
        """
        self.message = f"{self.message}\n{message}" if message else self.message
        self.rounds = rounds
        self.args = (self.message, self.timestamp, rounds)


class WorkerFailedError(LaunchError):
    """A rank raised, exited with a code other than 0, or was killed by a signal.

    The user's own exception is the ``__cause__`` where it can be rebuilt in this process, and is not larger than
    1 MiB when it is pickled.
    """


class RecoverableWorkerError(WorkerFailedError):
    """A rank raised ``FlyteRecoverableException`` or a subclass of it."""

    retryable: ClassVar[bool] = True


class WorkerHungError(WorkerFailedError):
    """No rank made progress for ``RayBackend(hang_timeout_s=...)``; every rank's stacks are in ``rounds``."""


class ResultError(LaunchError):
    """A rank's return value, or its decks, cannot be pickled."""


class NodeLostError(LaunchError):
    """An agent, or the node that it ran on, died."""

    retryable: ClassVar[bool] = True


class RunLostError(LaunchError):
    """A remote run is over and has left no outcome: its driver was killed, or its cluster is gone."""

    retryable: ClassVar[bool] = True


class LaunchInterruptedError(LaunchError):
    """The process that supervises the workers was told to stop (SIGTERM, SIGINT)."""

    retryable: ClassVar[bool] = True


class DeadlineExceededError(LaunchError):
    """The launch took longer than ``RunPolicy(active_deadline_seconds=...)`` allows."""
