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
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfpytorch_ray.cluster.kube import pytorch_pod
from kfpytorch_ray.cluster.kube.pod_reports import PodReport, folder_of, report, settle_success
from kfpytorch_ray.cluster.kube.pod_request import PodRequest
from kfpytorch_ray.cluster.remote.outcome import Record, result_name
from kfpytorch_ray.errors import StorageError
from kfpytorch_ray.payload import dump_payload, load_payload
from kfpytorch_ray.plan import Contract, FlyteContext, LaunchPlan, NodeResources
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import MANIFEST, REQUEST, Manifest
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import wait_until

RUN = "kfr-train-1"
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


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """The folder of a run of two replicas, each of which calls a function that returns at once."""
    folder = Storage(str(tmp_path / "run"))
    manifest = Manifest(RUN, "train", "kubeflow", folder.uri, "n@", time.time(), "me", "2", 1, 60.0)
    folder.write(MANIFEST, manifest.to_json())
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
    folder.write(REQUEST, pickle.dumps(PodRequest(plan, {}, ())))
    return folder


@contextlib.contextmanager
def pod(run: Storage, *how: str) -> Iterator[subprocess.Popen[bytes]]:
    """The pod of rank 0, which does not outlive the block."""
    sha256 = run.upload(REQUEST, [run.read(REQUEST) or b""]).sha256
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
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
    with pod(run, "-m", "kfpytorch_ray.cluster.kube.pytorch_pod") as process:
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
    with pod(run, "-m", "kfpytorch_ray.cluster.kube.pytorch_pod") as process:
        returned(run, 1, "other")
        assert process.wait(60) == 0
    assert run.read(result_name(0)) == before


def test_a_pod_waits_for_the_others_results(run: Storage, first: subprocess.Popen[bytes]) -> None:
    """And succeeds with them."""
    assert first.poll() is None
    returned(run, 1, "other")
    assert first.wait(60) == 0
    assert state_of(run) == RunStatus.SUCCEEDED.value


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
