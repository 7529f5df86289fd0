"""A run's driver as a job that was submitted to Ray's job API."""

from __future__ import annotations

import contextlib

from kfpytorch_ray.cluster.remote.client import JobClient
from kfpytorch_ray.cluster.remote.job import JobState
from kfpytorch_ray.cluster.remote.tail import LogTail
from kfpytorch_ray.run import RunStatus

_STATUS = {
    "PENDING": RunStatus.PENDING,  # its runtime environment is being made
    "RUNNING": RunStatus.RUNNING,
    "STOPPED": RunStatus.STOPPED,  # by a stop of the job
    "SUCCEEDED": RunStatus.LOST,  # without an outcome, which its driver writes before it ends
    "FAILED": RunStatus.LOST,  # the same: killed, or it could not write to the storage
}
"""What the status of a job says of a run that has left no outcome."""


class RayJob:
    """One job. See ``ClusterJob`` for what its methods promise.

    Args:
        client: Of its cluster.
        submission_id: Its name.
    """

    def __init__(self, client: JobClient, submission_id: str) -> None:
        self._client = client
        self._name = submission_id

    @property
    def place(self) -> str:
        """Where people find it."""
        return f"Ray's dashboard ({self._client.address})"

    def look(self) -> JobState | None:
        """Where it stands."""
        job = self._client.job(self._name)
        if job is None:
            return None
        status = _STATUS[job.status.value]
        said = next(iter((job.message or "").splitlines()), "")
        return JobState(status, f"Its Ray job is {job.status.value}: {said}" if status.ended else "")

    def followed(self) -> contextlib.nullcontext[None]:
        """It makes no difference: the job server tells what it is asked."""
        return contextlib.nullcontext()

    def log(self) -> str:
        """What its driver has printed."""
        return str(self._client.get_job_logs(self._name)) if self._client.job(self._name) else ""

    def tail(self) -> LogTail:
        """Follow its log."""
        return LogTail(self._client, self._name)

    def stop(self, timeout_s: float) -> None:
        """Stop it, and return when it is."""
        self._client.stop_job(self._name)
        self._client.wait_until_over(self._name, timeout_s)

    def forget(self) -> None:
        """Nothing: the cluster's list of jobs is its own."""
