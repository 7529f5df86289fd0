"""Decks of a run in the Flyte task, with a backend made for tests."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import flytekit
import pytest
import sample_reports
from flyte_contexts import decks, task_with_decks
from flytekit import Deck, task
from flytekit.core.context_manager import FlyteContextManager
from flytekit.deck.deck import TimeLineDeck
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException

from kfpytorch_ray import Elastic
from kfpytorch_ray.errors import ConfigError, KfpytorchRayError, LaunchError, NodeLostError, WorkerFailedError
from kfpytorch_ray.report.data import RankDeck, RunReport
from kfpytorch_ray.report.page import page
from kfpytorch_ray.results import ElasticResult, ElasticWorkerResult


@pytest.fixture
def output_prefix(tmp_path: Path) -> Iterator[Path]:
    """A container's execution of a task with decks, which leaves its outputs in this folder."""
    with task_with_decks(tmp_path) as prefix:
        yield prefix


def raising(error: Exception) -> Any:
    def fail(plan: Any) -> ElasticResult:
        raise error

    return staticmethod(fail)


def returning(report: RunReport | None, *decks: Deck) -> Any:
    first = ElasticWorkerResult(7, [*decks])
    return staticmethod(lambda plan: ElasticResult((0,), lambda rank: first, report=report))


def reported(error: KfpytorchRayError, report: RunReport) -> KfpytorchRayError:
    error.report = report
    return error


@task(task_config=Elastic(backend="kubeflow"), enable_deck=True)
def train() -> int:
    return 0


@pytest.fixture
def trained(double: Any) -> Any:
    return train.on_backend("double")


def test_a_success_is_shown_beside_rank_0s_decks(
    double: Any, trained: Any, output_prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run deck is one of the task's, and says the same as the result's own page."""
    report = sample_reports.success()
    curve = Deck("curve", "<p>drawn</p>", auto_add_to_deck=False)
    timeline = TimeLineDeck("timeline", auto_add_to_deck=False)
    monkeypatch.setattr(double, "answer", returning(report, curve, timeline))
    assert trained.execute() == 7
    shown = decks()
    assert list(shown) == ["curve", "Elastic run"]
    assert shown["Elastic run"] in page(report)
    assert "<html" not in shown["Elastic run"]


def test_every_ranks_decks_are_named_by_rank(
    double: Any, trained: Any, output_prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they were asked for; rank 0's are among them and not shown twice."""
    made = tuple(RankDeck(rank, "curve", f"<p>of {rank}</p>") for rank in range(3))
    report = replace(sample_reports.success(), decks=made)
    monkeypatch.setattr(double, "answer", returning(report, Deck("curve", "<p>of 0</p>", auto_add_to_deck=False)))
    trained.execute()
    shown = decks()
    assert list(shown) == ["rank 0: curve", "rank 1: curve", "rank 2: curve", "Elastic run"]
    assert shown["rank 2: curve"] == "<p>of 2</p>"


@pytest.mark.parametrize(
    ("error", "as_flyte"),
    [
        (WorkerFailedError("oh", 12.5), FlyteUserRuntimeException),
        (NodeLostError("a node"), FlyteRecoverableException),
    ],
)
def test_a_failure_is_published_before_it_is_raised(
    error: LaunchError,
    as_flyte: type[Exception],
    double: Any,
    trained: Any,
    output_prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file that Flyte shows is there when the error leaves the task, with the cause and the ranks' decks."""
    report = replace(sample_reports.failure(), decks=(RankDeck(1, "curve", "<p>of 1</p>"),))
    monkeypatch.setattr(double, "answer", raising(reported(error, report)))
    with pytest.raises(as_flyte):
        trained.execute()
    published = (output_prefix / "deck.html").read_text()
    assert "Root cause" in published
    assert sample_reports.MESSAGE in published
    assert "rank 1: curve" in published
    assert "<p>of 1</p>" in published
    assert list(decks()) == ["rank 1: curve", "Elastic run"]


def test_a_name_that_is_not_utf_8_loses_no_deck(
    double: Any, trained: Any, output_prefix: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The task's decks are published, and a file is written."""
    report = sample_reports.failure(message="FileNotFoundError: caf\udce9.jpg")
    error = reported(WorkerFailedError("oh", 12.5), report)
    monkeypatch.setattr(double, "answer", raising(error))
    with pytest.raises(FlyteUserRuntimeException):
        trained.execute()
    assert "caf\\udce9.jpg" in (output_prefix / "deck.html").read_text()
    assert "caf\\udce9.jpg" in error.save_html(tmp_path / "failed.html").read_text(encoding="utf-8")


def test_without_decks_nothing_is_drawn(
    double: Any, trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the task has not enabled them, the run costs nothing more."""
    context = FlyteContextManager.current_context()
    params = flytekit.current_context().with_enable_deck(enable_deck=False)
    params.decks = []
    state = context.new_execution_state().with_params(user_space_params=params.build())
    with FlyteContextManager.with_context(context.with_execution_state(state)):
        monkeypatch.setattr(double, "answer", returning(sample_reports.success()))
        trained.execute()
        monkeypatch.setattr(double, "answer", raising(reported(WorkerFailedError("oh"), sample_reports.failure())))
        with pytest.raises(FlyteUserRuntimeException):
            trained.execute()
        assert decks() == {}


def test_a_deck_that_cannot_be_drawn_fails_no_task(
    double: Any,
    trained: Any,
    output_prefix: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is said in the log; the value, or the error, is the run's own."""
    broken = replace(sample_reports.success(), rounds=None)  # type: ignore[arg-type]
    monkeypatch.setattr(double, "answer", returning(broken))
    assert trained.execute() == 7
    assert "run deck of train_digits could not be drawn" in caplog.text
    monkeypatch.setattr(double, "answer", raising(reported(WorkerFailedError("oh"), broken)))
    with pytest.raises(FlyteUserRuntimeException):
        trained.execute()


def test_what_has_no_report_is_raised_and_returned_as_before(
    double: Any, trained: Any, output_prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend of others need not make one."""
    monkeypatch.setattr(double, "answer", returning(None, Deck("curve", "", auto_add_to_deck=False)))
    assert trained.execute() == 7
    assert list(decks()) == ["curve"]
    monkeypatch.setattr(double, "answer", raising(WorkerFailedError("oh")))
    with pytest.raises(FlyteUserRuntimeException):
        trained.execute()
    assert not (output_prefix / "deck.html").exists()


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_the_report_travels_with_the_error(pickler: Any) -> None:
    """Across Ray, across storage, and once more; the error stays what it is."""
    error: Any = reported(NodeLostError("What.", 12.5), sample_reports.failure())
    for _ in range(2):
        error = pickle.loads(pickler.dumps(error))
    assert isinstance(error, NodeLostError)
    assert (error.message, error.timestamp) == ("What.", 12.5)
    assert error.report == sample_reports.failure()


def test_a_result_and_an_error_show_themselves(tmp_path: Path) -> None:
    """One page, as text or in a file; whoever has no report says so."""
    result = ElasticResult((), lambda rank: ElasticWorkerResult(None, []), report=sample_reports.success())
    assert result.deck.startswith("<!doctype html>")
    assert result.save_html(tmp_path / "run.html").read_text(encoding="utf-8") == result.deck
    error = reported(LaunchError("oh"), sample_reports.failure())
    assert "Root cause" in error.save_html(str(tmp_path / "failed.html")).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="no deck of this run"):
        ConfigError("Elastic", ("wrong",)).save_html(tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()
