"""A run that goes on without this process: what a launch that does not wait hands back, and how it is found again.

The handle itself is the backend's; here is what every one of them can do.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Protocol, runtime_checkable

from kfpytorch_ray.backends import Adapter, BackendChoice, load_adapter
from kfpytorch_ray.config import BackendOptions
from kfpytorch_ray.errors import BackendUnavailableError, ConfigError, explain
from kfpytorch_ray.plan import LaunchPlan
from kfpytorch_ray.results import ElasticResult
from kfpytorch_ray.runs import Manifest, read_manifest, storage_of


class RunStatus(Enum):
    """Where a run stands."""

    PENDING = "pending"
    """Submitted; its driver has not begun."""
    RUNNING = "running"
    """Its driver is at work: it waits for nodes, or trains."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    """Cancelled, or its lease ran out."""
    LOST = "lost"
    """Over, and nobody knows how: the driver was killed, or the cluster is gone."""

    @property
    def ended(self) -> bool:
        """Whether it will stay like this."""
        return self not in (RunStatus.PENDING, RunStatus.RUNNING)


class Run(Protocol):
    """A run on a cluster that is elsewhere.

    Attributes:
        run_id: By which ``kfpytorch_ray.attach`` finds it.
    """

    run_id: str

    def status(self) -> RunStatus:
        """Where it stands now.

        Raises:
            ClusterUnreachableError: It has not ended, as far as the storage tells, and the cluster does not answer.
            StorageError: The storage cannot be read.
        """
        ...

    def logs(self, *, follow: bool = False, rank: int | None = None) -> Iterator[str]:
        """The lines that its driver has printed, with those of the ranks, without their line ends.

        Args:
            follow: Go on with what it prints until it ends; a lost connection is taken up where it broke.
            rank: Only the lines of this rank.

        Raises:
            ClusterUnreachableError: The cluster does not answer (``follow``: not for ``reconnect_timeout_s``).
        """
        ...

    def cancel(self) -> RunStatus:
        """Stop it, and return how it ended when it has; one that has ended already stays as it is.

        Raises:
            ClusterUnreachableError: The cluster does not answer.
        """
        ...

    def result(self, timeout: float | None = None, *, keep: bool = False) -> ElasticResult:
        """Wait for its end and take what it has left.

        What is large is removed from the storage when the result that this returns is no longer used, at the latest
        when this process ends; but only if a rank's value was fetched from it, and none that was asked for failed to
        arrive. Until then everything stays, and the result can be taken again, by ``attach`` as well.

        Args:
            timeout: Seconds to wait. None: for as long as it takes.
            keep: Leave everything in the storage, so that the result can be taken again.

        Raises:
            RunPendingError: It has not ended within the timeout.
            RunStoppedError: It was cancelled, or its lease ran out.
            ResultCollectedError: The result has been taken before.
            LaunchError: It failed; what ``launch()`` would have raised.
            ClusterUnreachableError: The cluster does not answer, and the storage has no outcome.
        """
        ...

    def forget(self) -> None:
        """Have the cluster remove what it keeps of a run that is over: a RayJob or a PyTorchJob, if it is there.

        Raises:
            KfpytorchRayError: The cluster cannot be reached, or refuses.
        """
        ...

    def collect(self) -> None:
        """Count its result as taken: remove from the storage what is large, for good. Changes nothing where it was.

        Raises:
            RunPendingError: It has not ended.
            ClusterUnreachableError: It has not ended, as far as the storage tells, and the cluster does not answer.
            StorageError: It cannot be removed.
        """
        ...


@runtime_checkable
class DetachedAdapter(Adapter, Protocol):
    """An adapter whose runs can go on without this process."""

    def start(self, plan: LaunchPlan) -> Run:
        """Start the plan and return at once.

        Raises:
            ConfigError: With these options it cannot run without this process.
            KfpytorchRayError: As kfpytorch_ray.errors says.
        """
        ...

    def attach(self, manifest: Manifest) -> Run:
        """Open a run that was started before, here or elsewhere."""
        ...


def attach(run_id: str, *, storage: str | None = None, backend: BackendOptions | None = None) -> Run:
    """Open a run that was started by ``launch(..., wait=False)``, or whose process has gone.

    Args:
        run_id: Which ``Run.run_id`` told.
        storage: Where it was staged. None: the backend's, else the variable ``KFPYTORCH_RAY_STORAGE``.
        backend: The options by which its cluster is reached, where the defaults do not do: address, headers, verify.

    Raises:
        ConfigError: No storage is named.
        UnknownRunError: There is no such run in this storage.
        StorageError: The storage cannot be read.
        BackendUnavailableError: The run's backend is not installed here.
    """
    return open_run(read_manifest(storage_of(storage or getattr(backend, "storage", None)), run_id), backend)


def open_run(manifest: Manifest, backend: BackendOptions | None = None) -> Run:
    """``attach()``, for a manifest that was read.

    Raises:
        ConfigError: The options are of another backend.
        BackendUnavailableError: The run's backend is not installed here.
    """
    run_id = manifest.run_id
    if backend is not None and backend.name != manifest.backend:
        problem = explain(
            f"backend={backend!r} cannot look after the run {run_id}.",
            f"It is one of the backend {manifest.backend!r}.",
            "Give options of that backend, or none.",
        )
        raise ConfigError("attach", (problem,))
    adapter = load_adapter(BackendChoice(manifest.backend, backend))
    if not isinstance(adapter, DetachedAdapter):
        msg = f"The backend {manifest.backend!r} of the run {run_id} cannot attach to a run."
        raise BackendUnavailableError(msg)
    return adapter.attach(manifest)
