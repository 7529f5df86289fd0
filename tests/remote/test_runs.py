"""A launch on a cluster that is elsewhere: sent by its job API, followed, taken home, left and found again."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import flytekit
import pytest
import torch
from flytekit import FlyteFile, task
from flytekit.exceptions.user import FlyteUserRuntimeException

import kfpytorch_ray
from kfpytorch_ray import (
    ClusterUnreachableError,
    ConfigError,
    Elastic,
    IntegrityError,
    RayBackend,
    ResultCollectedError,
    RunPendingError,
    RunStatus,
    RunStoppedError,
    StorageError,
    UnknownRunError,
    WorkerFailedError,
    attach,
    launch,
    stacks,
)
from kfpytorch_ray.cluster.remote.client import JobClient
from kfpytorch_ray.results import Outcome
from kfpytorch_ray.testing import HeadCluster, Relay, wait_until

ODD = """
class OddError(ValueError):
    def __init__(self, code):
        super().__init__(code)
        self.code = code
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A user's module with an exception that has a field, in a folder that is sent."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "odd_errors.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("odd_errors")
    del sys.modules["odd_errors"]


def elastic(head: HeadCluster, storage: str, nnodes: int = 1, **options: Any) -> Elastic:
    """A job on the cluster; these tests' functions travel by value, and no folder does."""
    backend = RayBackend(**{"address": head.address, "storage": storage, "working_dir": "", **options})
    return Elastic(nnodes=nnodes, nproc_per_node=1, backend=backend)


def files(storage: str, below: str = "runs") -> set[str]:
    """Names of the files in the storage, without the run's own folder; a record is called by its hash."""
    root = Path(storage.removeprefix("file://")) / below
    found = {path.relative_to(root).as_posix().partition("/")[2] for path in root.rglob("*") if path.is_file()}
    return {re.sub(r"^records/\w{64}\.pkl$", "records/*.pkl", name) for name in found}


def test_the_same_objects_as_from_a_local_run(
    head: HeadCluster, storage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Values of all ranks, decks and rounds come home; log lines are passed on; what was staged is removed."""

    def work(base: float) -> dict[str, Any]:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        total = torch.full((3,), float(dist.get_rank()))
        dist.all_reduce(total)
        print(f"rank {dist.get_rank()} says hello")
        flytekit.Deck("curves", f"<p>deck of {dist.get_rank()}</p>")
        dist.destroy_process_group()
        return {"total": total + base, "pid": os.getpid(), "folder": flytekit.current_context().checkpoint is not None}

    result = launch(work, 0.5, elastic=elastic(head, storage, nnodes=2, logs="all"))
    assert [result[rank].return_value["total"].tolist() for rank in result] == [[1.5] * 3] * 2
    assert result[0].return_value["pid"] != result[1].return_value["pid"]
    result[0].return_value["total"] += 1
    assert [deck.name for deck in result.decks if "deck of 0" in deck.html] == ["curves"]
    (record,) = result.rounds
    assert (record.succeeded, record.world_size) == (True, 2)
    assert result.report is not None
    assert result.report.rounds[0].started_at == record.started_at
    assert all(node.facts for node in result.report.nodes)
    assert "succeeded" in result.deck
    printed = capfd.readouterr()
    assert {"0", "1"} <= set(re.findall(r"rank (\d) says hello", printed.out))
    assert "is submitted to" in printed.err
    assert {"results/rank-0", "outcome.json"} <= files(storage)
    del result
    assert files(storage) == {"manifest.json", "outcome.json", "driver.log", "collected.json"}


def test_the_users_own_exception_is_the_cause(head: HeadCluster, storage: str, odd: ModuleType) -> None:
    """Class and fields of the error, and the rounds, are those of a local run; the job has failed, and says why."""

    def work() -> None:
        if os.environ["RANK"] == "1":
            raise odd.OddError(7)
        threading.Event().wait()

    with pytest.raises(WorkerFailedError, match="rank 1") as caught:
        launch(work, elastic=elastic(head, storage, nnodes=2, working_dir=str(Path(str(odd.__file__)).parent)))
    assert isinstance(caught.value.__cause__, odd.OddError)
    assert caught.value.__cause__.code == 7
    assert caught.value.report is not None
    assert caught.value.report.rounds[0].cause == 1
    assert "Rank 1 raised OddError: 7" in caught.value.deck
    assert [rank.outcome for rank in caught.value.rounds[0].ranks] == [Outcome.STOPPED, Outcome.RAISED]
    (folder,) = Path(storage.removeprefix("file://"), "runs").iterdir()

    def message() -> str:
        (job,) = (job for job in head.jobs() if job["submission_id"] == folder.name)
        return str(job["message"]) if job["status"] == "FAILED" else ""

    # The outcome is there before its job has ended.
    wait_until(message, "the job to fail")
    assert "OddError: 7" in message()
    # Why it failed can be asked again, as long as the storage keeps it.
    assert files(storage) == {"manifest.json", "outcome.json", "records/*.pkl", "driver.log"}
    with pytest.raises(WorkerFailedError, match="rank 1"):
        attach(folder.name, storage=storage).result()


def test_a_run_is_left_and_found_again(head: HeadCluster, storage: str) -> None:
    """``wait=False`` returns at once; another handle sees status and log, waits, and takes the result, once."""

    def work(gate: str) -> str:
        print("begun")
        while not Path(gate).exists():
            threading.Event().wait(0.05)
        return "done"

    gate = Path(storage.removeprefix("file://")).with_name("gate")
    run = launch(work, str(gate), elastic=elastic(head, storage), wait=False)
    assert not run.status().ended
    found = attach(run.run_id, storage=storage)
    with pytest.raises(RunPendingError, match="not ended"):
        found.result(timeout=0)
    lines = found.logs(follow=True, rank=0)
    assert "begun" in next(lines)
    assert found.status() is RunStatus.RUNNING
    gate.touch()
    assert list(lines) == []
    assert found.status() is RunStatus.SUCCEEDED
    assert found.result(keep=True)[0].return_value == "done"
    assert attach(run.run_id, storage=storage).result()[0].return_value == "done"
    with pytest.raises(ResultCollectedError, match="took it at"):
        run.result()
    assert any("begun" in line for line in run.logs(rank=0))
    assert list(run.logs(rank=1)) == []


@contextmanager
def no_room_for(size_bytes: int) -> Iterator[None]:
    """A disk on which no file can be larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_was_not_fetched_is_not_removed(head: HeadCluster, storage: str) -> None:
    """A download that fails, or that nobody asked for, leaves the result where it is; ``collect`` removes it."""
    run = launch(lambda: bytes(2**21), elastic=elastic(head, storage), wait=False)
    result = run.result()
    with no_room_for(2**20), pytest.raises(StorageError, match="File too large"):
        result[0]
    del result
    attach(run.run_id, storage=storage).result()
    assert "results/rank-0" in files(storage)
    again = attach(run.run_id, storage=storage).result(keep=True)
    assert again[0].return_value == bytes(2**21)
    del again
    result = run.result()
    with no_room_for(2**20), pytest.raises(StorageError):
        result[0]
    assert len(result[0].return_value) == 2**21
    del result
    assert files(storage) == {"manifest.json", "outcome.json", "driver.log", "collected.json"}
    run.collect()
    with pytest.raises(ResultCollectedError):
        run.result()


def test_a_run_is_found_by_another_address(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """A tunnel ends at another port than the one that it was launched by, and than the one that it has later."""

    def work(gate: str) -> str:
        print("begun")
        while not Path(gate).exists():
            threading.Event().wait(0.05)
        return "done"

    where = urlsplit(head.address)
    with Relay(str(where.hostname), int(where.port or 0)) as relay:
        run = launch(work, str(tmp_path / "gate"), elastic=elastic(head, storage, address=relay.url), wait=False)
    with pytest.raises(ClusterUnreachableError):
        attach(run.run_id, storage=storage).status()
    found = attach(run.run_id, backend=RayBackend(address=head.address, storage=storage))
    assert not found.status().ended
    lines = found.logs(follow=True, rank=0)
    assert "begun" in next(lines)
    (tmp_path / "gate").touch()
    assert list(lines) == []
    assert found.result()[0].return_value == "done"


def test_the_last_lines_of_every_rank_are_in_the_log(head: HeadCluster, storage: str) -> None:
    """Also of ranks that print the same, which Ray would pass on once; what was kept of the log has them as well.

    Lines that are not in it are in the ranks' own files, which the result names and ``logs(rank=...)`` reads.
    """

    def work() -> None:
        print("the last line")

    run = launch(work, elastic=elastic(head, storage, nnodes=2, logs="all"), wait=False)
    followed = list(run.logs(follow=True))
    run.result()
    for lines in (followed, list(run.logs())):
        assert {line for line in lines if "the last line" in line} == {
            f"[rank {rank} | node {rank}] the last line" for rank in range(2)
        }

    run = launch(work, elastic=elastic(head, storage, nnodes=2), wait=False)
    assert list(run.logs(follow=True, rank=1)) == ["the last line"]
    assert [line for line in run.logs() if "the last line" in line] == ["[rank 0 | node 0] the last line"]
    assert list(run.logs(rank=0)) == ["[rank 0 | node 0] the last line"]
    assert list(run.logs(rank=1)) == ["the last line"]
    (path,) = run.result().logs[1]
    assert path.endswith(f"outputs/{run.run_id}/logs/round-0/rank-1.log")
    assert Path(path).read_text() == "the last line\n"


def test_looking_inside_a_rank(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """From a machine that does not belong to the cluster: by the storage and a small job, which leave nothing."""

    def waits_at_the_gate(gate: str) -> None:
        Path(f"{gate}-{os.environ['RANK']}").touch()
        while not Path(gate).exists():
            threading.Event().wait(0.05)

    run = launch(waits_at_the_gate, str(tmp_path / "gate"), elastic=elastic(head, storage, nnodes=2), wait=False)
    try:
        wait_until(lambda: len([*tmp_path.glob("gate-*")]) == 2, "the ranks to begin", 120)
        before = files(storage)
        found = stacks(run.run_id, storage=storage)
        assert found.keys() == {0, 1}
        assert all("waits_at_the_gate" in text for text in found.values())
        assert files(storage) == before
    finally:
        (tmp_path / "gate").touch()
        run.result()


def test_cancel(head: HeadCluster, storage: str) -> None:
    """The run is stopped when ``cancel`` returns, its workers are gone and its nodes free; again changes nothing."""

    def work(note: str) -> None:
        Path(note).write_text(str(os.getpid()))
        threading.Event().wait()

    note = Path(storage.removeprefix("file://")).with_name("note")
    run = launch(work, str(note), elastic=elastic(head, storage), wait=False)
    wait_until(lambda: note.exists() and note.read_text(), "the worker to begin")
    assert run.cancel() is RunStatus.STOPPED
    assert not Path(f"/proc/{note.read_text()}").exists()
    assert run.cancel() is RunStatus.STOPPED
    with pytest.raises(RunStoppedError, match="stopped"):
        run.result()
    assert "request.pkl" not in files(storage)


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_was_altered_in_the_storage_is_not_unpickled(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """A result whose bytes are not those that the driver wrote raises; nothing of it was executed."""
    run = launch(lambda: 1, elastic=elastic(head, storage), wait=False)
    result = run.result(keep=True)
    (written,) = Path(storage.removeprefix("file://")).glob("runs/*/results/rank-0")

    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    written.write_bytes(trap)
    with pytest.raises(IntegrityError, match="SHA-256"):
        result[0]
    (record,) = written.parent.parent.glob("records/*.pkl")
    record.write_bytes(trap)
    with pytest.raises(IntegrityError, match="SHA-256"):
        run.result()
    assert not (tmp_path / "sprung").exists()


def test_a_request_that_was_altered(
    head: HeadCluster, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its driver reads it: nothing of it is executed, and whoever waits is told."""
    submit = JobClient.submit_job
    altered = []

    def alter_and_submit(client: JobClient, **job: Any) -> Any:
        # The driver may read it before ``launch`` returns. There is none for the job that asks about the storage.
        for request in Path(storage.removeprefix("file://")).glob("runs/*/request.pkl"):
            request.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
            altered.append(request)
        return submit(client, **job)

    monkeypatch.setattr(JobClient, "submit_job", alter_and_submit)
    run = launch(lambda: 1, elastic=elastic(head, storage), wait=False)
    assert len(altered) == 1
    with pytest.raises(IntegrityError, match=r"not the one that was submitted"):
        run.result()
    assert run.status() is RunStatus.FAILED
    assert not (tmp_path / "sprung").exists()
    assert files(storage) == {"manifest.json", "outcome.json", "records/*.pkl", "driver.log"}


def test_a_flyte_task_and_its_files(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """A task called here trains there: files go there and come back, a failure is Flyte's."""
    (tmp_path / "input.txt").write_text("text")
    config = elastic(head, storage)

    @task(task_config=config)
    def train(file: FlyteFile, fail: bool) -> FlyteFile:
        if fail:
            raise LookupError("no such data")
        text = Path(file.download()).read_text()
        Path("output.txt").write_text(text.upper())
        return FlyteFile("output.txt")

    returned = train(file=FlyteFile(str(tmp_path / "input.txt")), fail=False)
    assert Path(returned.download()).read_text() == "TEXT"
    assert not any(name.startswith("inputs/") for name in files(storage))
    with pytest.raises(FlyteUserRuntimeException) as caught:
        train(file=FlyteFile(str(tmp_path / "input.txt")), fail=True)
    assert isinstance(caught.value.value.__cause__ or caught.value.__cause__, LookupError)
    assert not any(name.startswith("inputs/") for name in files(storage))


def test_an_input_that_is_handed_back(head: HeadCluster, storage: str, tmp_path: Path) -> None:
    """Files are staged in the run's folder and go with it; one that the function returns is a copy that stays."""
    (tmp_path / "input.txt").write_text("text")
    with pytest.raises(kfpytorch_ray.PayloadError):
        launch(print, FlyteFile(str(tmp_path / "input.txt")), threading.Lock(), elastic=elastic(head, storage))
    assert files(storage) == set()

    def work(file: FlyteFile) -> FlyteFile:
        return file

    run = launch(work, FlyteFile(str(tmp_path / "input.txt")), elastic=elastic(head, storage), wait=False)
    assert any(name.startswith("inputs/") for name in files(storage))
    returned = run.result()[0].return_value
    assert files(storage) == {"manifest.json", "outcome.json", "driver.log", "collected.json"}
    assert Path(returned.download()).read_text() == "text"


def test_a_later_attempt_ends_an_earlier_one(
    head: HeadCluster, storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pod of attempt 0 of a Flyte task is gone, its run is not: attempt 1 stops it, and nobody else's."""

    def work(note: str) -> None:
        Path(note).touch()
        threading.Event().wait()

    def attempt(pod: str, number: int) -> kfpytorch_ray.Run:
        monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "f123")
        monkeypatch.setenv("FLYTE_ATTEMPT_NUMBER", str(number))
        monkeypatch.setenv("HOSTNAME", f"{pod}-{number}")
        note = tmp_path / f"{pod}-{number}"
        run = launch(work, str(note), elastic=elastic(head, storage), wait=False)
        wait_until(note.exists, "the attempt to begin")
        return run

    other_node, first = attempt("f123-n1", 0), attempt("f123-n0", 0)
    second = attempt("f123-n0", 1)
    assert first.status() is RunStatus.STOPPED
    assert other_node.status() is RunStatus.RUNNING
    assert second.status() is RunStatus.RUNNING
    staged = Path(storage.removeprefix("file://"), "runs").glob("*/request.pkl")
    assert {path.parent.name for path in staged} == {other_node.run_id, second.run_id}
    assert {run.cancel() for run in (second, other_node)} == {RunStatus.STOPPED}


def test_what_is_wrong_with_the_call(head: HeadCluster, storage: str) -> None:
    """Mistakes are told before anything is sent."""
    with pytest.raises(ConfigError, match=r"(?s)no storage is named\..*Why:.*Fix: Give storage='s3:"):
        launch(max, 1, 2, elastic=Elastic(backend=RayBackend(address=head.address)))
    with_password = head.address.replace("//", "//ada:s3cret@")
    with pytest.raises(ConfigError, match=r"credentials in it, which would be shown: give them as .*headers") as caught:
        launch(max, 1, 2, elastic=elastic(head, storage, address=with_password))
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError, match="wait=False"):
        launch(max, 1, 2, elastic=Elastic(backend=RayBackend()), wait=False)
    with pytest.raises(ConfigError, match="wait=False"):
        launch(max, 1, 2, elastic=Elastic(backend="kubeflow"), wait=False)
    with pytest.raises(ConfigError, match="runtime_env: Ray does not take it"):
        launch(max, 1, 2, elastic=elastic(head, storage, runtime_env={"pip": 3}))
    with pytest.raises(UnknownRunError):
        attach("kfr-nobody", storage=storage)
    with pytest.raises(kfpytorch_ray.PayloadError, match="position 0"):
        launch(print, threading.Lock(), elastic=elastic(head, storage))
    assert files(storage) == set()


def test_the_job_tells_no_secret(head: HeadCluster, storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither headers nor the workers' variables are in the entrypoint, the metadata, the manifest or the log."""

    def work() -> bool:
        return os.environ["API_KEY"] == "s3cret-key"

    options = {"headers": {"X-Token": "s3cret-token"}, "env": {"API_KEY": "s3cret-key"}}
    run = launch(work, elastic=elastic(head, storage, **options), wait=False)
    assert run.result(keep=True)[0].return_value is True
    job = JobClient(head.address).job(run.run_id)
    assert job is not None
    root = Path(storage.removeprefix("file://"))
    told = [job.model_dump_json(), repr(run), *run.logs(), repr(options["headers"].keys())]
    told += [path.read_text() for path in root.glob("runs/*/*.json")]
    assert "s3cret" not in "".join(told)
    (request,) = root.glob("runs/*/request.pkl")
    assert b"s3cret-token" not in request.read_bytes()
    assert request.stat().st_mode & 0o077 == 0 or request.parent.stat().st_mode & 0o077 == 0
