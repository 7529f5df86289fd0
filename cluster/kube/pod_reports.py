"""How the pods of a PyTorchJob ended, in the run's folder, and how the run's outcome follows from it.

There is no driver that sees all of them: each pod leaves a report, and the last one that has succeeded finds that every
rank's result is there. Of a job that has failed, whoever looks at it draws the conclusion from what pods have said.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kfpytorch_ray.cluster.causes import failures, may_miss_a_peer, root_cause
from kfpytorch_ray.cluster.failures import worker_error
from kfpytorch_ray.cluster.policy import Reason
from kfpytorch_ray.cluster.remote.outcome import Record, write_failure, write_outcome
from kfpytorch_ray.errors import KfpytorchRayError, LaunchError
from kfpytorch_ray.results import Ending, RoundRecord
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import PODS, Json
from kfpytorch_ray.storage import Digest, Storage

_REPORT = "report.json"
_RECORD = "record.pkl"
LOG = "log"
"""What a pod has printed."""


@dataclass(frozen=True, slots=True)
class PodReport(Json):
    """How a pod ended.

    Attributes:
        state: A ``RunStatus``'s value.
        ended_at: Seconds since the epoch.
        record: SHA-256 and size of record.pkl.
        budget: A sentence on the restarts of its ranks.
        results: Rank, SHA-256 and size of each result that it has left.
    """

    state: str
    ended_at: float
    record: tuple[str, int]
    budget: str = ""
    results: tuple[tuple[int, str, int], ...] = ()


def folder_of(run: Storage, pod: str) -> Storage:
    """The folder of a pod in the run's."""
    return run.folder(f"{PODS}/{pod}")


def report(
    run: Storage,
    pod: str,
    status: RunStatus,
    record: Record,
    budget: str = "",
    results: Sequence[tuple[int, Digest]] = (),
) -> None:
    """Leave how a pod ended.

    Args:
        run: The run's folder.
        pod: Its name.
        status: How it ended.
        record: What became of its ranks.
        budget: As in ``PodReport``.
        results: Of its ranks, which are there.

    Raises:
        StorageError: It cannot be written.
    """
    folder = folder_of(run, pod)
    written = folder.upload(_RECORD, [pickle.dumps(record)])
    said = PodReport(
        state=status.value,
        ended_at=time.time(),
        record=(written.sha256, written.size_bytes),
        budget=budget,
        results=tuple((rank, digest.sha256, digest.size_bytes) for rank, digest in results),
    )
    folder.write(_REPORT, said.to_json())


def has_succeeded(run: Storage, pod: str) -> bool:
    """Whether a pod has said that it succeeded; it must not say anything else after that.

    Raises:
        StorageError: The storage cannot be read.
    """
    said = folder_of(run, pod).read(_REPORT)
    return said is not None and PodReport.from_json(said).state == RunStatus.SUCCEEDED.value


def settle_success(run: Storage) -> bool:
    """Write the run's outcome if every rank of one round has returned; whether it has.

    Raises:
        StorageError: The storage cannot be read or written.
    """
    found = [(pod, said) for pod, said in _reports(run) if said.state == RunStatus.SUCCEEDED.value]
    results = {rank: (sha256, size) for _, said in found for rank, sha256, size in said.results}
    if not found or set(results) != set(range(_round(run, *found[0]).world_size)):
        return False
    together = merged([_round(run, pod, said) for pod, said in found])
    write_outcome(run, RunStatus.SUCCEEDED, Record((together,)), tuple(results[rank] for rank in range(len(results))))
    return True


def failed_pods(run: Storage) -> list[str]:
    """Names of the pods that have said that they failed.

    Raises:
        StorageError: The storage cannot be read.
    """
    return [pod for pod, said in _reports(run) if said.state == RunStatus.FAILED.value]


def settle_failure(run: Storage, name: str) -> bool:
    """Write the outcome of a run whose job is over without success; whether any pod has said why.

    Args:
        run: The run's folder.
        name: Of the run, for people.

    Raises:
        StorageError: The storage cannot be read or written.
    """
    found = sorted(
        ((said, _record(run, pod, said)) for pod, said in _reports(run) if said.state != RunStatus.SUCCEEDED.value),
        key=lambda one: one[0].ended_at,
    )
    failed = [one for one in found if one[0].state == RunStatus.FAILED.value]
    rounds = [record.rounds[-1] for _, record in failed if record.rounds]
    error: KfpytorchRayError | None = None
    if rounds and failures(together := merged(rounds)):
        budget = next((said.budget for said, _ in failed if said.budget), "")
        error = worker_error(name, (replace(together, ending=Ending.FAILED),), Reason.RESTARTS_SPENT, budget)
    elif found:
        error = (failed or found)[0][1].error
    if error is None:
        return False
    if isinstance(error, LaunchError):
        # Whoever reads the outcome rebuilds it from the records.
        error.__cause__ = None
    write_failure(run, error)
    return True


def better_may_come(run: Storage) -> bool:
    """Whether what pods have said so far may be no more than that another one is gone.

    So it may where torch elastic itself has failed: the store, by which pods meet, lives in one of them.

    Raises:
        StorageError: The storage cannot be read.
    """
    found = [_record(run, pod, said) for pod, said in _reports(run) if said.state == RunStatus.FAILED.value]
    return all(
        may_miss_a_peer(root_cause(record.rounds[-1]))
        if record.rounds and failures(record.rounds[-1])
        else type(record.error) is LaunchError
        for record in found
    )


def merged(rounds: Sequence[RoundRecord]) -> RoundRecord:
    """What several nodes say of one round, as one record; ``nodes`` has only those that say something."""
    ranks = {rank.rank: rank for part in rounds for rank in part.ranks}
    nodes = {rank.node_rank: rank.node for rank in ranks.values()}
    return replace(
        rounds[0],
        index=max(part.index for part in rounds),
        world_size=max(part.world_size for part in rounds),
        nodes=tuple(nodes[node_rank] for node_rank in sorted(nodes)),
        started_at=min(part.started_at for part in rounds),
        ended_at=max(part.ended_at for part in rounds),
        ranks=tuple(ranks[rank] for rank in sorted(ranks)),
    )


def _reports(run: Storage) -> list[tuple[str, PodReport]]:
    """The pods that have said how they ended, and what they have said."""
    said = ((pod, folder_of(run, pod).read(_REPORT)) for pod in run.folder(PODS).names())
    return [(pod, PodReport.from_json(data)) for pod, data in said if data is not None]


def _record(run: Storage, pod: str, said: PodReport) -> Record:
    record: Record = pickle.loads(folder_of(run, pod).read_checked(_RECORD, Digest(*said.record)))
    return record


def _round(run: Storage, pod: str, said: PodReport) -> RoundRecord:
    return _record(run, pod, said).rounds[-1]
