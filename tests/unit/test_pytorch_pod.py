"""A pod of a PyTorchJob says how it ended, also when it is told to leave."""

from __future__ import annotations

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

from kfpytorch_ray.cluster.kube.pod_reports import PodReport, folder_of, report
from kfpytorch_ray.cluster.kube.pod_request import PodRequest
from kfpytorch_ray.cluster.remote.outcome import Record, result_name
from kfpytorch_ray.payload import dump_payload, load_payload
from kfpytorch_ray.plan import Contract, FlyteContext, LaunchPlan, NodeResources
from kfpytorch_ray.results import Ending, Outcome, RankRecord, RoundRecord
from kfpytorch_ray.run import RunStatus
from kfpytorch_ray.runs import MANIFEST, REQUEST, Manifest
from kfpytorch_ray.storage import Storage
from kfpytorch_ray.testing import wait_until

RUN = "kfr-train-1"
HERE = socket.gethostname()


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


@pytest.fixture
def first(run: Storage) -> Iterator[subprocess.Popen[bytes]]:
    """The pod of rank 0, which has brought its result and waits for the other one's."""
    sha256 = run.upload(REQUEST, [run.read(REQUEST) or b""]).sha256
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "kfpytorch_ray.cluster.kube.pytorch_pod", RUN, f"{run.uri}#{sha256}"]
    process = subprocess.Popen(command, env={**os.environ, **variables})
    try:
        wait_until(lambda: folder_of(run, HERE).read("report.json"), "its report")
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_pod_that_has_brought_its_results_and_is_told_to_leave(run: Storage, first: subprocess.Popen[bytes]) -> None:
    """What it has brought counts: it is not said to have been stopped."""
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 128 + signal.SIGTERM
    assert state_of(run) == RunStatus.SUCCEEDED.value


def test_a_pod_waits_for_the_others_results(run: Storage, first: subprocess.Popen[bytes]) -> None:
    """And succeeds with them."""
    assert first.poll() is None
    rank = RankRecord(1, 0, 1, "other", Outcome.SUCCEEDED, 0, 2.0)
    ended = RoundRecord(0, 2, ("other",), 1.0, 2.0, (rank,), Ending.SUCCEEDED)
    digest = run.upload(result_name(1), [b"result"])
    report(run, "other", RunStatus.SUCCEEDED, Record((ended,)), results=[(1, digest)])
    assert first.wait(60) == 0
    assert state_of(run) == RunStatus.SUCCEEDED.value


def state_of(run: Storage) -> str:
    said = folder_of(run, HERE).read("report.json")
    assert said is not None
    return PodReport.from_json(said).state
