"""What runs a remote run's driver, as the run's handle sees it: a job of some kind on some cluster."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from kfpytorch_ray.errors import KfpytorchRayError
from kfpytorch_ray.run import RunStatus


@dataclass(frozen=True, slots=True)
class JobState:
    """Where a job stands.

    Attributes:
        status: Of a run that has left no outcome. ``LOST`` for a job that is over: its driver would have left one.
        message: What the cluster says of it, for people: why it ended, or what it waits for. May be empty.
        error: What a run that ends like this raises; None where the handle knows better.
    """

    status: RunStatus
    message: str = ""
    error: KfpytorchRayError | None = None


class Tail(Protocol):
    """A log as it grows. Ends only when it is told to."""

    def next(self, timeout_s: float) -> str:
        """What has come since the last time, after ``timeout_s`` at the latest; empty if nothing has."""
        ...

    def rest(self, whole: str) -> str:
        """What of the driver's whole log ``next`` has not returned."""
        ...

    def stop(self) -> None:
        """Follow it no longer; what was received can still be asked for."""
        ...


class ClusterJob(Protocol):
    """A job.

    Every method raises ClusterUnreachableError where the cluster does not answer, AuthenticationError where it refuses.
    """

    @property
    def place(self) -> str:
        """Where people find it."""
        ...

    def look(self) -> JobState | None:
        """Where it stands; None if the cluster knows none of this name."""
        ...

    def followed(self) -> AbstractContextManager[object]:
        """Expect to be looked at again and again while this lasts. Asks the cluster for nothing by itself."""
        ...

    def log(self) -> str:
        """What its driver has printed, as far as the cluster has it."""
        ...

    def tail(self) -> AbstractContextManager[Tail]:
        """Follow its log."""
        ...

    def stop(self, timeout_s: float) -> None:
        """Stop it, and return when it is.

        Raises:
            TimeoutError: It has not ended within ``timeout_s``.
        """
        ...

    def forget(self) -> None:
        """Remove what the cluster keeps of a job that is over and whose result was taken."""
        ...
