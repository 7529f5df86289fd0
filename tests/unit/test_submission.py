"""Sending a launch: in which order, and what is left where it fails. The cluster is a double."""

from __future__ import annotations

import pickle
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flytekit import FlyteFile
from ray.job_submission import JobDetails

from kfpytorch_ray import ClusterError, PayloadError, RayBackend, StorageError
from kfpytorch_ray.adapters.raycluster import RayAdapter
from kfpytorch_ray.adapters.stored_runs import staging
from kfpytorch_ray.cluster.remote.submission import Attempt, Destination, attempt_in, submit
from kfpytorch_ray.plan import FlyteContext, LaunchPlan, NodeResources
from kfpytorch_ray.runs import Manifest, run_folder
from kfpytorch_ray.storage import Storage, digest_of

RUN = Manifest("kfr-one", "train", "ray", "s3://bucket", "http://head:8265", 0.0, "ada", "1", 1, 60.0)
SECRETS = RayBackend(headers={"X-Token": "s3cret"}, verify="/my/ca.pem", storage="s3://bucket")


@dataclass
class Cluster:
    """Takes a job, or does not."""

    error: Exception | None = None
    address: str = "http://head:8265"
    submitted: dict[str, Any] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)

    def submit_job(self, **job: Any) -> str:
        self.submitted = job
        if self.error is not None:
            raise self.error
        return str(job["submission_id"])

    def job(self, submission_id: str) -> object | None:
        return object() if self.submitted else None

    def stop_job(self, submission_id: str) -> bool:
        self.stopped.append(submission_id)
        return True

    def list_jobs(self) -> list[Any]:
        return []


def send(cluster: Cluster, storage: Storage, *inputs: Any) -> None:
    plan = LaunchPlan("train", "f1", max, inputs, {}, 1, 1, 1, NodeResources({"CPU": 1.0}), FlyteContext("s3://raw"))
    with staging(plan, RUN, storage) as staged:
        to = Destination(cluster, storage, {"pip": ["x"]})  # type: ignore[arg-type]
        submit(RayAdapter(SECRETS).build(staged), RUN, SECRETS, to)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def test_the_entrypoint_is_a_module_and_a_place(storage: Storage) -> None:
    """No free text: the run's folder, and the SHA-256 of what is there."""
    cluster = Cluster()
    send(cluster, storage)
    request = run_folder(storage, "kfr-one").read("request.pkl")
    assert request is not None
    place = f"{storage.uri}/runs/kfr-one#{digest_of(request).sha256}"
    assert cluster.submitted["entrypoint"] == f"python -m kfpytorch_ray.cluster.remote.driver '{place}'"
    assert cluster.submitted["runtime_env"] == {"pip": ["x"]}
    assert cluster.submitted["submission_id"] == "kfr-one"


def test_secrets_of_the_way_stay_here(storage: Storage) -> None:
    """The driver on the cluster needs neither headers nor certificates, and gets none."""
    cluster = Cluster()
    send(cluster, storage)
    data = run_folder(storage, "kfr-one").read("request.pkl")
    assert data is not None
    _, options = pickle.loads(data)
    assert (options.headers, options.verify, options.storage, options.address) == ({}, True, None, "auto")
    assert b"s3cret" not in data
    assert "s3cret" not in repr(cluster.submitted) + repr(SECRETS)


@pytest.mark.parametrize("error", [ClusterError("no"), KeyboardInterrupt()])
def test_nothing_is_left_where_it_fails(storage: Storage, error: Exception, tmp_path: Path) -> None:
    """What was staged goes, files too, and a job that was taken all the same is stopped; so after an interruption."""
    (tmp_path / "input.txt").write_text("text")
    cluster = Cluster(error)
    with pytest.raises(type(error)):
        send(cluster, storage, FlyteFile(str(tmp_path / "input.txt")))
    assert cluster.submitted
    assert [path for path in (tmp_path / "storage").rglob("*") if path.is_file()] == []
    assert cluster.stopped == ["kfr-one"]


def test_nothing_is_left_of_a_call_that_cannot_be_pickled(storage: Storage, tmp_path: Path) -> None:
    """Nor of one whose file is not there: it is told as what it is."""
    (tmp_path / "input.txt").write_text("text")
    with pytest.raises(PayloadError):
        send(Cluster(), storage, FlyteFile(str(tmp_path / "input.txt")), threading.Lock())
    with pytest.raises(StorageError, match=r"(?s)inputs cannot be uploaded.*Fix:"):
        send(Cluster(), storage, FlyteFile(str(tmp_path / "other.txt")))
    assert storage.folder("runs").names() == []


ATTEMPT = {"FLYTE_INTERNAL_EXECUTION_ID": "f1", "FLYTE_ATTEMPT_NUMBER": "2", "HOSTNAME": "f1-n0-0-2"}


def attempt(**other: str) -> Attempt:
    found = attempt_in({**ATTEMPT, **other})
    assert found is not None
    return found


def test_a_later_attempt_knows_the_earlier_ones() -> None:
    """Not itself, which may launch several times, not later ones, and nobody else's job."""
    second = attempt()
    first = attempt(FLYTE_ATTEMPT_NUMBER="1", HOSTNAME="f1-n0-0-1")
    assert second.follows(first.metadata)
    assert not second.follows(second.metadata)
    assert not first.follows(second.metadata)
    assert not second.follows({})


@pytest.mark.parametrize(
    "other",
    [
        {"HOSTNAME": "f1-n0-1-2"},
        {"FLYTE_INTERNAL_EXECUTION_ID": "f2"},
        {"FLYTE_INTERNAL_EXECUTION_PROJECT": "p"},
        {"FLYTE_INTERNAL_TASK_NAME": "t"},
    ],
)
def test_other_tasks_are_left_alone(other: dict[str, str]) -> None:
    """Of another node, execution, project or name."""
    assert attempt(**other).of != attempt().of


@pytest.mark.parametrize(
    "environment",
    [{}, {"HOSTNAME": "laptop"}, {**ATTEMPT, "HOSTNAME": "laptop"}, {**ATTEMPT, "FLYTE_ATTEMPT_NUMBER": "1"}],
)
def test_where_the_attempt_cannot_be_told_there_is_none(environment: dict[str, str]) -> None:
    """Stopping somebody else's run would be worse than leaving one."""
    assert attempt_in(environment) is None


@dataclass
class Stuck(Cluster):
    """Runs the job of an earlier attempt, which does not end."""

    def list_jobs(self) -> list[Any]:
        metadata = attempt(FLYTE_ATTEMPT_NUMBER="1", HOSTNAME="f1-n0-0-1").metadata
        return [
            JobDetails(
                type="SUBMISSION", submission_id="kfr-before", status="RUNNING", metadata=metadata, entrypoint=""
            )
        ]

    def job(self, submission_id: str) -> object | None:
        return self.list_jobs()[0]

    def wait_until_over(self, submission_id: str, timeout_s: float | None = None) -> None:
        assert timeout_s is not None
        msg = f"it is RUNNING after {timeout_s:g} s"
        raise TimeoutError(msg)


@pytest.mark.parametrize("known", [True, False])
def test_an_earlier_attempt_that_does_not_end(storage: Storage, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """It is waited for with an end, and nothing is sent; so where it was staged in another storage."""
    for name, value in ATTEMPT.items():
        monkeypatch.setenv(name, value)
    if known:
        run_folder(storage, "kfr-before").write("manifest.json", replace(RUN, run_id="kfr-before").to_json())
    cluster = Stuck()
    with pytest.raises(
        ClusterError, match=r"(?s)kfr-before was told to stop and still runs.*RUNNING after \d+ s.*Fix:"
    ):
        send(cluster, storage)
    assert cluster.stopped == ["kfr-before"]
    assert cluster.submitted == {}
    assert storage.folder("runs").names() == ["kfr-before"] * known


def test_the_attempt_is_in_the_jobs_metadata(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which the next attempt finds it."""
    for name, value in ATTEMPT.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster()
    send(cluster, storage)
    assert attempt().metadata.items() <= cluster.submitted["metadata"].items()
