"""What the pods of a PyTorchJob say of how they ended makes the run's outcome."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kfpytorch_ray.cluster.kube.pod_peers import PeerWatch
from kfpytorch_ray.cluster.kube.pod_reports import better_may_come, report, settle_failure, settle_success
from kfpytorch_ray.cluster.remote.outcome import Record, read_record, result_name
from kfpytorch_ray.errors import LaunchError, RunStoppedError, VersionMismatchError, WorkerFailedError
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import PODS, read_outcome
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import wait_until

PEER_IS_GONE = "DistBackendError: connection closed by peer"


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """The folder of a run."""
    return Storage(str(tmp_path / "run"))


def a_round(rank: int, outcome: Outcome, message: str = "", exception: bytes | None = None) -> RoundRecord:
    """One of two ranks, each on a pod of its own."""
    pod = f"train-worker-{rank}"
    code = 0 if outcome is Outcome.SUCCEEDED else 1
    record = RankRecord(rank, 0, rank, pod, outcome, code, 10.0 + rank, message, exception=exception)
    ending = Ending.SUCCEEDED if outcome is Outcome.SUCCEEDED else Ending.FAILED
    return RoundRecord(0, 2, (pod,), 1.0 + rank, 5.0 + rank, (record,), ending)


def returned(run: Storage, rank: int) -> None:
    digest = run.upload(result_name(rank), [b"result"])
    record = Record((a_round(rank, Outcome.SUCCEEDED),))
    report(run, f"train-worker-{rank}", RunStatus.SUCCEEDED, record, results=[(rank, digest)])


def failed(run: Storage, rank: int, message: str, exception: bytes | None = None) -> None:
    rounds = (a_round(rank, Outcome.RAISED, message, exception),)
    error = WorkerFailedError(message, 10.0 + rank, rounds)
    report(run, f"train-worker-{rank}", RunStatus.FAILED, Record(rounds, error), "Restarts used: 1 of 1.")


def test_a_run_has_succeeded_when_every_rank_has_returned(run: Storage) -> None:
    """Not before; the outcome has the results in the order of the ranks, and all nodes."""
    returned(run, 1)
    assert not settle_success(run)
    assert read_outcome(run) is None
    returned(run, 0)
    assert settle_success(run)
    outcome = read_outcome(run)
    assert outcome is not None
    assert outcome.state == RunStatus.SUCCEEDED.value
    assert len(outcome.results) == 2
    (ended,) = read_record(run, outcome).rounds
    assert ended.nodes == ("train-worker-0", "train-worker-1")
    assert [rank.rank for rank in ended.ranks] == [0, 1]


def test_the_cause_is_the_best_of_all_pods(run: Storage) -> None:
    """A pod that only lost its peer was first; the other one's exception is the error's cause."""
    failed(run, 0, PEER_IS_GONE)
    assert better_may_come(run)
    failed(run, 1, "ValueError: bad batch", pickle.dumps(ValueError("bad batch")))
    assert not better_may_come(run)
    assert settle_failure(run, "train")
    outcome = read_outcome(run)
    assert outcome is not None
    error = read_record(run, outcome).error
    assert isinstance(error, WorkerFailedError)
    assert "train failed in round 0: rank 1 (local rank 0 on node 1, train-worker-1): ValueError: bad batch" in str(
        error
    )
    assert "1 of 2 ranks failed this way, 1 in another way." in str(error)
    assert "Restarts used: 1 of 1." in str(error)
    assert isinstance(error.__cause__, ValueError)


def test_a_pod_whose_torch_elastic_failed_may_have_lost_the_pod_that_knows_better(run: Storage) -> None:
    """The store is in one of the pods: what that one says, as soon as it does, is the cause."""
    lost = LaunchError("the connection to the store is gone", 9.0)
    report(run, "train-worker-1", RunStatus.FAILED, Record((), lost))
    assert better_may_come(run)
    failed(run, 0, "ValueError: bad batch")
    assert not better_may_come(run)
    assert settle_failure(run, "train")
    outcome = read_outcome(run)
    assert outcome is not None
    assert "ValueError: bad batch" in outcome.message


def test_a_pod_that_knows_why_it_failed_is_not_waited_for(run: Storage) -> None:
    """Another one can say nothing better."""
    report(run, "train-worker-1", RunStatus.FAILED, Record((), VersionMismatchError("another image")))
    assert not better_may_come(run)


def test_pods_that_were_only_stopped_make_a_run_that_was(run: Storage) -> None:
    """Deleted or evicted: that is no failure of a rank."""
    error = RunStoppedError("the pod was stopped")
    report(run, "train-worker-0", RunStatus.STOPPED, Record((), error))
    assert settle_failure(run, "train")
    outcome = read_outcome(run)
    assert outcome is not None
    assert outcome.state == RunStatus.STOPPED.value


def test_where_no_pod_has_said_anything_nothing_follows(run: Storage) -> None:
    """They were killed, or never started."""
    assert not settle_failure(run, "train")
    assert read_outcome(run) is None


PEER = """
import signal, sys
from kfpytorch_ray.cluster.interruption import interruptible
from kfpytorch_ray.cluster.kube.pod_peers import PeerWatch
from kfpytorch_ray.storage import Storage

with interruptible():
    watch = PeerWatch(Storage(sys.argv[1]), "train-worker-0", 0.4)
    try:
        with watch:
            signal.pause()
    except SystemExit:
        print(watch.reason)
"""


def test_a_pod_whose_peer_has_failed_ends_as_well(run: Storage) -> None:
    """By SIGTERM, some time after the other one's failure, and it knows why; its own failure is none of another's."""
    failed(run, 0, "mine")
    with subprocess.Popen([sys.executable, "-c", PEER, run.uri], stdout=subprocess.PIPE, text=True) as process:
        try:
            returned(run, 2)
            failed(run, 1, PEER_IS_GONE)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert output == "The pod train-worker-1 had failed, and this one still ran 0.4 s later.\n"


def test_a_pod_whose_peers_do_well_goes_on(run: Storage) -> None:
    """Many looks later it was told nothing."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: received.append(number))
    returned(run, 1)
    failed(run, 0, "mine")
    looks = CountedLooks(run.uri)
    try:
        with PeerWatch(looks, "train-worker-0", 0.02):
            wait_until(lambda: looks.count > 20, "many looks")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not received


class CountedLooks(Storage):
    """A run's folder that knows how often its pods were listed."""

    count = 0

    def folder(self, name: str) -> Storage:
        self.count += name == PODS
        return super().folder(name)
