from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cloudpickle
import flytekit
import pytest
from flytekit.exceptions.user import FlyteRecoverableException

from kfpytorch_ray.flyte_worker import (
    ERROR_FILE_VARIABLE,
    RECOVERABLE_MARKER,
    has_marker,
    leave_marker,
    run_in_current_context,
    run_in_flyte_context,
    spawn_helper,
)
from kfpytorch_ray.plan import FlyteContext


class Preempted(FlyteRecoverableException):
    pass


def fail(error: BaseException) -> Any:
    raise error


@pytest.fixture
def error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "attempt_0" / "0" / "error.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(path))
    return path


def test_spawn_helper_has_upstreams_arguments(tmp_path: Path) -> None:
    """Called as upstream's is called, it returns value, decks and output metadata."""

    def train(x: int) -> int:
        flytekit.Deck("curve", "<b>loss</b>")
        return x + 1

    result = spawn_helper(
        fn=cloudpickle.dumps(train),
        raw_output_prefix=str(tmp_path),
        checkpoint_dest=str(tmp_path / "new"),
        checkpoint_src="",
        kwargs={"x": 1},
    )
    assert result.return_value == 2
    assert "curve" in [deck.name for deck in result.decks]
    assert result.om is None


def test_the_flyte_context_is_there_in_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execution id, raw output prefix and checkpoint are those of the plan."""
    monkeypatch.setenv("FLYTE_INTERNAL_EXECUTION_ID", "another")

    def look() -> tuple[str, str, bool]:
        context = flytekit.current_context()
        return context.execution_id.name, context.raw_output_prefix, context.checkpoint is not None

    flyte = FlyteContext(str(tmp_path), str(tmp_path / "cp"), None, {"FLYTE_INTERNAL_EXECUTION_ID": "f123"})
    assert run_in_flyte_context(look, flyte).return_value == ("f123", str(tmp_path), True)


def test_a_worker_goes_on_from_the_round_before(tmp_path: Path) -> None:
    """The same function called again finds what it wrote, first of this attempt and then of the earlier one."""

    def train() -> bytes | None:
        checkpoint = flytekit.current_context().checkpoint
        found: bytes | None = checkpoint.read()
        checkpoint.write(b"round after " + (found or b"nothing"))
        return found

    attempt = FlyteContext(str(tmp_path), str(tmp_path / "first"), None)
    assert run_in_flyte_context(train, attempt).return_value is None
    assert run_in_flyte_context(train, attempt).return_value == b"round after nothing"
    retry = FlyteContext(str(tmp_path), str(tmp_path / "second"), str(tmp_path / "first"))
    assert run_in_flyte_context(train, retry).return_value == b"round after round after nothing"


def test_by_upstreams_door_as_well(tmp_path: Path) -> None:
    """``spawn_helper`` is how workers of the kubeflow backend begin."""

    def look() -> str:
        return type(flytekit.current_context().checkpoint).__name__

    fn, prefix, dest = cloudpickle.dumps(look), str(tmp_path), str(tmp_path / "new")
    assert spawn_helper(fn, prefix, dest, "", {}).return_value == "WorkerCheckpoint"


def test_without_a_place_flytekit_says_so(tmp_path: Path) -> None:
    """As it does on a platform without checkpoints."""
    with pytest.raises(NotImplementedError):
        run_in_flyte_context(lambda: flytekit.current_context().checkpoint, FlyteContext(str(tmp_path)))


def test_decks_are_those_of_the_call(tmp_path: Path) -> None:
    """Each call begins without any, and gives its own."""

    def train(name: str) -> None:
        flytekit.Deck(name, "<b>loss</b>")

    for name in ("one", "two"):
        result = run_in_flyte_context(lambda name=name: train(name), FlyteContext(str(tmp_path), str(tmp_path / "cp")))
        assert {deck.name for deck in result.decks} & {"one", "two"} == {name}


@pytest.mark.parametrize("code", [0, None])
def test_a_clean_exit_counts_as_returning_none(code: int | None) -> None:
    """``sys.exit(0)`` in a rank is not a crash."""
    assert run_in_current_context(lambda: sys.exit(code)).return_value is None


def test_another_exit_code_is_a_failure() -> None:
    """``sys.exit(3)`` ends the rank with that code."""
    with pytest.raises(SystemExit):
        run_in_current_context(lambda: sys.exit(3))


def test_a_recoverable_failure_leaves_the_marker(error_file: Path) -> None:
    """Subclasses of FlyteRecoverableException count too; the exception itself goes on."""
    with pytest.raises(Preempted):
        run_in_current_context(lambda: fail(Preempted("again")))
    error_file.write_text("{}")
    assert has_marker(str(error_file), RECOVERABLE_MARKER)


def test_another_failure_leaves_no_marker(error_file: Path) -> None:
    """An exception that Flyte does not know is not recoverable."""
    with pytest.raises(ValueError, match="bad"):
        run_in_current_context(lambda: fail(ValueError("bad")))
    error_file.write_text("{}")
    assert not has_marker(str(error_file), RECOVERABLE_MARKER)


def test_without_an_agent_the_users_exception_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody set an error file, nothing stands in the way of the exception."""
    monkeypatch.delenv(ERROR_FILE_VARIABLE, raising=False)
    with pytest.raises(Preempted):
        run_in_current_context(lambda: fail(Preempted("again")))


def test_a_killed_worker_is_never_recoverable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's ``<N/A>`` for a missing error file does not lead to a marker in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / RECOVERABLE_MARKER).touch()
    assert not has_marker("<N/A>", RECOVERABLE_MARKER)
    assert not has_marker(str(tmp_path / "error.json"), RECOVERABLE_MARKER)


def test_markers_lie_beside_the_error_file(error_file: Path) -> None:
    """Each rank and each round has a folder of its own, so markers are not mixed up."""
    leave_marker("some_marker")
    assert error_file.with_name("some_marker").exists()
