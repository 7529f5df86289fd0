"""A pod of a PyTorchJob says how it ended, also when it is told to leave."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from kfpytorch_ray import KubeflowBackend
from kfpytorch_ray.adapters.stored_runs import manifest_of
from kfpytorch_ray.cluster.kube import pytorch_pod
from kfpytorch_ray.cluster.kube.pod_reports import LOG, PodReport, failed_pods, folder_of, report, settle_success
from kfpytorch_ray.cluster.kube.pod_request import PodRequest
from kfpytorch_ray.cluster.remote.outcome import Record, result_name
from kfpytorch_ray.cluster.remote.versions import here
from kfpytorch_ray.errors import KfpytorchRayError, StorageError, VersionMismatchError
from kfpytorch_ray.payload import dump_payload, load_payload
from kfpytorch_ray.plan import Contract, FlyteContext, LaunchPlan, NodeResources
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import MANIFEST, REQUEST
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import wait_until

RUN = "kfr-train-1"
POD = "kfpytorch_ray.cluster.kube.pytorch_pod"
OPERATOR = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
"""What the operator tells the pod of rank 0."""
HERE = socket.gethostname()

IN_THE_INSTANT = """
import os, signal, sys
from kfpytorch_ray.cluster.kube import pytorch_pod
from kfpytorch_ray.errors import StorageError

report = pytorch_pod.report

def report_then(*arguments, **named):
    report(*arguments, **named)
    pytorch_pod.report = report
    {then}

pytorch_pod.report = report_then
sys.exit(pytorch_pod.main(*sys.argv[1:]))
"""
"""A pod to which something happens when its report has just been written."""


WITHOUT_A_STORE = """
import sys
from torch.distributed import DistNetworkError
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from kfpytorch_ray.cluster.kube import pytorch_pod

def assign(*_):
    raise DistNetworkError("the store has reset the connection")

SimpleElasticAgent._assign_worker_ranks = assign
sys.exit(pytorch_pod.main(*sys.argv[1:]))
"""
"""A pod that loses torch elastic's store when all pods have met."""


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """The folder of a run of two replicas, each of which calls a function that returns at once."""
    folder = Storage(str(tmp_path / "run"))
    plan = LaunchPlan(
        name="train",
        run_id=RUN,
        function=functools.partial(load_payload, dump_payload(str, (1,), {})),
        args=(),
        kwargs={},
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        resources=NodeResources({"CPU": 1.0}),
        flyte=FlyteContext(str(tmp_path / "raw")),
        contract=Contract.OPERATOR,
    )
    manifest = manifest_of(plan, "kubeflow", KubeflowBackend(image="image"), folder.uri, "n@")
    folder.write(MANIFEST, replace(manifest, run_id=RUN).to_json())
    folder.write(REQUEST, pickle.dumps(PodRequest(plan, {}, ())))
    return folder


@contextlib.contextmanager
def pod(run: Storage, *how: str, variables: Mapping[str, str] = OPERATOR) -> Iterator[subprocess.Popen[bytes]]:
    """The pod of rank 0, which does not outlive the block."""
    sha256 = run.upload(REQUEST, [run.read(REQUEST) or b""]).sha256
    command = [sys.executable, *how, RUN, f"{run.uri}#{sha256}"]
    process = subprocess.Popen(command, env={**os.environ, **variables})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def first(run: Storage) -> Iterator[subprocess.Popen[bytes]]:
    """The pod of rank 0, which has brought its result and waits for the other one's."""
    with pod(run, "-m", POD) as process:
        wait_until(lambda: folder_of(run, HERE).read("report.json"), "its report")
        yield process


def test_a_pod_that_has_brought_its_results_and_is_told_to_leave(run: Storage, first: subprocess.Popen[bytes]) -> None:
    """What it has brought counts: it is not said to have been stopped."""
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    assert state_of(run) == RunStatus.SUCCEEDED.value


@pytest.mark.parametrize(
    ("then", "code"),
    [("os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM), ("raise StorageError('gone')", 1)],
    ids=["told to leave", "the storage fails"],
)
def test_what_happens_in_the_instant_after_the_report(run: Storage, then: str, code: int) -> None:
    """The success that was said is not taken back."""
    with pod(run, "-c", IN_THE_INSTANT.format(then=then)) as process:
        assert process.wait(60) == code
    assert state_of(run) == RunStatus.SUCCEEDED.value
    returned(run, 1, "other")
    assert settle_success(run)


def test_a_pod_that_is_started_again_after_it_has_succeeded(run: Storage) -> None:
    """Its results count: it trains no more, and ends with the others."""
    returned(run, 0, HERE)
    before = run.read(result_name(0))
    with pod(run, "-m", POD) as process:
        returned(run, 1, "other")
        assert process.wait(60) == 0
    assert run.read(result_name(0)) == before


def test_a_pod_waits_for_the_others_results(run: Storage, first: subprocess.Popen[bytes]) -> None:
    """And succeeds with them."""
    assert first.poll() is None
    returned(run, 1, "other")
    assert first.wait(60) == 0
    assert state_of(run) == RunStatus.SUCCEEDED.value


def test_a_pod_whose_image_has_another_version(run: Storage) -> None:
    """It cannot unpickle what it is to do: it says so, and what is installed on both sides."""
    run.write(REQUEST, b"ckfpytorch_ray.of_another_version\nRequest\n.")
    said, log = failure_of(run, "-m", POD)
    assert isinstance(said, VersionMismatchError)
    assert "No module named 'kfpytorch_ray.of_another_version'" in str(said)
    assert f"Where it was launched: {here()}. Where it is to run: {here()}." in str(said)
    assert str(said) in log


def test_a_pod_that_loses_the_store_of_torch_elastic(run: Storage) -> None:
    """Torch raises its own error: the pod says that it could not meet the others."""
    request: PodRequest = pickle.loads(run.read(REQUEST) or b"")
    plan = replace(request.plan, contract=Contract.TORCHRUN, min_nodes=1, max_nodes=1)
    run.write(REQUEST, pickle.dumps(replace(request, plan=plan)))
    said, log = failure_of(run, "-c", WITHOUT_A_STORE)
    assert "could not meet its other nodes" in str(said)
    assert "DistNetworkError: the store has reset the connection" in str(said)
    assert str(said) in log


def test_a_pod_that_fails_by_an_error_that_nobody_thought_of(run: Storage) -> None:
    """Such as a missing variable of the operator's: it is its report, and the traceback is in its log."""
    said, log = failure_of(run, "-m", POD, variables={})
    assert f"The pod {HERE} failed by an error that it does not know." in str(said)
    assert "KeyError: 'RANK'" in str(said)
    assert "Traceback" in log


def test_the_log_of_a_pod_that_is_interrupted(run: Storage, first: subprocess.Popen[bytes]) -> None:
    """It is kept whatever ends the pod."""
    first.send_signal(signal.SIGINT)
    assert first.wait(60) != 0
    assert folder_of(run, HERE).read(LOG)


def test_a_storage_that_is_away_for_a_moment_is_waited_for(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pod whose results are there: to fail would make them worthless."""
    answers: list[bool | Exception] = [StorageError("slow down"), False, StorageError("slow down"), True]

    def settle(_: Storage) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(pytorch_pod, "_LOOK_S", 0.01)
    monkeypatch.setattr(pytorch_pod, "settle_success", settle)
    assert pytorch_pod._Pod(run, Path(run.uri))._wait_for_others() == 0
    assert not answers


def failure_of(run: Storage, *how: str, variables: Mapping[str, str] = OPERATOR) -> tuple[Exception, str]:
    """What a pod that fails says, by which the other ones see that it has failed; and what it has printed."""
    with pod(run, *how, variables=variables) as process:
        assert process.wait(60) == 1
    assert failed_pods(run) == [HERE]
    record: Record = pickle.loads(folder_of(run, HERE).read("record.pkl") or b"")
    assert isinstance(record.error, KfpytorchRayError)
    return record.error, (folder_of(run, HERE).read(LOG) or b"").decode()


def returned(run: Storage, rank: int, name: str) -> None:
    """Have a pod say that its rank has returned."""
    record = RankRecord(rank, 0, rank, name, Outcome.SUCCEEDED, 0, 2.0)
    ended = RoundRecord(0, 2, (name,), 1.0, 2.0, (record,), Ending.SUCCEEDED)
    digest = run.upload(result_name(rank), [b"result"])
    report(run, name, RunStatus.SUCCEEDED, Record((ended,)), results=[(rank, digest)])


def state_of(run: Storage) -> str:
    said = folder_of(run, HERE).read("report.json")
    assert said is not None
    return PodReport.from_json(said).state
