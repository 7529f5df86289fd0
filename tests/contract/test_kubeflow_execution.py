"""Torch elastic in this process, for real: what a pod of a PyTorchJob or a laptop does on the kubeflow backend."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import flytekit
import pytest
from flytekit import task
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException

from kfpytorch_ray import (
    Elastic,
    PayloadError,
    PlacementTimeoutError,
    RecoverableWorkerError,
    ResultError,
    WorkerFailedError,
    launch,
)

ROOT = Path(__file__).resolve().parents[2]


def elastic(start_method: str, **fields: Any) -> Elastic:
    return Elastic(
        **{"nproc_per_node": 2, "monitor_interval": 1, "start_method": start_method, "backend": "kubeflow", **fields}
    )


@pytest.fixture(autouse=True)
def restored_environment() -> Any:
    """torch elastic and the adapter set variables of this process, as upstream."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_every_rank_brings_its_value_home(start_method: str) -> None:
    """All ranks of the node run under torchrun's environment, and sys.exit(0) counts as returning None."""

    def train(offset: int, *, factor: int) -> Any:
        if os.environ["RANK"] == "1":
            sys.exit(0)
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS")
        return (offset * factor, [os.environ[name] for name in names])

    os.environ.pop("OMP_NUM_THREADS", None)
    result = launch(train, 2, factor=21, elastic=elastic(start_method))
    value, (rank, local_rank, world_size, run_id, threads) = result[0].return_value
    assert value == 42
    assert (rank, local_rank, world_size, threads) == ("0", "0", "2", "1")
    assert run_id.startswith("launch-")
    assert result[1].return_value is None
    assert len(result) == 2
    assert result.report is not None
    assert [rank.outcome for rank in result.report.rounds[0].ranks] == ["succeeded", "succeeded"]
    assert "succeeded" in result.deck


def test_a_task_returns_rank_0s_value_and_decks() -> None:
    """Called like any Flyte task; process groups work; rank 0's decks are the task's."""

    @task(task_config=elastic("spawn"), enable_deck=True)
    def train(x: int) -> int:
        import torch
        import torch.distributed as dist

        dist.init_process_group(backend="gloo")
        total = torch.tensor([x + dist.get_rank()])
        dist.all_reduce(total)
        flytekit.Deck("curve", f"rank {dist.get_rank()}")
        dist.destroy_process_group()
        return int(total.item())

    before = len(flytekit.current_context().decks)
    assert train(x=10) == 21
    decks = flytekit.current_context().decks[before:]
    assert [deck.html.strip() for deck in decks if deck.name == "curve"] == ["rank 0"]


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_a_recoverable_failure_stays_recoverable(start_method: str) -> None:
    """Subclasses too; ours outside Flyte and Flyte's in a task."""

    class Preempted(FlyteRecoverableException):
        pass

    def train() -> None:
        raise Preempted("come again")

    if start_method == "fork":
        with pytest.raises(RecoverableWorkerError, match="come again") as caught:
            launch(train, elastic=elastic(start_method))
        assert caught.value.timestamp > 0
    else:
        with pytest.raises(FlyteRecoverableException, match="come again") as translated:
            task(task_config=elastic(start_method))(train)()
        assert translated.value.timestamp > 0


def test_another_failure_is_a_user_error_with_rank_and_traceback() -> None:
    """The message says which rank failed, and where in its code."""

    def train() -> None:
        if os.environ["RANK"] == "1":
            raise KeyError("learning_rate")

    with pytest.raises(FlyteUserRuntimeException, match="learning_rate") as caught:
        task(task_config=elastic("fork"))(train)()
    assert isinstance(caught.value.value, WorkerFailedError)
    assert "rank      : 1" in str(caught.value)
    assert caught.value.__cause__ is not None
    report = caught.value.value.report
    assert report is not None
    cause = next(rank for rank in report.rounds[0].ranks if rank.rank == report.rounds[0].cause)
    assert (cause.rank, cause.outcome, cause.exit_code) == (1, "raised", 1)
    assert "learning_rate" in cause.message
    assert 'raise KeyError("learning_rate")' in cause.traceback
    assert report.failure is not None
    assert report.failure.error == "WorkerFailedError"
    assert "raise KeyError(&#34;learning_rate&#34;)" in caught.value.value.deck


def test_a_killed_rank_is_not_recoverable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recoverable_error").touch()

    def train() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerFailedError, match="SIGKILL") as caught:
        launch(train, elastic=elastic("fork", nproc_per_node=1))
    assert not caught.value.retryable
    assert caught.value.report is not None
    (killed,) = caught.value.report.rounds[0].ranks
    assert (killed.outcome, killed.message, killed.exit_code) == ("killed", "killed by SIGKILL", -9)


def test_restarts_are_made(tmp_path: Path) -> None:
    """A rank that fails once is started again within max_restarts."""

    def train() -> str:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            raise RuntimeError("first attempt")
        return os.environ["TORCHELASTIC_RESTART_COUNT"]

    assert launch(train, elastic=elastic("fork", max_restarts=1))[0].return_value == "1"


def test_a_forked_rank_destroys_nothing_that_it_inherited() -> None:
    """What belongs to threads of this process would take the rank along: objects of Ray, gRPC, torch."""
    here = os.getpid()

    class OfThisProcess:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            if os.getpid() != here:
                os.kill(os.getpid(), signal.SIGSEGV)

    def train() -> int:
        return gc.collect()

    gc.disable()
    try:
        OfThisProcess()
        assert len(launch(train, elastic=elastic("fork"))) == 2
    finally:
        gc.enable()


def test_a_rank_that_dies_while_it_writes_its_error_is_a_failure_of_a_rank() -> None:
    """Of the error file only the beginning is there."""

    def train() -> None:
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text('{"message":')
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerFailedError, match="killed while it wrote down why"):
        launch(train, elastic=elastic("fork", nproc_per_node=1))


def test_a_result_that_cannot_be_pickled_names_rank_and_type() -> None:
    """Not only that a process ended."""
    with pytest.raises(ResultError, match=r"return value of rank 0 cannot be pickled: it is of type _thread\.lock"):
        launch(lambda: threading.Lock() if os.environ["RANK"] == "0" else None, elastic=elastic("fork"))


def test_an_input_that_cannot_be_pickled_starts_nothing() -> None:
    """The function or input is named before a process is started."""
    with pytest.raises(PayloadError, match="'x'"):
        launch(lambda x: x, threading.Lock(), elastic=elastic("spawn"))


def test_too_few_nodes_are_a_placement_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """Outside a PyTorchJob two nodes never meet: warned of, and an error that says for how long was waited."""
    config = elastic("fork", nnodes=2, rdzv_configs={"join_timeout": 1})
    with pytest.raises(PlacementTimeoutError, match="2 nodes within 1 s"):
        launch(lambda: None, elastic=config)
    assert "PET_NNODES is not set" in caplog.text


def test_an_interrupted_agent_is_not_a_success() -> None:
    """SIGTERM to the process that supervises the workers ends as an interruption, with nothing left running.

    A script that goes on takes the next signal as it did before.
    """
    code = """
import os, signal, sys, time
from kfpytorch_ray import Elastic, LaunchInterruptedError, launch

def train():
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()

signal.signal(signal.SIGINT, lambda *_: None)
before = {number: signal.getsignal(number) for number in signal.valid_signals()}
try:
    launch(train, elastic=Elastic(monitor_interval=1, start_method="fork", backend="kubeflow"))
except LaunchInterruptedError as error:
    print("interrupted", error.retryable, error.timestamp > 0)
print("handlers as before", {number: signal.getsignal(number) for number in signal.valid_signals()} == before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["interrupted True True", "handlers as before True"], done.stderr
